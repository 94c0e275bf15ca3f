"""What a task is judged by, in seqio's form: `metric(targets, predictions)` over all examples, postprocessed.

Accuracies, F1, ROUGE, precision and recall lie in [0, 1]; BLEU and chrF in [0, 100], as sacrebleu has them.
Over no examples, or lists of different lengths, a metric raises `UserError`: a 0 would look like a bad model.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Sequence, Sized
from typing import TypeVar

import numpy as np
import sacrebleu

from t5x_like.errors import UserError

T = TypeVar("T")
P = TypeVar("P")

Numbers = Sequence[float] | Sequence[int] | np.ndarray
Ranking = Sequence[str]
RankingMetric = Callable[[Sequence[Collection[str]], Sequence[Ranking]], dict[str, float]]


def accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """The share of right labels, and beside it that of a model which always answers the most frequent target.

    Args:
        targets: the label of each example.
        predictions: the label the model gave it.

    Returns:
        `accuracy` and `majority_accuracy`.
    """
    most_frequent = Counter(targets).most_common(1)
    return {
        "accuracy": _mean([float(target == label) for target, label in _pairs(targets, predictions)]),
        "majority_accuracy": most_frequent[0][1] / len(targets),
    }


def label_accuracy(targets: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> dict[str, float]:
    """How well labels of words are found, over the words of all examples together.

    Args:
        targets: the labels of each example.
        predictions: as many, from the model.

    Returns:
        `label_accuracy`; `majority_label_accuracy`, of a model that always answers the most frequent label; and
        `label_f1`: F1 over all the other labels (micro-averaged), which is 0 for that model.
    """
    if any(len(labels) != len(answers) for labels, answers in _pairs(targets, predictions)):
        raise UserError("label_accuracy: a prediction does not have as many labels as its target")
    pairs = [pair for labels, answers in _pairs(targets, predictions) for pair in zip(labels, answers, strict=True)]
    [(usual, count)] = Counter(label for label, _ in pairs).most_common(1)
    hits = sum(label == answer != usual for label, answer in pairs)
    wanted, found = (sum(pair[side] != usual for pair in pairs) for side in (0, 1))
    return {
        "label_accuracy": _mean([float(label == answer) for label, answer in pairs]),
        "majority_label_accuracy": count / len(pairs),
        "label_f1": 2 * hits / max(wanted + found, 1),
    }


def span_f1(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """How well spans of tokens are found, as for SQuAD (Rajpurkar et al. 2016), but by places, not words.

    Args:
        targets: each span as the positions of its first and last token: `3 7`.
        predictions: likewise; one that ends before it begins is empty.

    Returns:
        `span_exact_match`; `majority_span_exact_match`, of a model that always answers the most frequent span; and
        `span_f1`, of the tokens in the spans, on average over examples.
    """
    scores = []
    for target, answer in _pairs(targets, predictions):
        (first, last), (start, end) = (map(int, span.split()) for span in (target, answer))
        overlap = max(0, min(last, end) - max(first, start) + 1)
        scores.append(2 * overlap / (last - first + 1 + max(0, end - start + 1)))
    exact = accuracy(targets, predictions)
    return {
        "span_exact_match": exact["accuracy"],
        "majority_span_exact_match": exact["majority_accuracy"],
        "span_f1": _mean(scores),
    }


def sequence_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """The share of texts that are right to the last character, as `sequence_accuracy`."""
    right = [float(target == text) for target, text in _pairs(targets, predictions)]
    return {"sequence_accuracy": _mean(right)}


def token_f1(targets: Sequence[str | Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """F1 of the bags of words (SQuAD, Rajpurkar et al. 2016), blind to case, punctuation, English articles.

    Args:
        targets: per example the right answer, or several of which the best match counts.
        predictions: the model's answers.

    Returns:
        The mean over examples, as `token_f1`.
    """
    return {"token_f1": _mean([_best_f1(target, answer) for target, answer in _pairs(targets, predictions)])}


def bleu(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU (Papineni et al. 2002) by sacrebleu (13a tokenizer, exponential smoothing), as `bleu`."""
    _check(targets, predictions)
    return {"bleu": sacrebleu.corpus_bleu(predictions, [targets]).score}


