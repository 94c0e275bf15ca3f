import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_family import random_params, tiny_bert

from t5x_like.architectures.heads import ClassificationHead, SpanHead, TokenClassificationHead
from t5x_like.data.features import MultipleChoiceFeatures, TokenLabelFeatures
from t5x_like.decoding.greedy import Greedy
from t5x_like.models.classification import ClassificationModel, Likeliest, LikeliestSpan

LENGTHS = {"inputs": 6, "targets": 1}
TEXTS = [[2, 5, 6, 3], [2, 9, 8, 7, 4, 3]]


def array(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def alone(model: ClassificationModel, params: dict, text: list[int]) -> np.ndarray:
    """Log-probabilities of the classes of one text without padding."""
    return np.asarray(jax.nn.log_softmax(model.logits(params, {"encoder_input_tokens": jnp.asarray([text])})))[0]


def test_classes_of_texts() -> None:
    model = ClassificationModel(tiny_bert(ClassificationHead(4)))
    rows = [[{"inputs": array(*text), "targets": array(label)}] for text, label in zip(TEXTS, (3, 1), strict=True)]
    batch = model.converter.convert([*rows, []], LENGTHS, packed=False)
    params = random_params(model, batch)
    tables = [alone(model, params, text)[0] for text in TEXTS]
    np.testing.assert_allclose(model.score(params, batch), [tables[0][3], tables[1][1], 0], rtol=1e-5)
    assert float(model.loss(params, batch).loss.weight) == 2
    found = model.generate(params, batch, Greedy(), 1)
    assert found.tokens[:2, 0, 0].tolist() == [int(table.argmax()) for table in tables]
    np.testing.assert_allclose(found.scores[:2, 0], [table.max() for table in tables], rtol=1e-5)


def test_classes_of_tokens() -> None:
    model = ClassificationModel(tiny_bert(TokenClassificationHead(3)), TokenLabelFeatures())
    rows = [[{"inputs": array(*TEXTS[1]), "targets": array(2, 1, 0), "target_positions": array(1, 3, 4)}]]
    batch = model.converter.convert(rows, {"inputs": 6, "targets": 6}, packed=False)
    params = random_params(model, batch)
    table = alone(model, params, TEXTS[1])
    np.testing.assert_allclose(model.score(params, batch), [table[1, 2] + table[3, 1] + table[4, 0]], rtol=1e-5)
    assert model.generate(params, batch, Greedy(), 6).tokens[0, 0].tolist() == table.argmax(1).tolist()


def test_choices_are_read_one_by_one_and_compete() -> None:
    model = ClassificationModel(tiny_bert(ClassificationHead(1)), MultipleChoiceFeatures(num_choices=2))
    rows = [[{"inputs": np.concatenate([array(*TEXTS[0], 0, 0), array(*TEXTS[1])]), "targets": array(1)}]]
    batch = model.converter.convert(rows, {"inputs": 12, "targets": 1}, packed=False)
    params = random_params(model, batch)
    logits = [float(model.network.apply({"params": params}, jnp.asarray([text]))[0, 0, 0]) for text in TEXTS]
    expected = logits[1] - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(model.score(params, batch), [expected], rtol=1e-5)
    assert model.generate(params, batch, Greedy(), 1).tokens.tolist() == [[[int(np.argmax(logits))]]]


def test_a_span_does_not_end_before_it_starts() -> None:
    rng = np.random.default_rng(0)
    log_probs = np.log(rng.dirichlet(np.ones(5), (50, 2))).astype(np.float32)
    labels, scores = LikeliestSpan()(jnp.asarray(log_probs))
    for (start, end), pair, score in zip(labels.tolist(), log_probs, scores, strict=True):
        ways = {(i, j): pair[0, i] + pair[1, j] for i in range(5) for j in range(i, 5)}
        assert (start, end) == max(ways, key=ways.get)
        assert score == pytest.approx(max(ways.values()), rel=1e-6)
    assert (np.asarray(Likeliest()(jnp.asarray(log_probs)).labels)[:, 0] > log_probs[:, 1].argmax(1)).any()


def test_logits_of_spans_are_over_positions() -> None:
    model = ClassificationModel(tiny_bert(SpanHead()), decide=LikeliestSpan())
    rows = [[{"inputs": array(*TEXTS[1]), "targets": array(2, 4)}]]
    batch = model.converter.convert(rows, {"inputs": 6, "targets": 2}, packed=False)
    params = random_params(model, batch)
    table = alone(model, params, TEXTS[1])
    assert table.shape == (2, 6)
    np.testing.assert_allclose(model.score(params, batch), [table[0, 2] + table[1, 4]], rtol=1e-5)
