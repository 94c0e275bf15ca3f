"""The verbs of the command line and their options. Imports nothing heavy: `--help` reads it."""

import argparse
from collections.abc import Callable
from typing import NamedTuple

Options = Callable[[argparse.ArgumentParser], None]


def _dry_run(parser: argparse.ArgumentParser) -> None:
    help = "say what would be done, and do nothing"
    parser.add_argument("--dry_run", action="store_true", default=argparse.SUPPRESS, help=help)


def _verify(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--check", nargs="+", action="extend", default=[], metavar="NAME", help="run these checks only")
    add("--json", dest="json_file", metavar="FILE", help="also write what was found as JSON")


class Verb(NamedTuple):
    """A command: the function of the verb's name in `module`, given what `options` adds to the command line.

    Attributes:
      module: where it is; imported when the verb runs.
      help: one line.
      run_file: what it needs beside the `config.gin` of a run that is given by its folder alone.
      options: adds its own to a parser; what the user gives become the function's keyword arguments.
      on_recipe: it looks into what `train` would do: its first argument is a `commands.recipe.Recipe` of the gin files
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
    "infer": Verb("t5x_like.commands.infer", "write a model's predictions for a task or a file", "runs/infer.gin"),
    "verify": Verb("t5x_like.commands.verify", "prove a config on a small model", options=_verify, on_recipe=True),
}
