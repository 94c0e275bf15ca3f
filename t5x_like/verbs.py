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


def _rehearse(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--processes", type=int, default=argparse.SUPPRESS, metavar="N", help="of the job; 4 unless given")
    help = "virtual CPU devices of each; 2 unless given"
    add("--devices_per_process", type=int, default=argparse.SUPPRESS, metavar="N", help=help)
    help = (
        "kill, term, freeze, slow @STEP[:PROCESS], or resize=PROCESSES@STEP; repeatable; one of every kind unless given"
    )
    add("--fault", action="append", default=argparse.SUPPRESS, metavar="FAULT", help=help)
    help = "silence after which a process counts as dead; 20 unless given"
    add("--patience", type=int, default=argparse.SUPPRESS, metavar="S", help=help)
    help = "an empty one, for runs and logs; otherwise a temporary one, which stays only where something differs"
    add("--folder", default=argparse.SUPPRESS, metavar="FOLDER", help=help)
    add("--json", default=argparse.SUPPRESS, metavar="FILE", help="for the findings")


def add_hosts(parser: argparse.ArgumentParser) -> None:
    """Adds the options that make a command one process of several; `distributed.initialize` takes them by name."""
    add = parser.add_argument_group(
        "one job on several hosts",
        "On a TPU pod, GKE, SLURM and Open MPI they are found, and on Ray set, by themselves.",
    ).add_argument
    add("--coordinator", default=argparse.SUPPRESS, metavar="HOST:PORT", help="where process 0 listens")
    add("--num_processes", default=argparse.SUPPRESS, type=int, metavar="N", help="of the whole job")
    add("--process_id", default=argparse.SUPPRESS, type=int, metavar="I", help="which of them this is, from 0")
    help = "to wait for the others; 300 unless given"
    add("--connect_seconds", default=argparse.SUPPRESS, type=int, metavar="S", help=help)
    help = "silence after which a process counts as dead and the job ends; 100 unless given"
    add("--heartbeat_seconds", default=argparse.SUPPRESS, type=int, metavar="S", help=help)


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
      on_recipe: it looks into what `train` would do: its first argument is a `recipe.Recipe` of the gin files
        and bindings, instead of what they are bound to.
      on_hosts: it may be one process of several.
    """

    module: str
    help: str
    run_file: str | None = None
    options: Options = _dry_run
    on_recipe: bool = False
    on_hosts: bool = False


VERBS = {
    "train": Verb("t5x_like.commands.train", "train a model, or go on where a run stopped", on_hosts=True),
    "evaluate": Verb(
        "t5x_like.commands.evaluate", "score checkpoints of a run on its tasks", "runs/evaluate.gin", on_hosts=True
    ),
    "infer": Verb(
        "t5x_like.commands.infer", "write a model's predictions for a task or a file", "runs/infer.gin", on_hosts=True
    ),
    "plan": Verb(
        "t5x_like.commands.plan",
        "say what a training job takes of devices that need not be here, and the best way to run it",
        options=_plan,
        on_recipe=True,
    ),
    "verify": Verb("t5x_like.commands.verify", "prove a config on a small model", options=_verify, on_recipe=True),
    "rehearse": Verb(
        "t5x_like.commands.rehearse",
        "train with several processes on this machine, with faults, and compare with one process",
        options=_rehearse,
        on_recipe=True,
    ),
}
