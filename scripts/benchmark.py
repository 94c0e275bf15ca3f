#!/usr/bin/env python3
"""Measures this machine: `scripts/benchmark.py --case NAME` prints one JSON line.

Keys: case, dtype, device, peak_memory_gib, versions, and what the case knows: seconds per step or of each rival
(medians), the ratio that counts, matmul_peak_gflops measured in the same process and dtype. `--compare` runs a case and
a peer's in turns; `--all` does so with every case that has a target, and ends with a table; `--growth` measures how
cost grows with the work, and draws it.
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
from benchmarks import decode, growth, layers, peers, start, steps, suite

import t5x_like
from t5x_like.cli import collect_garbage_rarely, compilation_cache, keep_freed_memory
from t5x_like.decoding.beam import BeamSearch
from t5x_like.decoding.greedy import Greedy
from t5x_like.errors import RunFailed, UserError
from t5x_like.training.trainer import peak_memory_gib

CASES: dict[str, Callable[..., dict[str, object]]] = {
    "train_t5_small": functools.partial(steps.train, steps.T5_SMALL),
    "train_gpt2_124m": functools.partial(steps.train, steps.GPT2_124M),
    "train_bert_base": functools.partial(steps.train, steps.BERT_BASE),
    "train_switch": functools.partial(steps.train, steps.SWITCH),
    "decode_greedy": functools.partial(decode.decode, Greedy()),
    "decode_beam4": functools.partial(decode.decode, BeamSearch(4)),
    "input_pipeline": start.input_pipeline,
    "startup": start.startup,
    "init": start.init,
    "checkpoint": start.checkpoint,
    "switch_layer": layers.switch_layer,
    "switch_flops": layers.switch_flops,
    "attention": layers.attention,
    "sliding_attention": functools.partial(layers.attention, sliding=True),
    "growth_length": functools.partial(growth.here, growth.LENGTH),
    "growth_batch": functools.partial(growth.here, growth.BATCH),
    "growth_layers": functools.partial(growth.here, growth.LAYERS),
    "growth_experts": functools.partial(growth.here, growth.EXPERTS),
    "growth_chips": growth.chips,
}


class Option(NamedTuple):
    """What some cases take besides.

    Attributes:
      default: None leaves it out.
      cases: which.
      help: what it means.
    """

    default: int | str | None
    cases: tuple[str, ...]
    help: str

    @property
    def kind(self) -> type:
        """What its values are."""
        return int if isinstance(self.default, int) else str


OPTIONS = {
    "experts": Option(8, ("switch_layer", "switch_flops"), "experts of the layer"),
    "length": Option(2048, ("attention", "sliding_attention"), "tokens in the sequence"),
    "topology": Option(
        None,
        tuple(name for name in CASES if name.startswith("train_")),
        "also compile the step for a chip of these TPUs, such as v5e:2x2, and report its temporary memory there "
        "(bfloat16; no TPU is needed, but the extra `tpu` is)",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the arguments say.

    Returns:
      The exit code: 0 done, 1 something failed to run or is not as flat as theory says, 2 the user's mistake.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        options = _options(parser, arguments)
        if arguments.all:
            lines, failed = _run(suite.SUITE, arguments.peer and _peer(arguments), arguments.rounds)
            print(suite.table(lines))
            return int(failed)
        if arguments.growth:
            if arguments.plot:
                growth.check_plot(arguments.plot)
            lines, failed = _run(suite.GROWTH)
            print(growth.table(lines))
            if arguments.plot:
                growth.draw(lines, arguments.plot)
            return int(failed or not growth.is_flat(lines))
        if arguments.compare:
            for line in _compared(parser, arguments):
                print(json.dumps(line), flush=True)
            return 0
        if argv is None:
            keep_freed_memory()  # both as the command line does
            collect_garbage_rarely()
        print(json.dumps(run_case(arguments.case, arguments.dtype, arguments.steps or 5, options)))
    except (UserError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


def run_case(case: str, dtype: str, steps: int, options: dict[str, int | str]) -> peers.Line:
    """Runs a case in this process."""
    result = CASES[case](dtype, steps, **options)
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    versions |= {"t5x_like": t5x_like.__version__, "python": sys.version.split()[0]}
    facts = {"case": case, "dtype": dtype, "device": jax.devices()[0].device_kind}
    return facts | {"peak_memory_gib": round(peak_memory_gib(), 2)} | result | {"versions": versions}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measures this machine; prints one JSON line for each case.",
        epilog="A peer is a script that times the same work by other means: see `Peer` in scripts/benchmarks/peers.py.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    one = f"run one, in this process: {', '.join(CASES)}"
    what.add_argument("--case", choices=sorted(CASES), metavar="NAME", help=one)
    what.add_argument(
        "--all",
        action="store_true",
        help="run every case that has a target, beside the peer's where --peer is given and has one, each turn in a "
        "process of its own; ends with a table in Markdown",
    )
    what.add_argument(
        "--growth",
        action="store_true",
        help="run the cases growth_*, each in a process of its own: how tokens per second and memory grow with work "
        "here, and what chips of a TPU take when there are more of them; ends with tables in Markdown",
    )
    parser.add_argument("--plot", type=Path, metavar="PATH", help="of --growth: also draw it, as .svg or .png")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matrix products")
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="timed steps of a case (default: 5), or of each turn (default: as with --all)",
    )
    for name, option in OPTIONS.items():
        default = f" (default: {option.default})" if option.default is not None else ""
        help_ = f"{option.help}{default}; of {', '.join(option.cases)}"
        parser.add_argument(f"--{name}", type=option.kind, metavar="VALUE", help=help_)
    beside = parser.add_argument_group("beside a peer")
    beside.add_argument(
        "--compare",
        action="store_true",
        help="run the case and the peer's in turns, each in a process of its own: one line with all seconds, both "
        "medians, and `ratio`, ours over theirs (of tokens per second in decoding); the peer's products are float32. "
        f"What ours compile is kept in {compilation_cache()}",
    )
    beside.add_argument("--peer", type=Path, metavar="PATH", help="the peer's script")
    beside.add_argument("--peer_python", default=sys.executable, metavar="PATH", help="what runs it (default: this)")
    beside.add_argument("--rounds", type=int, default=2, metavar="N", help="turns of each (default: 2)")
    return parser


def _options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> dict[str, int | str]:
    """The options of the case; ends the process where the arguments do not fit each other."""
    options = {}
    many = "--all" if arguments.all else "--growth" if arguments.growth else None
    if many and (arguments.steps is not None or arguments.compare):
        parser.error(f"{many} has its own --steps, and --all compares by itself where --peer is given")
    if arguments.plot and not arguments.growth:
        parser.error("--plot belongs to --growth")
    for name, option in OPTIONS.items():
        given = getattr(arguments, name)
        if given is not None and arguments.case not in option.cases:
            parser.error(f"--{name} means nothing to {arguments.case or many}")
        if given is not None and arguments.compare:
            parser.error(f"--{name} means nothing to --compare")
        if arguments.case in option.cases and (given is not None or option.default is not None):
            options[name] = option.default if given is None else given
    counts = [arguments.rounds, *([] if arguments.steps is None else [arguments.steps])]
    if min([*counts, *(value for value in options.values() if isinstance(value, int))]) < 1:
        parser.error("--steps and what else is counted must be at least 1")
    return options


def _peer(arguments: argparse.Namespace) -> peers.Peer:
    if arguments.peer is None:
        raise UserError("--compare needs --peer=PATH, the script to compare with")
    peer = peers.Peer(arguments.peer, arguments.peer_python)
    peer.check()
    return peer


def _compared(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Iterator[peers.Line]:
    entry = suite.SUITE.get(arguments.case)
    if entry is None or entry.peer_case is None:
        known = ", ".join(name for name, entry in suite.SUITE.items() if entry.peer_case)
        parser.error(f"no peer has a case like {arguments.case}; --compare knows {known}")
    number = arguments.steps or entry.steps
    return peers.compare(arguments.case, [arguments.dtype], _peer(arguments), entry.peer_case, arguments.rounds, number)


def _run(
    cases: Mapping[str, suite.Entry], peer: peers.Peer | None = None, rounds: int = 1
) -> tuple[list[peers.Line], bool]:
    """The lines of all cases, and whether one failed; what fails is said, and does not keep the others from running."""
    lines, failed = [], False
    for case, entry in cases.items():
        try:
            if peer and entry.peer_case:
                found = list(peers.compare(case, entry.dtypes, peer, entry.peer_case, rounds, entry.steps))
            else:
                print(case, file=sys.stderr, flush=True)
                found = [peers.our_turn(case, dtype, entry.steps, cached=False) for dtype in entry.dtypes]
        except RunFailed as error:
            print(f"error: {case}: {error}", file=sys.stderr)
            failed = True
            continue
        for line in found:
            print(json.dumps(line), flush=True)
        lines += found
    return lines, failed


if __name__ == "__main__":
    sys.exit(main())
