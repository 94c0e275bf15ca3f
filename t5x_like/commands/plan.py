"""`t5x_like plan`: what a training job takes of devices that need not be there, and the best way to run it."""

import functools
import itertools
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.status import Status

from t5x_like.architectures.stack import REMAT_POLICIES
from t5x_like.errors import RunFailed, UserError, nearest
from t5x_like.planning import report
from t5x_like.planning.choice import Choice, parse_mesh
from t5x_like.planning.plan import Compiler, count_devices, with_decoding
from t5x_like.planning.search import Search, search
from t5x_like.recipe import Recipe


def plan(
    recipe: Recipe,
    topology: Sequence[str] = (),
    mesh: Sequence[str] = (),
    remat: str | None = None,
    microbatches: int | None = None,
    decode: bool = True,
    max_compiles: int = 6,
    minutes: float = 12.0,
    price: float | None = None,
    json: str | None = None,
    html: str | None = None,
    gin_out: str | None = None,
) -> None:
    """Compiles the training step for every topology and mesh, and says what fits and how fast it could be.

    Args:
      recipe: the job.
      topology: TPUs, such as `v5p:4x4x4`; none for the devices that are here.
      mesh: sizes to try, such as `data=16,model=4`; none searches.
      remat: the policy; None searches.
      microbatches: parts of the batch; None searches, or takes what the gin files say where `mesh` is given.
      decode: compile greedy decoding the best way, too.
      max_compiles: ways of a topology to compile at most in a search.
      minutes: a search of a topology begins to compile none after so long.
      price: of a chip for an hour.
      json: file to write the plans to.
      html: file to write a page to.
      gin_out: file to write the best way to, for `train`.

    Raises:
      UserError: a mistake in the gin files or options.
      RunFailed: nothing fits.
    """
    if remat is not None and remat not in (*REMAT_POLICIES, "none"):
        hint = nearest(remat, [*REMAT_POLICIES, "none"])
        raise UserError(f"--remat={remat}: not one of {', '.join(REMAT_POLICIES)} or none.{hint}")
    console, compiler, found = Console(highlight=False), Compiler(on_cpu=bool(topology)), list[Search]()
    try:
        for name, sizes in itertools.product(topology or (None,), mesh or (None,)):
            with console.status("starting") as status:
                tell = functools.partial(_tell, console, status, name or "here")
                fixed = None if sizes is None else parse_mesh(sizes, compiler(count_devices, name))
                given = Choice(fixed, remat, microbatches)
                ways = search(recipe, name, given, compiler, max_compiles, minutes, tell)
                if decode and ways.plans[0].fits:
                    tell("decoding")
                    ways.plans[0] = with_decoding(ways.plans[0], recipe, name, compiler)
                found.append(ways)
    finally:
        compiler.close()
    report.show(console, found, price)
    if json is not None:
        report.write_json(found, json, price)
    if html is not None:
        report.write_html(found, html)
    best = min((each.plans[0] for each in found if each.plans[0].fits), key=lambda p: p.seconds or 0.0, default=None)
    if best is None:
        raise RunFailed("nothing that was compiled fits; see the reasons above")
    if gin_out is not None:
        report.write_gin(best, recipe, gin_out)
        console.print(f"\ntrain it: t5x_like train --gin_file={gin_out} --gin.MODEL_DIR=FOLDER")


def _tell(console: Console, status: Status, name: str, what: str) -> None:
    """What is being done for a target: a search takes minutes. Logs get a line of it."""
    if console.is_terminal:
        status.update(f"{name}: {what}")
    else:
        print(f"{name}: {what}", file=sys.stderr, flush=True)
