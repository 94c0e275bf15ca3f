import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_family import MLP, VOCAB, random_params
from tiny_t5 import quick_jit

from t5x_like.architectures.stack import LayerStack
from t5x_like.architectures.transformer import Encoder, EncoderLayer
from t5x_like.architectures.xlnet import XLNet
from t5x_like.decoding.greedy import Greedy
from t5x_like.layers.embeddings import Embedding
from t5x_like.layers.norms import LayerNorm
from t5x_like.layers.residual import PostNorm
from t5x_like.layers.two_stream_attention import TwoStreamAttention
from t5x_like.models.permutation_lm import PermutationLMModel, hidden_by

LAYER = EncoderLayer(TwoStreamAttention(3, 4), MLP, norm=LayerNorm(), residual=PostNorm())
MODEL = PermutationLMModel(XLNet(Embedding(VOCAB, 12, output_bias=True), Encoder(LayerStack((LAYER,), 2), norm=None)))
TEXTS, ORDERS = [[5, 6, 7, 8, 9, 3, 2], [9, 4, 11, 3, 2]], [[0, 2, 0, 3, 1, 0, 0], [0, 1, 0, 0, 0]]
EXAMPLES = [
    {
        "inputs": np.array(text),
        "order": np.array(order),
        "targets": np.array([token for token, rank in zip(text, order, strict=True) if rank]),
        "target_positions": np.flatnonzero(order),
    }
    for text, order in zip(TEXTS, ORDERS, strict=True)
]
BATCH = MODEL.converter.convert([[example] for example in EXAMPLES] + [[]], {"inputs": 8, "targets": 4}, packed=False)
PARAMS = random_params(MODEL, BATCH)
logits = quick_jit(MODEL.logits)
LOGITS = np.asarray(logits(PARAMS, BATCH))


def log_prob(text: list[int], order: list[int], position: int) -> float:
    """Of the token at one position given all of lower rank, from a text without padding and a single target."""
    seen = [[order[j] == 0 or order[j] < order[i] for j in range(len(text))] for i in range(len(text))]
    batch = {
        "input_tokens": np.array([text], np.int32),
        "perm_mask": 1.0 - np.array([seen], np.float32),
        "target_mapping": np.eye(len(text), dtype=np.float32)[None, [position]],
    }
    return float(jax.nn.log_softmax(logits(PARAMS, batch))[0, 0, text[position]])


CONDITIONALS = [
    [log_prob(text, order, position) for position, rank in enumerate(order) if rank]
    for text, order in zip(TEXTS, ORDERS, strict=True)
]


def test_an_order_by_hand() -> None:
    hidden = [[0, 1, 0, 1], [0, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1]]
    np.testing.assert_array_equal(hidden_by(jnp.asarray([[0, 1, 0, 2]]))[0].astype(int), hidden)


def test_score_is_the_sum_of_what_each_target_has_by_itself() -> None:
    np.testing.assert_allclose(quick_jit(MODEL.score)(PARAMS, BATCH), [*map(sum, CONDITIONALS), 0.0], rtol=1e-5)


def test_loss_is_the_mean_over_targets() -> None:
    sums = quick_jit(MODEL.loss)(PARAMS, BATCH)
    assert float(sums.loss.weight) == 4
    assert float(sums.loss.mean()) == pytest.approx(-np.mean(np.concatenate(CONDITIONALS)), rel=1e-5)


@pytest.mark.parametrize(("position", "unaware"), [(1, [0, 2]), (3, [0, 1, 2]), (4, [2]), (2, [])])
def test_a_token_is_known_to_higher_ranks_only(position: int, unaware: list[int]) -> None:
    """Targets of the first text are at 1, 3 and 4, of ranks 2, 3 and 1."""
    tokens = BATCH["input_tokens"].copy()
    tokens[0, position] = 14
    found = np.asarray(logits(PARAMS, BATCH | {"input_tokens": tokens}))
    changed = np.abs(found - LOGITS)[0].max(axis=-1) > 1e-3
    assert [target for target in range(3) if not changed[target]] == unaware
    np.testing.assert_array_equal(found[0, unaware], LOGITS[0, unaware])


def test_it_fills_in_what_is_most_likely() -> None:
    found = MODEL.generate(PARAMS, BATCH, Greedy(), 4)
    expected = np.where(BATCH["target_weights"] > 0, LOGITS.argmax(-1), 0)
    assert expected.any()
    np.testing.assert_array_equal(found.tokens[:, 0], expected)
