"""Losses, scores and outputs against naive NumPy over the model's own logits, whose oracle is Hugging Face."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
import pytest
from tiny_t5 import VOCAB, quick_jit, random_params, tiny_batch, tiny_t5

from t5x_like.data.packing import EncoderDecoderFeatures
from t5x_like.decoding.beam import BeamSearch
from t5x_like.decoding.contract import Decoded, DecodeFn
from t5x_like.decoding.greedy import Greedy
from t5x_like.models.contract import LossAndMetrics
from t5x_like.models.encoder_decoder import EncoderDecoderModel
from t5x_like.typing import Batch

MODEL = EncoderDecoderModel(tiny_t5(), z_loss=0.0)
PARAMS = random_params(MODEL)
BATCH = tiny_batch()
WEIGHTS = np.asarray([[1] * 7, [1] * 6 + [0], [1] * 5 + [0] * 2])


@functools.cache
def logits() -> np.ndarray:
    return np.asarray(quick_jit(MODEL.logits)(PARAMS, BATCH), np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


@functools.cache
def loss_of(z_loss: float, label_smoothing: float) -> Callable[..., LossAndMetrics]:
    return quick_jit(dataclasses.replace(MODEL, z_loss=z_loss, label_smoothing=label_smoothing).loss)


def run_loss(batch: Batch, z_loss: float = 0.0, label_smoothing: float = 0.0) -> LossAndMetrics:
    return loss_of(z_loss, label_smoothing)(PARAMS, batch)


score = quick_jit(MODEL.score)


@pytest.mark.parametrize(("z_loss", "label_smoothing"), [(0.0, 0.0), (0.1, 0.0), (0.01, 0.2)])
def test_loss_is_summed_over_target_tokens(z_loss: float, label_smoothing: float) -> None:
    total = z_total = correct = 0.0
    for row, column in zip(*np.nonzero(WEIGHTS), strict=True):
        log_probs, target = log_softmax(logits()[row, column]), BATCH["decoder_target_tokens"][row, column]
        soft = np.full(VOCAB, label_smoothing / (VOCAB - 1))
        soft[target] = 1 - label_smoothing
        total += sum(q * (np.log(q) - log_prob) for q, log_prob in zip(soft, log_probs, strict=True) if q)
        z_total += z_loss * np.log(np.exp(logits()[row, column]).sum()) ** 2
        correct += logits()[row, column].argmax() == target
    found = run_loss(BATCH, z_loss=z_loss, label_smoothing=label_smoothing)
    assert float(found.loss.total) == pytest.approx(total + z_total, rel=1e-5)
    assert float(found.loss.weight) == 18
    assert float(found.loss.mean()) == pytest.approx((total + z_total) / 18, rel=1e-5)
    assert {name: float(metric.total) for name, metric in found.metrics.items()} == {
        "accuracy": correct,
        "z_loss": pytest.approx(z_total, rel=1e-5),
    }
    assert {float(metric.weight) for metric in found.metrics.values()} == {18}


def test_accuracy_counts_targets_that_are_most_likely() -> None:
    targets = np.where(WEIGHTS, logits().argmax(-1), 0).astype(np.int32)
    targets[0, :2] = (targets[0, :2] + 1) % VOCAB
    found = run_loss(BATCH | {"decoder_target_tokens": targets})
    assert float(found.metrics["accuracy"].total) == 16


def test_loss_and_score_ignore_targets_of_weight_0() -> None:
    targets = np.where(WEIGHTS, BATCH["decoder_target_tokens"], 3).astype(np.int32)
    other = BATCH | {"decoder_target_tokens": targets}
    settings = {"z_loss": 0.01, "label_smoothing": 0.2}
    jax.tree.map(np.testing.assert_array_equal, run_loss(other, **settings), run_loss(BATCH, **settings))
    np.testing.assert_array_equal(score(PARAMS, other), score(PARAMS, BATCH))
    nothing = run_loss(BATCH | {"decoder_loss_weights": np.zeros_like(WEIGHTS)})
    assert float(nothing.loss.total) == float(nothing.loss.weight) == float(nothing.loss.mean()) == 0


def test_score_is_the_log_likelihood_of_each_row() -> None:
    targets = BATCH["decoder_target_tokens"][..., None]
    expected = (np.take_along_axis(log_softmax(logits()), targets, axis=-1)[..., 0] * WEIGHTS).sum(-1)
    smoothed = dataclasses.replace(MODEL, z_loss=0.5, label_smoothing=0.3)  # which concern training only
    np.testing.assert_allclose(quick_jit(smoothed.score)(PARAMS, BATCH), expected, rtol=1e-5)


def test_a_key_turns_dropout_on() -> None:
    model = EncoderDecoderModel(tiny_t5(dropout_rate=0.5), z_loss=0.0)
    loss = quick_jit(model.loss)
    assert float(loss(PARAMS, BATCH).loss.total) == pytest.approx(float(run_loss(BATCH).loss.total), rel=1e-6)
    drawn = [float(loss(PARAMS, BATCH, jax.random.key(seed)).loss.total) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != pytest.approx(float(run_loss(BATCH).loss.total), rel=1e-3)


def generate(decoder: DecodeFn, eos_id: int = VOCAB, start_id: int = 0) -> Decoded:
    model = dataclasses.replace(MODEL, eos_id=eos_id, start_id=start_id)
    return quick_jit(model.generate, static_argnames=("decoder", "max_length"))(
        PARAMS, BATCH, decoder=decoder, max_length=7
    )


@functools.cache
def naive_greedy(start_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and their log-probabilities, without a cache: all is computed again for every token."""
    run = quick_jit(MODEL.logits)
    outputs, log_probs = np.zeros((3, 8), np.int32), np.zeros((3, 7))
    outputs[:, 0] = start_id
    for position in range(7):
        found = run(PARAMS, BATCH | {"decoder_input_tokens": outputs[:, :7]})
        found = log_softmax(np.asarray(found, np.float64))[:, position]
        outputs[:, position + 1], log_probs[:, position] = found.argmax(-1), found.max(-1)
    return outputs[:, 1:], log_probs


