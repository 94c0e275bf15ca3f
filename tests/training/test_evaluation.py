import pytest

from t5x_like.errors import UserError
from t5x_like.training.evaluation import EarlyStopping


def history(*values: float) -> dict[int, dict[str, float]]:
    return {10 * (i + 1): {"task/bleu": value} for i, value in enumerate(values)}


@pytest.mark.parametrize(
    ("values", "stops"),
    [
        ((1.0,), False),
        ((1.0, 0.9), False),
        ((1.0, 0.9, 0.8), True),
        ((1.0, 0.9, 1.1), False),
        ((1.0, 0.9, 1.1, 1.1, 1.0), True),
        ((1.0, 2.0, 3.0, 4.0), False),
    ],
)
def test_patience_counts_evaluations_that_did_not_beat_the_best(values: tuple[float, ...], stops: bool) -> None:
    assert EarlyStopping("task/bleu", patience=2).should_stop(history(*values)) == stops


def test_mode_min_and_min_delta() -> None:
    assert not EarlyStopping("task/bleu", patience=1, mode="min").should_stop(history(3.0, 2.0))
    assert EarlyStopping("task/bleu", patience=1, mode="min", min_delta=1.5).should_stop(history(3.0, 2.0))


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(UserError, match=r"'task/blue' is not reported; these are: task/bleu"):
        EarlyStopping("task/blue").should_stop(history(1.0))
    with pytest.raises(UserError, match="mode is 'max' or 'min'"):
        EarlyStopping("task/bleu", mode="best")
