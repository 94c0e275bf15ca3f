"""The verbs of the command line and their options. Imports nothing heavy: `--help` reads it."""

import argparse
from collections.abc import Callable
from typing import NamedTuple

Options = Callable[[argparse.ArgumentParser], None]


def _dry_run(parser: argparse.ArgumentParser) -> None:
    help = "say what would be done, and do nothing"
    parser.add_argument("--dry_run", action="store_true", default=argparse.SUPPRESS, help=help)


def _plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what for, and what is fixed").add_argument
    add("--topology", action="append", default=[], metavar="CHIP:SHAPE", help="v5p:4x4x4, v5e:8x8*2; repeatable")
    add("--mesh", action="append", default=[], metavar="AXIS=N,...", help="data=16,model=4; repeatable (else: search)")
    add("--remat", metavar="POLICY", help="full, save_projections, minimal, none ... (else: search)")
    add("--microbatches", type=int, metavar="N", help="parts of the batch, one after another (else: search)")
    add("--no_decode", dest="decode", action="store_false", help="do not compile greedy decoding too")
    add("--max_compiles", type=int, default=6, metavar="N", help="ways to compile in a search")
    add("--minutes", type=float, default=12.0, metavar="N", help="a search begins to compile none later")
    add = parser.add_argument_group("what to write").add_argument
    add("--price", type=float, metavar="RATE", help="of a chip for an hour")
    add("--json", metavar="FILE", help="all figures")
    add("--html", metavar="FILE", help="a page to look at")
    add("--gin_out", metavar="FILE", help="the best way, as a file that train takes")


class Verb(NamedTuple):
    """A command: the function of the verb's name in `module`, given what `options` adds to the command line.

    Attributes:
      module: where it is; imported when the verb runs.
      help: one line.
      run_file: what it needs beside the `config.gin` of a run that is given by its folder alone.
      options: adds its own to a parser; what the user gives become the function's keyword arguments.
      on_recipe: it looks into what `train` would do: its first argument is a `recipe.Recipe` of the gin files
        and bindings, instead of what they are bound to.
    """

    module: str
    help: str
    run_file: str | None = None
    options: Options = _dry_run
    on_recipe: bool = False


VERBS = {
    "train": Verb("t5x_like.commands.train", "train a model, or go on where a run stopped"),
    "evaluate": Verb("t5x_like.commands.evaluate", "score checkpoints of a run on its tasks", "runs/evaluate.gin"),
    "plan": Verb(
        "t5x_like.commands.plan",
        "say what a training job takes of devices that need not be here, and the best way to run it",
        options=_plan,
        on_recipe=True,
    ),
    "infer": Verb("t5x_like.commands.infer", "write a model's predictions for a task or a file", "runs/infer.gin"),
}