def test_greedy_takes_the_likeliest_token_after_the_start() -> None:
    tokens, log_probs = naive_greedy(start_id=5)
    found = generate(Greedy(), start_id=5)
    np.testing.assert_array_equal(found.tokens[:, 0], tokens)
    np.testing.assert_allclose(found.scores[:, 0], log_probs.sum(-1), rtol=1e-5)
    assert (tokens != naive_greedy(start_id=0)[0]).any()


def test_generation_stops_at_the_end_token() -> None:
    tokens, log_probs = naive_greedy(start_id=0)
    eos_id = int(tokens[1, 2])
    first = np.where((tokens == eos_id).any(-1), (tokens == eos_id).argmax(-1), 7)
    assert first[1] <= 2 and len(set(first)) > 1
    kept = np.arange(7) <= first[:, None]
    found = generate(Greedy(), eos_id)
    np.testing.assert_array_equal(found.tokens[:, 0], np.where(kept, tokens, 0))
    np.testing.assert_allclose(found.scores[:, 0], (log_probs * kept).sum(-1), rtol=1e-5)
    beam = generate(BeamSearch(1, length_penalty=0.0), eos_id)
    np.testing.assert_array_equal(beam.tokens, found.tokens)
    np.testing.assert_allclose(beam.scores, found.scores, rtol=1e-5)


def test_beams_score_their_own_tokens() -> None:
    found = generate(BeamSearch(3, length_penalty=0.0))
    for beam in range(3):
        targets = np.asarray(found.tokens[:, beam])
        batch = {
            "encoder_input_tokens": BATCH["encoder_input_tokens"],
            "decoder_target_tokens": targets,
            "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
            "decoder_loss_weights": np.ones_like(targets),
        }
        np.testing.assert_allclose(found.scores[:, beam], score(PARAMS, batch), rtol=1e-5)


def test_logical_axes_name_every_dimension() -> None:
    shapes = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), BATCH))
    axes = MODEL.logical_axes(BATCH)
    jax.tree.map(lambda leaf, names: np.testing.assert_equal(len(names), leaf.ndim), shapes, axes)
    assert axes["decoder"]["logits_dense"]["kernel"] == ("embed", "vocab")


def test_parameters_do_not_depend_on_the_batch() -> None:
    fresh = [
        jax.eval_shape(lambda b=batch: MODEL.init(jax.random.key(0), b)) for batch in (BATCH, tiny_batch(1, 1, 2, 3))
    ]
    assert fresh[0] == fresh[1]


def test_converter_reads_inputs_and_targets() -> None:
    assert MODEL.converter == EncoderDecoderFeatures()
