"""One network in several forms: looped and scanned, recomputed, cached, packed, in half precision, with dropout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_t5 import DECODER_LAYERS, ENCODER_LAYERS, VOCAB, quick_jit, random_params, tiny_batch, tiny_t5

from t5x_like.architectures.stack import reorder_cache
from t5x_like.architectures.t5 import T5
from t5x_like.models.encoder_decoder import EncoderDecoderModel
from t5x_like.typing import Params

BATCH = tiny_batch()


def stacked(params: Params) -> Params:
    """From a loop's parameters to a scan's."""
    params = dict(params)
    for half, layers in (("encoder", ENCODER_LAYERS), ("decoder", DECODER_LAYERS)):
        others = {name: leaf for name, leaf in params[half].items() if not name.startswith("layers_")}
        each = [params[half][f"layers_{i}"] for i in range(layers)]
        params[half] = others | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *each)}
    return params


@functools.cache
def parameters(**settings: bool) -> Params:
    return random_params(EncoderDecoderModel(tiny_t5(**settings)))


@functools.cache
def logits(network: T5) -> np.ndarray:
    """Teacher-forced, for `BATCH`, with the parameters of the looped network."""
    model = EncoderDecoderModel(network)
    params = parameters(bias_per_layer=network.encoder.relpos_bias is None)
    return np.asarray(quick_jit(model.logits)(stacked(params) if network.encoder.stack.scan else params, BATCH))


@functools.cache
def loss_and_gradient(network: T5) -> tuple[float, Params]:
    """Of `BATCH`; `test_stack` has all remat policies, and dropout, which is slow to compile."""
    model = EncoderDecoderModel(network)
    params = stacked(parameters()) if network.encoder.stack.scan else parameters()
    loss, gradient = quick_jit(jax.value_and_grad(lambda p: model.loss(p, BATCH).loss.total))(params)
    return float(loss), gradient


def assert_close(found: tuple[float, Params], expected: tuple[float, Params]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found[1], expected[1])
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(found[1]))


@pytest.mark.parametrize("bias_per_layer", [False, True])
def test_scan_gives_the_logits_of_the_loop(bias_per_layer: bool) -> None:
    scanned = logits(tiny_t5(scan=True, bias_per_layer=bias_per_layer))
    np.testing.assert_allclose(scanned, logits(tiny_t5(bias_per_layer=bias_per_layer)), rtol=1e-5, atol=1e-5)


def test_scan_gives_the_gradients_of_the_loop() -> None:
    loss, gradient = loss_and_gradient(tiny_t5())
    assert_close(loss_and_gradient(tiny_t5(scan=True)), (loss, stacked(gradient)))


def test_recomputing_changes_no_loss_and_no_gradient() -> None:
    assert_close(loss_and_gradient(tiny_t5(scan=True, remat="minimal")), loss_and_gradient(tiny_t5(scan=True)))


def test_remat_policies_recompute_more_and_more() -> None:
    def products(remat: str | None) -> int:
        model = EncoderDecoderModel(tiny_t5(remat=remat))
        jaxpr = jax.make_jaxpr(jax.grad(lambda p: model.loss(p, BATCH).loss.total))(parameters())
        return str(jaxpr).count("dot_general")

    none, dots, minimal, full = (products(remat) for remat in (None, "dots", "minimal", "full"))
    layers, attentions = ENCODER_LAYERS + DECODER_LAYERS, ENCODER_LAYERS + 2 * DECODER_LAYERS
    matrices = 4 * attentions + 3 * layers
    assert dots == none
    assert minimal - none == 2 * attentions  # logits, and values mixed
    assert full - minimal == matrices - layers  # a layer's last matrix is not needed again


NETWORKS = {
    "loop": tiny_t5(),
    "scan": tiny_t5(scan=True),
    "a bias in each layer": tiny_t5(bias_per_layer=True),
    "scan, a bias in each layer": tiny_t5(scan=True, bias_per_layer=True),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_cached_steps_give_the_logits_of_teacher_forcing(name: str) -> None:
    network = NETWORKS[name]
    params = parameters(bias_per_layer=network.encoder.relpos_bias is None)
    variables = {"params": stacked(params) if network.encoder.stack.scan else params}
    encode = quick_jit(functools.partial(network.apply, method="encode"))
    make_cache = quick_jit(functools.partial(network.apply, method="make_cache", mutable=["cache"]))
    decode_step = quick_jit(functools.partial(network.apply, method="decode_step", mutable=["cache"]), static_argnums=3)

    inputs, outputs = jnp.asarray(BATCH["encoder_input_tokens"]), jnp.asarray(BATCH["decoder_input_tokens"])
    length, real = outputs.shape[1], inputs != 0
    _, state = make_cache(variables, encode(variables, inputs), jnp.zeros_like(outputs))
    position, expected = 0, logits(network)
    for step in (1, 3, 3):
        tokens = outputs[:, position : position + step]
        out, state = decode_step(variables | state, tokens, jnp.asarray(position), length, real)
        np.testing.assert_allclose(out, expected[:, position : position + step], rtol=1e-5, atol=1e-5)
        if position == 0:  # as beam search does
            rows = jnp.asarray([2, 0, 1])
            state, outputs, real = {"cache": reorder_cache(state["cache"], rows)}, outputs[rows], real[rows]
            expected = expected[rows]
        position += step
    assert position == length


def test_reorder_cache_may_grow_the_batch() -> None:
    cache = {"layers": {"key": jnp.arange(6).reshape(3, 2)}, "layers_0": {"key": jnp.asarray([10, 20])}}
    grown = reorder_cache(cache, jnp.asarray([1, 1, 0]))
    assert grown["layers"]["key"].tolist() == [[1, 1, 0], [3, 3, 2], [5, 5, 4]]
    assert grown["layers_0"]["key"].tolist() == [20, 20, 10]


def test_padding_of_the_encoder_changes_nothing() -> None:
    longer = BATCH | {"encoder_input_tokens": np.pad(BATCH["encoder_input_tokens"], ((0, 0), (0, 4)))}
    found = quick_jit(EncoderDecoderModel(tiny_t5()).logits)(parameters(), longer)
    np.testing.assert_allclose(found, logits(tiny_t5()), rtol=1e-5, atol=1e-5)


def test_no_token_sees_what_comes_after_it() -> None:
    model = EncoderDecoderModel(tiny_t5())
    outputs = BATCH["decoder_input_tokens"].copy()
    outputs[:, 4] = (outputs[:, 4] + 1) % VOCAB
    found = np.asarray(quick_jit(model.logits)(parameters(), BATCH | {"decoder_input_tokens": outputs}))
    np.testing.assert_array_equal(found[:, :4], logits(tiny_t5())[:, :4])
    assert (np.abs(found - logits(tiny_t5()))[:, 4:].max(axis=-1) > 1e-3).all()


def test_tied_logits_are_scaled_inner_products_with_the_embedding() -> None:
    params = random_params(EncoderDecoderModel(tiny_t5(tied=True)))
    tied = quick_jit(EncoderDecoderModel(tiny_t5(tied=True)).logits)(params, BATCH)
    head = params["token_embedder"]["embedding"].T * 10**-0.5
    untied = params | {"decoder": params["decoder"] | {"logits_dense": {"kernel": head}}}
    expected = quick_jit(EncoderDecoderModel(tiny_t5()).logits)(untied, BATCH)
    np.testing.assert_allclose(tied, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["loop", "scan, a bias in each layer"])
def test_packed_examples_do_not_see_each_other(name: str) -> None:
    network = NETWORKS[name]
    params = parameters(bias_per_layer=network.encoder.relpos_bias is None)
    params = stacked(params) if network.encoder.stack.scan else params
    run = quick_jit(EncoderDecoderModel(network).logits)

    apart = tiny_batch(1, rows=2, encoder_length=5, length=4)
    batch = {name: np.pad(array.reshape(1, -1), ((0, 0), (0, 2))) for name, array in apart.items()}
    batch["encoder_segment_ids"] = np.asarray([[1] * 5 + [2] * 5 + [0] * 2], np.int32)
    batch["decoder_segment_ids"] = np.asarray([[1] * 4 + [2] * 4 + [0] * 2], np.int32)
    encoder, decoder = (slice(0, 5), slice(5, 10)), (slice(0, 4), slice(4, 8))
    together, expected = np.asarray(run(params, batch)), run(params, apart)
    for i in range(2):
        np.testing.assert_allclose(together[0, decoder[i]], expected[i], rtol=1e-5, atol=1e-5)

    for changed, kept in ((0, 1), (1, 0)):
        other = {field: array.copy() for field, array in batch.items()}
        for tokens, place in (("encoder_input_tokens", encoder), ("decoder_input_tokens", decoder)):
            other[tokens][:, place[changed]] = 2 + (other[tokens][:, place[changed]] + 3) % (VOCAB - 2)
        found = np.asarray(run(params, other))
        np.testing.assert_array_equal(found[:, decoder[kept]], together[:, decoder[kept]])
        assert np.abs(found - together)[:, decoder[changed]].max() > 1e-2


def test_bfloat16_is_close_and_keeps_parameters_and_logits_in_float32() -> None:
    half, full = logits(tiny_t5(dtype="bfloat16")), logits(tiny_t5())
    assert half.dtype == np.float32
    error = np.sqrt(np.mean((half - full) ** 2)) / full.std()
    assert 2**-10 < error < 2**-5
