"""Differences that were planted in what two runs left, and what the comparison says of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from t5x_like.rehearsal import comparison
from t5x_like.rehearsal.job import Outcome, Seen
from t5x_like.rehearsal.worker import digests

BATCHES = {1: {0: 10, 1: 11, 2: 12, 3: 13}, 2: {0: 20, 1: 21, 2: 22, 3: 23}, 3: {0: 30, 1: 31, 2: 32, 3: 33}}
"""Step -> row -> digest, of a run of three steps."""


def seen(steps: list[int], rows: list[int]) -> Seen:
    return Seen({step: {row: BATCHES[step][row] for row in rows} for step in steps}, None)


def run(folder: Path, attempts: list[list[Seen]], losses: dict[int, float]) -> Outcome:
    (folder / "metrics").mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"step": step, "loss": loss, "accuracy": 0.5, "seconds_per_step": loss})
        for step, loss in losses.items()
    ]
    (folder / "metrics" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return Outcome(folder, attempts, None)


@pytest.fixture
def alone(tmp_path: Path) -> Outcome:
    return run(tmp_path / "alone", [[seen([1, 2, 3], [0, 1, 2, 3])]], {1: 4.0, 2: 2.0, 3: 1.0})


def test_a_restarted_run_of_two_processes_saw_the_same(alone: Outcome, tmp_path: Path) -> None:
    """The second attempt does step 2 again, with one process that feeds all and another that feeds the same."""
    first = [seen([1, 2], [0, 1]), seen([1, 2], [2, 3])]
    second = [seen([2, 3], [0, 1, 2, 3]), seen([2, 3], [0, 1, 2, 3])]
    outcome = run(tmp_path / "run", [first, second], {})
    assert comparison.orders(outcome, alone) is None
    assert outcome.steps_lost() == 1


def test_a_process_that_was_lost_in_a_step_need_not_have_noted_it(alone: Outcome, tmp_path: Path) -> None:
    first = [seen([1, 2], [0, 1]), seen([1], [2, 3])]
    second = [seen([2, 3], [0, 1]), seen([2, 3], [2, 3])]
    assert comparison.orders(run(tmp_path / "run", [first, second], {}), alone) is None


@pytest.mark.parametrize(
    ("attempts", "step", "what"),
    [
        ([[Seen(BATCHES | {2: BATCHES[2] | {3: 99}}, None)]], 2, "row 3 of the batch is another (attempt 1)"),
        ([[Seen(BATCHES | {3: {0: 31, 1: 30, 2: 32, 3: 33}}, None)]], 3, "row 0 of the batch is another (attempt 1)"),
        ([[seen([1, 2, 3], [0, 1]), seen([1, 2, 3], [1, 2])]], 1, "nobody fed all 4 rows (attempt 1)"),
        ([[seen([1], [0, 1, 2, 3])], [seen([3], [0, 1, 2, 3])]], 2, "it was never done"),
        (
            [[seen([1, 2], [0, 1, 2, 3])], [Seen({2: BATCHES[3], 3: BATCHES[3]}, None)]],
            2,
            "row 0 of the batch is another (attempt 2)",
        ),
    ],
)
def test_another_order_is_found(
    alone: Outcome, tmp_path: Path, attempts: list[list[Seen]], step: int, what: str
) -> None:
    assert comparison.orders(run(tmp_path / "run", attempts, {}), alone) == (step, what)


def test_losses_may_differ_by_the_order_of_sums_and_no_more(alone: Outcome, tmp_path: Path) -> None:
    near = run(tmp_path / "near", [], {1: 4.0, 2: 2.0 * (1 + 9e-6), 3: 1.0})
    curve = comparison.curves(near, alone, bitwise=False)
    assert curve.difference is None
    assert curve.largest == pytest.approx(9e-6, rel=1e-6)
    far = run(tmp_path / "far", [], {1: 4.0, 2: 2.0 * (1 + 2e-5), 3: 9.0})
    difference = comparison.curves(far, alone, bitwise=False).difference
    assert difference == (2, f"loss {2.0 * (1 + 2e-5)} instead of 2.0")


@pytest.mark.parametrize("losses", [{1: 4.0, 3: 1.0}, {1: 4.0, 2: float("nan"), 3: 1.0}])
def test_a_step_without_a_loss_is_a_difference(alone: Outcome, tmp_path: Path, losses: dict[int, float]) -> None:
    text = json.dumps(losses).replace("NaN", "null")
    outcome = run(tmp_path / "run", [], {int(step): loss for step, loss in json.loads(text).items()})
    assert comparison.curves(outcome, alone, bitwise=False).difference[0] == 2


def test_bitwise_is_bitwise(alone: Outcome, tmp_path: Path) -> None:
    """What is said of the machine does not count; anything else does, in its last place."""
    other = run(tmp_path / "run", [], {1: 4.0, 2: np.nextafter(2.0, 3.0), 3: 1.0})
    difference = comparison.curves(other, alone, bitwise=True).difference
    assert difference == (2, "loss 2.0000000000000004 instead of 2.0")


def test_a_digest_is_of_a_row_and_of_every_feature() -> None:
    batch = {"inputs": np.arange(6, dtype=np.int32).reshape(2, 3), "targets": np.zeros((2, 1), np.int32)}
    first, second = digests(batch)
    assert first != second
    batch["targets"][1] = 1
    assert digests(batch)[0] == first
    assert digests(batch)[1] != second
