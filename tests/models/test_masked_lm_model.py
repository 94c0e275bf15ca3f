import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_family import VOCAB, random_params, tiny_bert

from t5x_like.architectures.heads import ClassificationHead, MaskedLanguageModelHead
from t5x_like.data.features import MaskedLMFeatures
from t5x_like.decoding.greedy import Greedy
from t5x_like.models.masked_lm import MaskedLMModel

MASK = 16
HEAD = MaskedLanguageModelHead(next_sentence=ClassificationHead(2))
MODEL = MaskedLMModel(tiny_bert(HEAD), MASK, MaskedLMFeatures(next_sentence=True))
EXAMPLES = [  # the true texts are 2 5 6 7 3 8 3 and 2 9 3 4 3
    {"inputs": [2, MASK, 6, 14, 3, 8, 3], "segment_ids": [0, 0, 0, 0, 0, 1, 1], "targets": [5, 7]},
    {"inputs": [2, 9, 3, MASK, 3], "segment_ids": [0, 0, 0, 1, 1], "targets": [4]},
]
POSITIONS, FOLLOWS, TEXTS = [[1, 3], [3]], [0, 1], [[2, 5, 6, 7, 3, 8, 3], [2, 9, 3, 4, 3]]
ROWS = [
    [{**{k: np.array(v) for k, v in e.items()}, "target_positions": np.array(p), "next_sentence": np.array([f])}]
    for e, p, f in zip(EXAMPLES, POSITIONS, FOLLOWS, strict=True)
]
BATCH = MODEL.converter.convert([*ROWS, []], {"inputs": 8, "targets": 3}, packed=False)
PARAMS = random_params(MODEL, BATCH)


def log_probs(tokens: list[int], segments: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of one text without padding, at every position; and of the next sentence."""
    batch = {"encoder_input_tokens": jnp.asarray([tokens]), "segment_ids": jnp.asarray([segments])}
    outputs, _ = MODEL.forward(PARAMS, batch)
    return tuple(np.asarray(jax.nn.log_softmax(logits))[0] for logits in outputs)


def test_loss_is_the_mean_over_masked_tokens_and_the_mean_over_pairs() -> None:
    masked, pairs = [], []
    for example, positions, follows in zip(EXAMPLES, POSITIONS, FOLLOWS, strict=True):
        tokens, pair = log_probs(example["inputs"], example["segment_ids"])
        masked += [-tokens[p, t] for p, t in zip(positions, example["targets"], strict=True)]
        pairs.append(-pair[0, follows])
    sums = MODEL.loss(PARAMS, BATCH)
    assert float(sums.loss.weight) == 3
    assert float(sums.loss.mean()) == pytest.approx(np.mean(masked) + np.mean(pairs), rel=1e-5)
    assert float(sums.metrics["masked_lm_loss"].mean()) == pytest.approx(np.mean(masked), rel=1e-5)
    assert float(sums.metrics["next_sentence_loss"].mean()) == pytest.approx(np.mean(pairs), rel=1e-5)


def test_score_masks_one_token_at_a_time_in_the_true_text() -> None:
    expected = []
    for text, example, positions in zip(TEXTS, EXAMPLES, POSITIONS, strict=True):
        total = 0.0
        for position in positions:
            masked = [MASK if i == position else token for i, token in enumerate(text)]
            total += log_probs(masked, example["segment_ids"])[0][position, text[position]]
        expected.append(total)
    np.testing.assert_allclose(MODEL.score(PARAMS, BATCH), [*expected, 0.0], rtol=1e-5)


def test_logits_everywhere_or_at_targets() -> None:
    everywhere = MODEL.logits(PARAMS, {name: BATCH[name] for name in ("encoder_input_tokens", "segment_ids")})
    assert everywhere.shape == (3, 8, VOCAB)
    at_targets = MODEL.logits(PARAMS, BATCH)
    np.testing.assert_allclose(at_targets[0, :2], everywhere[0, np.array([1, 3])], rtol=1e-5, atol=1e-6)


def test_it_fills_in_what_is_most_likely() -> None:
    found = MODEL.generate(PARAMS, BATCH, Greedy(), 3)
    for row, (example, positions) in enumerate(zip(EXAMPLES, POSITIONS, strict=True)):
        table = log_probs(example["inputs"], example["segment_ids"])[0][positions]
        assert found.tokens[row, 0, : len(positions)].tolist() == table.argmax(1).tolist()
        assert found.scores[row, 0] == pytest.approx(table.max(1).sum(), rel=1e-5)
    assert found.tokens[2].tolist() == [[0, 0, 0]]
