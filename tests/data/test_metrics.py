import math

import numpy as np
import pytest
import seqio

from t5x_like.data import metrics
from t5x_like.errors import UserError

PREDICTION_METRICS = [
    metrics.accuracy,
    metrics.label_accuracy,
    metrics.span_f1,
    metrics.sequence_accuracy,
    metrics.token_f1,
    metrics.bleu,
    metrics.chrf,
    metrics.rouge,
    metrics.precision_at_k(3),
    metrics.recall_at_k(3),
]


def test_accuracy_stands_beside_that_of_the_most_frequent_target() -> None:
    found = metrics.accuracy(["food", "food", "food", "animal"], ["food", "animal", "food", "animal"])
    assert found == {"accuracy": 0.75, "majority_accuracy": 0.75}
    assert metrics.accuracy(["a", "b"], ["a", "b"]) == {"accuracy": 1.0, "majority_accuracy": 0.5}


def test_labels_of_words_count_alike_in_short_and_long_texts() -> None:
    targets = [["none", "none", "comma", "none"], ["period"]]
    predictions = [["none", "comma", "comma", "none"], ["comma"]]
    # F1 over comma and period: one found rightly, of two wanted and three found.
    assert metrics.label_accuracy(targets, predictions) == {
        "label_accuracy": 0.6,
        "majority_label_accuracy": 0.6,
        "label_f1": 0.4,
    }
    assert metrics.label_accuracy([["a", "a"]], [["a", "a"]])["label_f1"] == 0.0  # nothing but the usual
    with pytest.raises(UserError, match="does not have as many labels as its target"):
        metrics.label_accuracy([["a"]], [["a", "b"]])


def test_spans_overlap() -> None:
    targets, predictions = ["2 5", "2 5", "2 5", "7 7"], ["2 5", "4 8", "6 9", "8 7"]
    # 4 tokens; 2 of the 4 wanted and 5 found; none; none found.
    assert metrics.span_f1(targets, predictions) == {
        "span_exact_match": 0.25,
        "majority_span_exact_match": 0.75,
        "span_f1": pytest.approx((1 + 4 / 9) / 4, abs=1e-12),
    }


def test_sequence_accuracy_forgives_nothing() -> None:
    assert metrics.sequence_accuracy(["a b", "c", "d"], ["a b", "C", "d."]) == {"sequence_accuracy": 1 / 3}


@pytest.mark.parametrize(
    ("target", "answer", "f1"),
    [
        ("the cat sat", "A cat, sat down!", 0.8),  # {cat, sat} and {cat, sat, down}: 2 * 2 / (2 + 3)
        ("dog dog", "dog", 2 / 3),  # bags, not sets
        (["red", "dark blue"], "blue", 2 / 3),  # the best of several answers
        ("the", "", 1.0),  # both empty once articles are gone
        ("cat", "the", 0.0),
        ("cat", "dog", 0.0),
    ],
)
def test_token_f1(target: str | list[str], answer: str, f1: float) -> None:
    assert metrics.token_f1([target], [answer]) == {"token_f1": pytest.approx(f1, abs=1e-12)}
    assert metrics.token_f1([target, "x"], [answer, "x"])["token_f1"] == pytest.approx((f1 + 1) / 2, abs=1e-12)


def test_bleu_pools_the_counts_of_the_corpus() -> None:
    reference, near = "the cat is on the mat", "the cat sat on the mat"
    # 1- to 4-grams of `near`: 5/6, 3/5, 1/4, and 0/3 smoothed to 1/6.
    one = 100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25
    both = 100 * (11 / 12 * 8 / 10 * 5 / 8 * 3 / 6) ** 0.25
    assert metrics.bleu([reference], [near])["bleu"] == pytest.approx(one, abs=1e-9)
    assert metrics.bleu([reference] * 2, [reference, near])["bleu"] == pytest.approx(both, abs=1e-9)
    brevity = 100 * math.exp(1 - 6 / 4)
    assert metrics.bleu([reference], ["the cat is on"])["bleu"] == pytest.approx(brevity, abs=1e-9)


def test_chrf_by_hand() -> None:
    # "ab" has 1- and 2-grams, all of them in "abc": precision 1, recall (2/3 + 1/2) / 2 = 7/12, beta 2.
    assert metrics.chrf(["abc"], ["ab"])["chrf"] == pytest.approx(100 * 5 * (7 / 12) / (4 + 7 / 12), abs=1e-9)