def chrf(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Corpus chrF2 (Popovic 2015: F-score of character n-grams up to 6, recall counting twice), as `chrf`."""
    _check(targets, predictions)
    return {"chrf": sacrebleu.corpus_chrf(predictions, [targets]).score}


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """ROUGE (Lin 2004), mean F1 over examples, without stemming; for Lsum, a new line begins a sentence.

    Args:
        targets: the reference summaries.
        predictions: the model's.

    Returns:
        `rouge1`, `rouge2` and `rougeLsum`.
    """
    from rouge_score.rouge_scorer import RougeScorer  # a second, for SciPy: only where it is asked for

    names = ["rouge1", "rouge2", "rougeLsum"]
    scorer = RougeScorer(names)
    scores = [scorer.score(target, summary) for target, summary in _pairs(targets, predictions)]
    return {name: _mean([score[name].fmeasure for score in scores]) for name in names}


def precision_at_k(k: int) -> RankingMetric:
    """The metric `precision_at_<k>`: how much of the first `k` answers is relevant, on average over examples.

    Its targets are the relevant answers of each example, its predictions are ranked from the best. An answer
    given twice counts once, and a ranking shorter than `k` is still divided by `k`.

    Raises:
        UserError: if `k` is not positive.
    """
    _check_k(k)

    def metric(targets: Sequence[Collection[str]], predictions: Sequence[Ranking]) -> dict[str, float]:
        pairs = _pairs(targets, predictions)
        return {f"precision_at_{k}": _mean([_hits(target, ranking, k) / k for target, ranking in pairs])}

    return metric


def recall_at_k(k: int) -> RankingMetric:
    """The metric `recall_at_<k>`: how much of what is relevant is in the first `k`, on average over examples.

    Its arguments are those of `precision_at_k`'s metric.

    Raises:
        UserError: if `k` is not positive; the metric, if an example has no relevant answer at all.
    """
    _check_k(k)

    def metric(targets: Sequence[Collection[str]], predictions: Sequence[Ranking]) -> dict[str, float]:
        if not all(_relevant(target) for target in targets):
            raise UserError("recall_at_k: an example has no relevant answer, so its recall is not defined")
        pairs = _pairs(targets, predictions)
        shares = [_hits(target, ranking, k) / len(_relevant(target)) for target, ranking in pairs]
        return {f"recall_at_{k}": _mean(shares)}

    return metric


def log_likelihood(targets: Sequence[str], scores: Numbers) -> dict[str, float]:
    """The mean log-likelihood of a whole target, in nats, as `log_likelihood`; for seqio a metric of scores.

    Args:
        targets: unused but for their number.
        scores: `[examples]`, the sum of each target's token log-likelihoods.
    """
    _check(targets, scores)
    return {"log_likelihood": math.fsum(scores) / len(scores)}


def perplexity(scores: Numbers, num_tokens: Numbers) -> float:
    """Perplexity per target token over a whole evaluation: exp(-sum of log-likelihoods / number of tokens).

    Not a seqio metric, since those see no token counts: they are the sums of `decoder_loss_weights`.

    Args:
        scores: `[examples]`, the sum of each target's token log-likelihoods, in nats.
        num_tokens: `[examples]`, the tokens that each sum is over, EOS included.

    Raises:
        UserError: if there are no tokens, or one array is longer than the other.
    """
    _check(scores, num_tokens)
    tokens = math.fsum(num_tokens)
    if tokens <= 0:
        raise UserError("perplexity: the targets have no tokens")
    with np.errstate(over="ignore"):  # a perplexity beyond float64 is infinite
        return float(np.exp(-math.fsum(scores) / tokens))


def unigram_perplexity(targets: Sequence[Sequence[int] | np.ndarray]) -> float:
    """The perplexity of a model that knows no more than how often each token occurs in these very targets.

    The trivial baseline of `perplexity`: exp of the entropy of the tokens' frequencies, EOS included.

    Args:
        targets: token ids of each example.
    """
    _, counts = np.unique(np.concatenate([np.asarray(tokens) for tokens in targets]), return_counts=True)
    shares = counts / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _pairs(targets: Sequence[T], predictions: Sequence[P]) -> list[tuple[T, P]]:
    _check(targets, predictions)
    return list(zip(targets, predictions, strict=True))


def _check(targets: Sized, predictions: Sized) -> None:
    if len(targets) != len(predictions):
        raise UserError(f"a metric was given {len(targets)} targets but {len(predictions)} predictions")
    if len(targets) == 0:
        raise UserError("a metric was given no examples: is the evaluated split empty?")


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _best_f1(target: str | Sequence[str], answer: str) -> float:
    references = [target] if isinstance(target, str) else target
    if not references:
        raise UserError("token_f1: an example has no right answer")
    return max(_f1(Counter(_words(reference)), Counter(_words(answer))) for reference in references)


def _f1(reference: Counter[str], answer: Counter[str]) -> float:
    if not reference or not answer:
        return float(reference == answer)  # nothing is right only where nothing is wanted
    return 2 * (reference & answer).total() / (reference.total() + answer.total())


def _words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _relevant(target: Collection[str]) -> set[str]:
    return {target} if isinstance(target, str) else set(target)


def _hits(target: Collection[str], ranking: Ranking, k: int) -> int:
    return len(_relevant(target) & set(ranking[:k]))


def _check_k(k: int) -> None:
    if k < 1:
        raise UserError(f"k is {k}; a ranking is cut after at least 1 answer")
