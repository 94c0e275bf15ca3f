"""What `--all` runs, what it is to reach, and the table that says whether it did."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.peers import Line


class Entry(NamedTuple):
    """How a case runs in `--all`.

    Attributes:
      dtypes: of its matrix products, in turn.
      steps: timed in each turn: all cases together are to take less than 20 minutes on 2 cores.
      peer_case: the same work, by the peer's name.
    """

    dtypes: tuple[str, ...]
    steps: int
    peer_case: str | None = None


FLOAT32 = ("float32",)

SUITE = {
    "train_t5_small": Entry(("float32", "bfloat16"), 3, "t5_train_adafactor"),
    "decode_greedy": Entry(FLOAT32, 2, "t5_greedy"),
    "decode_beam4": Entry(FLOAT32, 2, "t5_beam4"),
    "train_gpt2_124m": Entry(FLOAT32, 2, "gpt2_train"),
    "train_bert_base": Entry(FLOAT32, 4, "bert_train"),
    "train_switch": Entry(FLOAT32, 8, "switch_train"),
    "input_pipeline": Entry(FLOAT32, 3),
    "startup": Entry(FLOAT32, 1),
    "init": Entry(FLOAT32, 3),
    "checkpoint": Entry(FLOAT32, 3),
}

GROWTH = {f"growth_{along}": Entry(FLOAT32, 3) for along in ("length", "batch", "layers", "experts")} | {
    "growth_chips": Entry(("bfloat16",), 1)
}
"""What `--growth` runs."""


class Target(NamedTuple):
    """What a figure is to reach.

    Attributes:
      case: whose it is.
      figure: its key in the line of the case; `ratio` is ours over the peer's.
      bound: at most this, or at least.
      unit: of both.
      dtype: of our matrix products.
      at_least: whether more is better.
    """

    case: str
    figure: str
    bound: float
    unit: str = ""
    dtype: str = "float32"
    at_least: bool = False

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:g} {self.unit}".rstrip()

    def met_by(self, value: float) -> bool:
        """Whether a figure is good enough."""
        return value >= self.bound if self.at_least else value <= self.bound


TARGETS = (
    Target("train_t5_small", "ratio", 0.65),
    Target("train_t5_small", "ratio", 0.45, dtype="bfloat16"),
    Target("train_t5_small", "peak_memory_gib", 4.46, "GiB"),  # 0.7 of the 6.85 GB that T5X takes
    Target("decode_greedy", "ratio", 2.0, at_least=True),
    Target("decode_beam4", "ratio", 2.0, at_least=True),
    Target("train_gpt2_124m", "ratio", 0.8),
    Target("train_bert_base", "ratio", 0.8),
    Target("train_switch", "ratio", 0.8),
    Target("input_pipeline", "ratio_to_step", 5.0, at_least=True),
    Target("startup", "seconds", 15.0, "s"),
    Target("init", "seconds", 3.0, "s"),
    Target("checkpoint", "save_blocks_seconds", 0.3, "s"),
    Target("checkpoint", "restore_seconds", 2.0, "s"),
)


def table(lines: Sequence[Line]) -> str:
    """The figures beside their targets in Markdown, below the date, the machine and the versions."""
    by_case = {(line["case"], line["dtype"]): line for line in lines}
    step, read = (
        _turn(by_case.get((case, "float32"), {})).get("tokens_per_second")
        for case in ("train_t5_small", "input_pipeline")
    )
    if step and read:  # how many times faster tokens are read than a training step takes them
        by_case["input_pipeline", "float32"] |= {"ratio_to_step": round(float(str(read)) / float(str(step)), 1)}
    rows = [_row(target, by_case.get((target.case, target.dtype), {})) for target in TARGETS]
    head = ("case", "ours", "peer", "ratio", "target", "met?")
    return "\n".join([_origin(lines), "", *("| " + " | ".join(row) + " |" for row in (head, ("---",) * 6, *rows))])


def _row(target: Target, line: Line) -> tuple[str, ...]:
    value = line.get(target.figure, _turn(line).get(target.figure))
    met = "not measured" if value is None else "yes" if target.met_by(float(str(value))) else "no"
    if target.figure == "ratio":
        name, cells = f"`{target.case}` {target.dtype}", (*_medians(line), _shown(value))
    else:
        name, cells = f"`{target.case}` {target.figure}", (_shown(value, target.unit), "", "")
    return name, *cells, str(target), met


def _medians(line: Line) -> tuple[str, str]:
    """Ours and the peer's, where they were compared."""
    for key, unit in (("tokens_per_second", "tokens/s"), ("median", "s")):
        if f"our_{key}" in line:
            return _shown(line[f"our_{key}"], unit), _shown(line[f"peer_{key}"], unit)
    return "", ""


def _shown(value: object, unit: str = "") -> str:
    return "" if value is None else f"{value} {unit}".rstrip()


def _turn(line: Line, whose: str = "ours") -> Mapping[str, object]:
    """The last turn of a comparison; a line of ours alone is itself one."""
    turn = line.get(whose, line)
    assert isinstance(turn, Mapping)
    return turn


def _origin(lines: Sequence[Line]) -> str:
    versions: dict[str, object] = {}
    for line in lines:
        ours, peer = _turn(line).get("versions"), _turn(line, "peer")
        versions |= ours if isinstance(ours, Mapping) else {}
        versions |= {name: peer[name] for name in ("torch", "transformers") if name in peer}
    devices = sorted({str(line["device"]) for line in lines})
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{time.strftime('%Y-%m-%d')}, {' and '.join(devices)}, {os.cpu_count()} cores; {named}."