def test_rouge_by_hand() -> None:
    found = metrics.rouge(["the cat sat"], ["the cat"])
    assert found == pytest.approx({"rouge1": 0.8, "rouge2": 2 / 3, "rougeLsum": 0.8}, abs=1e-12)
    swapped = metrics.rouge(["one two\nthree four"], ["three four\none two"])
    assert swapped == pytest.approx({"rouge1": 1.0, "rouge2": 2 / 3, "rougeLsum": 1.0}, abs=1e-12)


def test_rankings() -> None:
    targets = [["a", "b", "c"], ["z"], "whole"]
    rankings = [["a", "x", "b", "c"], ["y", "y", "z"], ["whole"]]
    third = pytest.approx(1 / 3, abs=1e-12)
    four_ninths = pytest.approx(4 / 9, abs=1e-12)
    # Among the first two, 1, 0 and 1 answers are right of 3, 1 and 1; among the first three 2, 1 and 1.
    assert metrics.precision_at_k(2)(targets, rankings) == {"precision_at_2": third}
    assert metrics.recall_at_k(2)(targets, rankings) == {"recall_at_2": four_ninths}
    assert metrics.precision_at_k(3)(targets, rankings) == {"precision_at_3": four_ninths}
    assert metrics.recall_at_k(3)(targets, rankings) == {"recall_at_3": pytest.approx(8 / 9, abs=1e-12)}
    assert metrics.precision_at_k(2)([["a", "b"]], [["a", "a"]]) == {"precision_at_2": 0.5}  # said twice


def test_perplexity_is_per_token_of_the_whole_evaluation() -> None:
    scores = np.array([-math.log(8), -math.log(2)], np.float32)
    assert metrics.perplexity(scores, np.array([3, 1])) == pytest.approx(2.0, rel=1e-7)
    assert metrics.perplexity([-5000.0], [1]) == math.inf
    assert metrics.log_likelihood(["a", "b"], scores)["log_likelihood"] == pytest.approx(-math.log(4), rel=1e-7)


@pytest.mark.parametrize("metric", PREDICTION_METRICS)
def test_seqio_takes_them_as_metrics_of_predictions(metric: seqio.metrics.MetricFnCallable) -> None:
    found = seqio.metrics.PassthroughLegacyMetric.from_metric_fn(metric)
    assert found.model_output_type == seqio.metrics.ModelOutputType.PREDICTION


def test_seqio_takes_log_likelihood_as_a_metric_of_scores() -> None:
    found = seqio.metrics.PassthroughLegacyMetric.from_metric_fn(metrics.log_likelihood)
    assert found.model_output_type == seqio.metrics.ModelOutputType.SCORE


@pytest.mark.parametrize("metric", PREDICTION_METRICS)
def test_no_examples_and_missing_predictions_are_errors(metric: seqio.metrics.MetricFnCallable) -> None:
    with pytest.raises(UserError, match="no examples: is the evaluated split empty"):
        metric([], [])
    with pytest.raises(UserError, match="2 targets but 1 predictions"):
        metric(["a", "b"], ["a"])


def test_no_examples_and_missing_scores_are_errors() -> None:
    for metric, values in [(metrics.log_likelihood, ["a", "b"]), (metrics.perplexity, [-1.0, -2.0])]:
        with pytest.raises(UserError, match="no examples: is the evaluated split empty"):
            metric([], [])
        with pytest.raises(UserError, match="2 targets but 1 predictions"):
            metric(values, [-1.0])


def test_undefined_values_are_errors() -> None:
    with pytest.raises(UserError, match="k is 0"):
        metrics.precision_at_k(0)
    with pytest.raises(UserError, match="k is -1"):
        metrics.recall_at_k(-1)
    with pytest.raises(UserError, match="no relevant answer"):
        metrics.recall_at_k(1)([[]], [["a"]])
    with pytest.raises(UserError, match="no right answer"):
        metrics.token_f1([[]], ["a"])
    with pytest.raises(UserError, match="the targets have no tokens"):
        metrics.perplexity([0.0], [0])


def test_unigram_perplexity_is_the_exponential_of_the_entropy() -> None:
    assert metrics.unigram_perplexity([[5, 5], [7, 9]]) == pytest.approx(2**1.5)  # shares 1/2, 1/4, 1/4: 1.5 bits
    assert metrics.unigram_perplexity([[3], [3, 3]]) == pytest.approx(1.0)
