"""A peer beside us: both run in turns, each turn a process of its own, so that neither disturbs the other."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from t5x_like.cli import compilation_cache
from t5x_like.errors import RunFailed, UserError

BENCHMARK = Path(__file__).parent.parent / "benchmark.py"

Line = dict[str, object]
"""What a process measured."""


class Peer(NamedTuple):
    """A script that, given `--case NAME --steps N --warmup 1 --dtype float32 --threads CORES`, times N such steps.

    What it prints ends with a line of JSON, in which `times` are the seconds of the timed steps.

    Attributes:
      path: the script.
      python: what runs it.
    """

    path: Path
    python: str

    def check(self) -> None:
        """Raises `UserError` where there is no such script."""
        if not self.path.is_file():
            raise UserError(f"--peer={self.path}: there is no such file; give the path of the peer's script")

    def turn(self, case: str, steps: int) -> Line:
        """Times a case of the peer's."""
        options = {"case": case, "steps": steps, "warmup": 1, "dtype": "float32", "threads": os.cpu_count()}
        line = _last_line([self.python, str(self.path), *_arguments(options)], os.environ)
        if not isinstance(line.get("times"), list):
            raise UserError(f"--peer={self.path}: its last line lacks `times`, a list of seconds, for the case {case}")
        return line


def our_turn(case: str, dtype: str, steps: int, cached: bool) -> Line:
    """Runs a case in a process of its own; `cached` keeps what is compiled, so that only the first turn compiles."""
    environment = {**({"JAX_COMPILATION_CACHE_DIR": compilation_cache()} if cached else {}), **os.environ}
    options = {"case": case, "dtype": dtype, "steps": steps}
    return _last_line([sys.executable, str(BENCHMARK), *_arguments(options)], environment)


def compare(case: str, dtypes: Sequence[str], peer: Peer, peer_case: str, rounds: int, steps: int) -> Iterator[Line]:
    """Runs a case in each of some dtypes and the peer's, which is float32, in turn; a line for each dtype.

    `ratio` is ours over theirs: of seconds, or of tokens per second where the case is decoding.

    Args:
      case: ours.
      dtypes: of our matrix products.
      peer: the script.
      peer_case: the same work, by the peer's name.
      rounds: turns of each.
      steps: timed steps in a turn.
    """
    turns: dict[str, list[Line]] = {dtype: [] for dtype in dtypes}
    peer_turns = []
    for number in range(1, rounds + 1):
        for dtype in dtypes:
            print(f"round {number} of {rounds}: {case} {dtype}", file=sys.stderr, flush=True)
            turns[dtype].append(our_turn(case, dtype, steps, cached=True))
        print(f"round {number} of {rounds}: peer", file=sys.stderr, flush=True)
        peer_turns.append(peer.turn(peer_case, steps))
    peer_seconds = _together(peer_turns, "times")
    theirs = statistics.median(peer_seconds)
    for dtype in dtypes:
        seconds, last = _together(turns[dtype], "seconds"), turns[dtype][-1]
        ours = statistics.median(seconds)
        line: Line = {"case": case, "dtype": dtype, "device": last["device"], "rounds": rounds, "steps": steps}
        line |= {"our_median": round(ours, 4), "peer_median": round(theirs, 4)}
        tokens = last.get("tokens_per_batch")
        if isinstance(tokens, int):
            line |= {
                "our_tokens_per_second": round(tokens / ours, 1),
                "peer_tokens_per_second": round(tokens / theirs, 1),
            }
        line["ratio"] = round(theirs / ours if "our_tokens_per_second" in line else ours / theirs, 3)
        yield line | {"our_seconds": seconds, "peer_seconds": peer_seconds, "ours": last, "peer": peer_turns[-1]}


def _together(turns: Sequence[Line], key: str) -> list[float]:
    return [round(float(each), 4) for turn in turns for each in turn[key]]  # type: ignore[attr-defined]


def _arguments(options: Mapping[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


def _last_line(command: Sequence[str], environment: Mapping[str, str]) -> Line:
    """Runs a command; the last line that it prints, which is JSON."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"{command[0]}: {error.strerror}; --peer_python takes the path of a Python") from error
    if done.returncode:
        said = "\n".join(done.stderr.splitlines()[-15:])
        raise RunFailed(f"{' '.join(command)} ended with exit code {done.returncode}:\n{said}")
    try:
        line = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        line = None
    if not isinstance(line, dict):
        raise UserError(f"{' '.join(command)} must end with a line of JSON; it printed {done.stdout[-300:]!r}")
    return line
