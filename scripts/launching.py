"""What the launch scripts share: the command behind `--`, what is printed, running it, and starting again.

Only the standard library: a login node or a workstation needs no JAX to launch.
"""

import argparse
import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

FINAL = (0, 2, 130)
"""Exit codes of `t5x_like` that another start would only repeat: done, the user's mistake, Ctrl-C."""

LONGEST_PAUSE = 300
"""Seconds."""


@dataclasses.dataclass(frozen=True)
class Restarts:
    """How often to start again, and how long to wait before: twice as long each time, at most `LONGEST_PAUSE`.

    Attributes:
      most: starts after the first one.
      pause: seconds before the first of them.
    """

    most: int
    pause: int

    def seconds(self, restart: int) -> int:
        """To wait before restart number `restart`, counted from 0."""
        return min(self.pause * 2**restart, LONGEST_PAUSE)

    def __str__(self) -> str:
        return f"at most {self.most} times, after {self.pause}, {self.seconds(1)}, {self.seconds(2)} ... seconds"


def until_final(attempt: Callable[[], int], restarts: Restarts) -> int:
    """Calls `attempt` until its exit code is one of `FINAL` or there are no restarts left; gives the last code."""
    try:
        for restart in range(restarts.most):
            code = attempt()
            if code in FINAL:
                return code
            pause = restarts.seconds(restart)
            say(f"ended with exit code {code}; restart {restart + 1} of {restarts.most} in {pause} s")
            time.sleep(pause)
        code = attempt()
    except KeyboardInterrupt:
        say("interrupted; the same command goes on")
        return 130
    if code not in FINAL:
        say(f"ended with exit code {code}, and no restart is left; the same command goes on from the last checkpoint")
    return code


def say(message: str) -> None:
    """To standard error, so that standard output holds commands alone."""
    print(f"launch: {message}", file=sys.stderr, flush=True)


def shell(words: Sequence[str]) -> str:
    """A command as a shell takes it, each option on a line of its own."""
    return "".join((" \\\n    " if word.startswith("-") else " ") + shlex.quote(word) for word in words).lstrip()


def run(words: Sequence[str], stdin: str | None = None) -> int:
    """Prints a command, runs it, and gives its exit code; 128 + the signal where one ended it."""
    print(f"$ {shell(words)}", flush=True)
    code = subprocess.run(words, input=stdin, text=True, check=False).returncode
    return code if code >= 0 else 128 - code


def positive(text: str) -> int:
    """An argparse type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


class Launcher:
    """The command line of a launch script: its own options, then `--` and a `t5x_like` command.

    Args:
      doc: the script's docstring, which `--help` shows.
    """

    def __init__(self, doc: str) -> None:
        self.parser = argparse.ArgumentParser(
            usage="%(prog)s [options] -- VERB [arguments of t5x_like]",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add = self.parser.add_argument
        add("--dry_run", action="store_true", help="print exactly what would be run, and run nothing")
        add("--max_restarts", type=int, default=20, metavar="N", help="starts after the first one (default: 20)")
        add(
            "--program",
            default="t5x_like",
            metavar="PATH",
            help="how the machines call t5x_like, such as /shared/venv/bin/t5x_like (default: t5x_like)",
        )

    def parse(self, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
        """The options, and the command with its program. Ends the process with code 2 on a user's mistake."""
        argv = list(sys.argv[1:] if argv is None else argv)
        own, command = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
        options = self.parser.parse_args(own)
        if not command or command[0].startswith("-"):
            self.parser.error("what to run is missing: end with -- VERB ..., such as -- train --gin_file=...")
        if options.max_restarts < 0:
            self.parser.error(f"--max_restarts={options.max_restarts}: give 0 or more")
        for name in getattr(options, "env", []):
            if "=" in name:
                self.parser.error(f"--env={name.partition('=')[0]}=...: give the name alone; this shell has the value")
            if name not in os.environ:
                self.parser.error(f"--env={name}: this shell has no such variable; export it first")
        for argument in command:
            name, _, folder = argument.partition("=")
            folder = folder.strip("'\"")
            if name == "--gin.MODEL_DIR" and not PurePosixPath(folder).is_absolute():
                self.parser.error(
                    f"{argument}: every machine, also one after a restart, must find the run's folder there; give the "
                    "absolute path of a shared folder (a bucket has to be mounted)"
                )
        return options, [options.program, *command]

    def add_env(self) -> None:
        """Adds --env to the options; `parse` checks it."""
        self.parser.add_argument(
            "--env",
            action="append",
            default=[],
            metavar="NAME",
            help="repeatable: a variable that the machines get from this shell; its value is never printed",
        )

    def need(self, program: str, source: str) -> None:
        """Ends the process with code 2 where a program is missing; `source` says how to get it."""
        if shutil.which(program) is None:
            self.parser.error(f"{program!r} is not on PATH: {source}. --dry_run does without")
