"""Two runs of one recipe, compared: what was computed, and which examples it was computed from."""

import math
from typing import NamedTuple

from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.rehearsal.job import Outcome
from t5x_like.training.run_log import read_jsonl

CLOSE = 1e-5
"""Relative difference of losses, where sums go round another number of processes: float32 does not add in any order."""

_MACHINE = ("second", "share", "memory")


class Difference(NamedTuple):
    """The first one between two runs.

    Attributes:
      step: at which.
      what: in words.
    """

    step: int
    what: str


class Curves(NamedTuple):
    """How two loss curves compare.

    Attributes:
      largest: relative difference of the losses of a step.
      difference: the first that is too large.
    """

    largest: float
    difference: Difference | None


def curves(run: Outcome, reference: Outcome, bitwise: bool) -> Curves:
    """Compares the rows of `metrics.jsonl`.

    Args:
      run: one.
      reference: the other.
      bitwise: every figure that is not about the machine must be the same, and so must the last checkpoint; otherwise
        the losses are compared, within `CLOSE`.
    """
    ours, theirs = (dict(read_jsonl(each.folder / "metrics" / "metrics.jsonl")) for each in (run, reference))
    largest, first = 0.0, None
    for step in sorted({*ours, *theirs}):
        mine, other = _figures(ours.get(step, {})), _figures(theirs.get(step, {}))
        a, b = mine.get("loss"), other.get("loss")
        apart = abs(a - b) / abs(b) if a is not None and b else (0.0 if a == b else math.inf)
        largest = max(largest, apart)
        names = sorted(name for name in {*mine, *other} if mine.get(name) != other.get(name))
        if first is None and (names if bitwise else apart > CLOSE):
            values = ", ".join(
                f"{name} {mine.get(name)} instead of {other.get(name)}" for name in (names or ["loss"])[:3]
            )
            first = Difference(step, values)
    if first is None and bitwise:
        first = _states(run, reference)
    return Curves(largest, first)


def orders(run: Outcome, reference: Outcome) -> Difference | None:
    """The first step, in any attempt, that did not see the very examples of the reference, row by row."""
    expected = {step: rows for seen in reference.attempts[0] for step, rows in seen.rows.items()}
    for number, attempt in enumerate(run.attempts):
        for step in sorted({step for seen in attempt for step in seen.rows}):
            fed: dict[int, int] = {}
            for seen in attempt:
                for row, digest in seen.rows.get(step, {}).items():
                    if expected[step].get(row) != fed.setdefault(row, digest) or fed[row] != digest:
                        return Difference(step, f"row {row} of the batch is another (attempt {number + 1})")
            # A process that was lost in this step may not have noted it down.
            if len(fed) < len(expected[step]) and all(step in seen.rows for seen in attempt):
                return Difference(step, f"nobody fed all {len(expected[step])} rows (attempt {number + 1})")
    missing = set(expected) - {step for attempt in run.attempts for seen in attempt for step in seen.rows}
    return Difference(min(missing), "it was never done") if missing else None


def _figures(row: dict[str, float | None]) -> dict[str, float | None]:
    return {name: value for name, value in row.items() if not any(word in name for word in _MACHINE)}


def _states(run: Outcome, reference: Outcome) -> Difference | None:
    """Parameters and optimiser state after the last step."""
    digests = []
    for each in (run, reference):
        with Checkpoints(each.folder / "checkpoints") as checkpoints:
            step = checkpoints.steps()[-1]
            digests.append((step, checkpoints.saved_digests(step)))
    (step, ours), (other_step, theirs) = digests
    if step != other_step:
        return Difference(min(step, other_step), f"the last checkpoint is of step {step} instead of {other_step}")
    names = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    return Difference(step, f"{names[0]} of the checkpoint is another") if names else None
