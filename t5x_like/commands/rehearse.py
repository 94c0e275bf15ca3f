"""`t5x_like rehearse`: the job of several processes on this machine, with faults, against one process."""

import contextlib
import json as json_format
import math
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from t5x_like.errors import RunFailed, UserError
from t5x_like.recipe import Recipe
from t5x_like.rehearsal import comparison, faults
from t5x_like.rehearsal.job import Job, Outcome, other_flags
from t5x_like.sharding import Partitioner, building_for


class Finding(NamedTuple):
    """A row of the table, and an entry of the JSON list."""

    fault: str
    processes: int
    compared_with: str
    restarts: int
    steps_lost: int
    seconds_to_notice: float | None
    curve_equal: bool
    bitwise: bool
    largest_difference: float
    order_equal: bool
    first_difference: str | None


def rehearse(
    recipe: Recipe,
    *,
    processes: int = 4,
    devices_per_process: int = 2,
    fault: Sequence[str] = (),
    patience: int = 20,
    folder: str | None = None,
    json: str | None = None,
) -> None:
    """Trains with one process, with several, and with several once more for each fault, and compares.

    Args:
      recipe: what to train: small enough for this machine, since it is trained as it is.
      processes: of the job.
      devices_per_process: virtual CPU devices of each; the one process gets all of them.
      fault: as `faults.parse` reads them; none means one of every kind.
      patience: seconds of silence after which a process counts as dead.
      folder: where runs and logs stay; None means a temporary one, kept only if something differs.
      json: a file for the findings.

    Raises:
      UserError: a mistake in the configuration, or a batch that the devices do not divide.
      RunFailed: a curve or an order of examples differs, or the job did not survive a fault.
    """
    asked = [faults.parse(text, processes) for text in fault]
    steps = _check(recipe, {processes, *(each.processes for each in asked)}, devices_per_process)
    struck = [each.within(steps) for each in asked] or faults.default_faults(processes, steps)
    place = Path(folder or tempfile.mkdtemp(prefix="rehearsal_")).absolute()
    place.mkdir(parents=True, exist_ok=True)
    if any(place.iterdir()):
        raise UserError(f"--folder={folder}: a rehearsal starts in an empty folder")
    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def run(name: str, count: int, devices: int, each: faults.Fault | None = None) -> Outcome:
        console.print(f"{name}: {count} processes x {devices} devices")
        return Job(recipe.arguments(), steps, place / name.replace(" ", "_"), devices, patience).run(count, each)

    findings = []
    with _ended_by_sigterm():
        alone = run("one process", 1, processes * devices_per_process)
        together = run("no fault", processes, devices_per_process)
        findings.append(_finding("none", processes, together, ("one process", alone), alone))
        for each in struck:
            outcome = run(str(each), processes, devices_per_process, each)
            reference = ("no fault", together) if each.processes == processes else ("one process", alone)
            findings.append(_finding(str(each), each.processes, outcome, reference, alone))
    _report(findings, json)
    wrong = [each for each in findings if each.first_difference]
    if wrong:
        lines = [f"{each.fault}: {each.first_difference}" for each in wrong]
        raise RunFailed(f"the job is not what one process makes of it; runs and logs: {place}\n  " + "\n  ".join(lines))
    if folder is None:
        shutil.rmtree(place)


def _check(recipe: Recipe, counts: set[int], devices_per_process: int) -> int:
    """Refuses a batch that some number of processes does not divide; returns the steps of the run."""
    if min(counts) < 1 or devices_per_process < 1:
        raise UserError("--processes and --devices_per_process must be at least 1")
    most = max(counts) * devices_per_process
    _start_jax(most)
    if jax.device_count() < most:
        raise UserError(f"a rehearsal with {most} devices needs a process of its own: here are {jax.device_count()}")
    for count in sorted(counts):
        with building_for(jax.devices()[: count * devices_per_process]):
            experiment = recipe.build()
            sharding = (experiment.partitioner or Partitioner()).sharding("batch")
        axes = sharding.spec[0] if sharding.spec else None
        ways = math.prod(sharding.mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
        rows = experiment.dataset.batch_size
        if rows % ways:
            raise UserError(
                f"{count} processes x {devices_per_process} devices split a batch {ways} ways, it has {rows} rows: "
                f"--gin.BATCH_SIZE={max(1, round(rows / ways)) * ways} would do, or another number of either"
            )
    return experiment.trainer.train_steps


def _start_jax(devices: int) -> None:
    """Gives this process, which computes nothing, at least so many virtual devices to think of, if it has none yet."""
    asked = re.search(r"device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if asked is None or int(asked[1]) < devices:
        with contextlib.suppress(RuntimeError):  # JAX has started already
            jax.config.update("jax_num_cpu_devices", devices)
            jax.config.update("jax_platforms", "cpu")
            os.environ["XLA_FLAGS"] = other_flags()


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within it, SIGTERM ends this process as Ctrl-C does: the processes that it started go with it."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _finding(name: str, processes: int, run: Outcome, reference: tuple[str, Outcome], alone: Outcome) -> Finding:
    """What came out of one job; the order of its examples is always compared with that of one process."""
    bitwise = reference[1] is not alone
    curve = comparison.curves(run, reference[1], bitwise)
    order = comparison.orders(run, alone)
    first = min((each for each in (curve.difference, order) if each), default=None)
    return Finding(
        fault=name,
        processes=processes,
        compared_with=reference[0],
        restarts=len(run.attempts) - 1,
        steps_lost=run.steps_lost(),
        seconds_to_notice=run.seconds_to_notice,
        curve_equal=curve.difference is None,
        bitwise=bitwise,
        largest_difference=curve.largest,
        order_equal=order is None,
        first_difference=f"step {first.step}: {first.what}" if first else None,
    )


def _report(findings: Sequence[Finding], file: str | None) -> None:
    table = Table(
        "fault", "processes", "restarts", "steps lost", "noticed after", "curve equal", "order equal", box=None
    )
    for each in findings:
        bound = "bitwise" if each.bitwise else f"{each.largest_difference:.0e}"
        table.add_row(
            each.fault,
            str(each.processes),
            str(each.restarts),
            str(each.steps_lost),
            "-" if each.seconds_to_notice is None else f"{each.seconds_to_notice:.1f} s",
            f"{'yes' if each.curve_equal else 'NO'}, {bound} ({each.compared_with})",
            "yes" if each.order_equal else "NO",
        )
    Console(width=120, highlight=False).print(table)
    if file is not None:
        Path(file).write_text(json_format.dumps([each._asdict() for each in findings], indent=2) + "\n")
