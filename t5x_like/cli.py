"""The command line: `t5x_like VERB --gin_file=... --gin.NAME=value`. Imports nothing heavy until a verb runs."""

import argparse
import contextlib
import ctypes
import gc
import inspect
import os
import pkgutil
import platform
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import t5x_like
from t5x_like.errors import RunFailed, UserError, nearest
from t5x_like.verbs import VERBS, Verb, add_hosts

QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", "GRPC_VERBOSITY": "ERROR"}
"""What keeps TensorFlow, which only reads data here, from talking about processors; the user's own settings win."""

TENSORFLOW_NOISE = re.compile(rb"WARNING: All log messages before absl|[IWE]\d{4} .*(cuda|oneDNN|computation_placer)")
"""What it says all the same while it is imported."""


def keep_freed_memory() -> None:
    """Has glibc keep what is freed, for this process: XLA on a CPU takes its buffers afresh in every step.

    Handed back and taken again, every page of them is faulted in and zeroed: measured, a seventh of a T5 small training
    step, and a quarter of a sparse layer. Does nothing where the C library is another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # From malloc.h: M_MMAP_MAX (no blocks of their own), M_TRIM_THRESHOLD (never shrink), M_ARENA_MAX (one heap,
        # which alone can hold large blocks).
        for parameter, value in ((-4, 0), (-1, -1), (-8, 1)):
            mallopt(parameter, value)


def collect_garbage_rarely() -> None:
    """Has Python look for cycles after 100,000 new objects instead of 700, for this process.

    Imports and traces make millions of objects that stay: measured, looking through them again and again takes a third
    of a T5 small training step's trace.
    """
    gc.set_threshold(100_000, 50, 100)


def compilation_cache() -> str:
    """Where compiled programs are kept from run to run, unless JAX_COMPILATION_CACHE_DIR says.

    A folder for every host: a home may be shared by processors that cannot run each other's programs.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return str(cache / "t5x_like" / "compiled" / platform.node())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the arguments; those of this process by default.

    Returns:
      The exit code: 0 done, 1 failed, 2 the user's mistake, 130 interrupted.
    """
    if argv is None:  # the process is ours
        keep_freed_memory()
        collect_garbage_rarely()
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", compilation_cache())
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    code = _outcome(list(sys.argv[1:] if argv is None else argv))
    distributed = sys.modules.get("t5x_like.distributed")
    if code and distributed:
        distributed.leave(code)
    return code


def _outcome(argv: list[str]) -> int:
    """The exit code; what went wrong is printed."""
    try:
        _run(argv)
    except SystemExit as done:  # --help, --version
        return int(done.code or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _run(argv: list[str]) -> None:
    name, options, bindings = _parse(argv)
    verb = VERBS[name]
    files = options.pop("gin_file") or _files_of_run(name, bindings)
    search_paths = [path for paths in options.pop("gin_search_paths") for path in paths.split(",") if path]
    allow_imports = options.pop("allow_import")
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    if allow_imports:
        sys.path.append(os.getcwd())  # as `python -m` does, so that a user's own modules are found either way
    others = [f"{known.module}.{other}" for other, known in VERBS.items() if not known.on_recipe]

    if verb.on_recipe:
        with _without(TENSORFLOW_NOISE):
            command = pkgutil.resolve_name(f"{verb.module}.{name}")
            from t5x_like.recipe import Recipe
        command(Recipe(files, bindings, search_paths, allow_imports, others), **options)
        return

    from t5x_like import gin_config

    with _without(TENSORFLOW_NOISE):
        config = gin_config.load(f"{verb.module}.{name}", files, bindings, search_paths, allow_imports, others)
    if verb.on_hosts:
        from t5x_like import distributed

        hosts = inspect.signature(distributed.initialize).parameters.keys() & options.keys()
        distributed.initialize(**{name: options.pop(name) for name in hosts})
    gin_config.run(config, **options)


@contextlib.contextmanager
def _without(noise: re.Pattern[bytes]) -> Iterator[None]:
    """Holds back what goes to standard error, past Python too, and then writes what is not noise."""
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            os.write(2, b"".join(line for line in held if not noise.match(line)))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _parse(argv: list[str]) -> tuple[str, dict[str, Any], list[str]]:
    """The verb, its options by name, and gin bindings without `--gin.` before them."""
    parser = _Parser(
        "t5x_like",
        description="Trains and runs T5, Switch Transformers and their relatives.",
        epilog="`t5x_like VERB --help` lists the options of a verb.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"t5x_like {t5x_like.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    parsers = {name: _add_verb(verbs, name, verb) for name, verb in VERBS.items()}

    bindings = [argument.removeprefix("--gin.") for argument in argv if argument.startswith("--gin.")]
    others = [argument for argument in argv if not argument.startswith("--gin.")]
    for binding in bindings:
        if "=" not in binding:
            raise UserError(f"--gin.{binding}: write --gin.{binding}=value, with = and no blank")
    if not others or others[0] not in {*VERBS, "-h", "--help", "--version"}:
        given = others[0] if others else ""
        raise UserError(f"{given!r} is no verb.{nearest(given, VERBS)} Say t5x_like VERB ..., with {', '.join(VERBS)}")
    options, unknown = parser.parse_known_args(others)
    if unknown:
        known = [option for action in parsers[options.verb]._actions for option in action.option_strings]
        name = unknown[0].partition("=")[0]
        raise UserError(f"{options.verb} does not know {name!r}.{nearest(name, [*known, '--gin.NAME'])}")
    by_name = vars(options)
    return by_name.pop("verb"), by_name, bindings


def _add_verb(verbs: "argparse._SubParsersAction[_Parser]", name: str, verb: Verb) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name,
        help=verb.help,
        description=f"{verb.help[0].upper()}{verb.help[1:]}.",
        usage=f"t5x_like {name} --gin_file=FILE ... [--gin.NAME=value ...] [options]",
        epilog="--gin.MODEL_DIR=FOLDER of a finished run is enough: its config.gin then says the rest.",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("configuration").add_argument
    add("--gin_file", action="append", default=[], metavar="FILE", help="repeatable; later files override earlier")
    add(
        "--gin.NAME",
        default=argparse.SUPPRESS,
        metavar="VALUE",
        help="a macro (--gin.TRAIN_STEPS=1000) or a parameter (--gin.trainer.Trainer.seed=3); text needs no quotes",
    )
    add("--gin_search_paths", action="append", default=[], metavar="FOLDERS", help="repeatable, or with commas")
    add("--allow_import", action="append", default=[], metavar="PACKAGE", help="one more that gin files may import")
    verb.options(parser)
    if verb.on_hosts:
        add_hosts(parser)
    return parser


def _files_of_run(verb: str, bindings: Sequence[str]) -> list[str]:
    """The gin files of a run of which only the folder is given."""
    settings = dict(binding.split("=", 1) for binding in bindings)
    folder = settings.get("MODEL_DIR", "").strip("'\"")
    if not folder:
        raise UserError("no configuration: give --gin_file=FILE, or --gin.MODEL_DIR=FOLDER of a run to go on with")
    config = Path(folder) / "config.gin"
    if not config.is_file():
        raise UserError(f"--gin.MODEL_DIR={folder}: there is no {config}, so give --gin_file=FILE")
    run_file = VERBS[verb].run_file
    return [*([run_file] if run_file else []), str(config)]
