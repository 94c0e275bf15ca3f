import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_family import VOCAB, random_params, tiny_gpt
from tiny_t5 import quick_jit

from t5x_like.data.features import DecoderFeatures
from t5x_like.decoding.beam import BeamSearch
from t5x_like.decoding.greedy import Greedy
from t5x_like.models.decoder_only import DecoderOnlyModel

LENGTHS, MAX_LENGTH, EOS = {"inputs": 4, "targets": 3}, 5, 1
EXAMPLES = [
    {"inputs": np.array([5, 6, 7, 8]), "targets": np.array([9, 10, 1])},
    {"inputs": np.array([11]), "targets": np.array([4, 1])},
    {"inputs": np.array([], int), "targets": np.array([16])},
]
BATCH = DecoderFeatures().convert([[example] for example in EXAMPLES], LENGTHS, packed=False)


def model_and_params(prefix_lm: bool, scan: bool = False) -> tuple[DecoderOnlyModel, dict]:
    model = DecoderOnlyModel(tiny_gpt(prefix_lm, scan))
    return model, random_params(model, BATCH)


def log_probs(model: DecoderOnlyModel, params: dict, read: list[int], prefix: int) -> np.ndarray:
    """Of the token after `read`, of which the first `prefix` are the prompt; one row, no cache."""
    batch = {
        "decoder_input_tokens": jnp.asarray([read]),
        "decoder_causal_attention": jnp.asarray([[1] * prefix + [0] * (len(read) - prefix)]),
    }
    return np.asarray(jax.nn.log_softmax(model.logits(params, batch)))[0]


@pytest.mark.parametrize("prefix_lm", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_greedy_continuations_are_those_of_the_network_without_a_cache(prefix_lm: bool, scan: bool) -> None:
    model, params = model_and_params(prefix_lm, scan)
    found = quick_jit(lambda params: model.generate(params, BATCH, Greedy(), MAX_LENGTH))(params)
    for row, example in enumerate(EXAMPLES):
        read, score = [0, *example["inputs"].tolist()], 0.0
        prompt = len(read)
        while len(read) < prompt + MAX_LENGTH and EOS not in read[prompt:]:
            last = log_probs(model, params, read, prompt)[-1]
            read.append(int(last.argmax()))
            score += float(last.max())
        written = read[prompt:]
        assert found.tokens[row, 0].tolist() == written + [0] * (MAX_LENGTH - len(written))
        assert found.scores[row, 0] == pytest.approx(score, abs=1e-4)


def test_beam_search_of_every_sequence_finds_the_best() -> None:
    model, params = model_and_params(False)
    search = BeamSearch(num_beams=VOCAB, length_penalty=0.0)
    found = quick_jit(lambda params: model.generate(params, BATCH, search, 2))(params)
    read = [0, 11]
    first = log_probs(model, params, read, 2)[-1]
    ways = {(EOS, 0): first[EOS]}
    for a in set(range(VOCAB)) - {EOS}:
        ways |= {(a, b): first[a] + x for b, x in enumerate(log_probs(model, params, [*read, a], 2)[-1])}
    best = max(ways, key=ways.get)
    assert tuple(found.tokens[1, 0].tolist()) == best
    assert found.scores[1, 0] == pytest.approx(ways[best], abs=1e-4)


def test_score_and_loss_count_targets_alone() -> None:
    model, params = model_and_params(False)
    expected = []
    for example in EXAMPLES:
        tokens = [0, *example["inputs"], *example["targets"]]
        table = log_probs(model, params, tokens[:-1], 0)
        start = len(example["inputs"])
        expected.append(sum(table[i, tokens[i + 1]] for i in range(start, len(tokens) - 1)))
    np.testing.assert_allclose(model.score(params, BATCH), expected, rtol=1e-4)
    sums = model.loss(params, BATCH)
    assert float(sums.loss.weight) == 3 + 2 + 1
    np.testing.assert_allclose(sums.loss.total, -sum(expected), rtol=1e-4)


def test_packed_rows_are_the_examples_by_themselves() -> None:
    model, params = model_and_params(True)
    rows = [[EXAMPLES[1], EXAMPLES[2]]]
    packed = DecoderFeatures().convert(rows, LENGTHS, packed=True)
    alone = model.score(params, BATCH)
    np.testing.assert_allclose(model.score(params, packed)[0], alone[1] + alone[2], rtol=1e-4)
