"""From what sparse layers report to a model's loss and metrics; and that scan and remat change none of it."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tiny_t5 import VOCAB, random_params, tiny_batch, tiny_t5

from t5x_like.architectures.stack import LayerStack
from t5x_like.architectures.variables import named_leaves, router_reports
from t5x_like.layers.moe import REPORTS, Experts, RouterReport, SparseMlp
from t5x_like.layers.routing import FixedCapacity, Router, TopK
from t5x_like.models.encoder_decoder import EncoderDecoderModel
from t5x_like.models.routing_metrics import auxiliary_loss, routing_metrics, sum_tokens
from t5x_like.typing import Array, Params


def report(tokens: float, *scalars: float, load: tuple[float, ...]) -> RouterReport:
    return RouterReport(*map(jnp.float32, (tokens, *scalars)), load=jnp.asarray(load, jnp.float32))


# tokens, loss, balance_loss, z_loss, entropy, confidence, dropped
REPORT = {
    "encoder/layers_1": report(10, 5, 20, 30, 4, 6, 2, load=(8, 0)),
    "decoder/layers_1": report(30, 60, 40, 10, 8, 10, 2, load=(14, 14)),
    "decoder/layers_3": report(0, 0, 0, 0, 0, 0, 0, load=(0, 0)),  # all padding
}


def test_the_auxiliary_loss_is_a_mean_over_tokens_and_a_sum_over_layers() -> None:
    assert auxiliary_loss(REPORT) == 5 / 10 + 60 / 30
    assert auxiliary_loss({}) == 0
    assert sum_tokens(REPORT) == 40
    assert sum_tokens({}) == 0


def test_metrics_of_every_layer_and_of_all() -> None:
    means = {name: np.asarray(metric.mean()).tolist() for name, metric in routing_metrics(REPORT).items()}
    layer = {"balance_loss": 2.0, "z_loss": 3.0, "entropy": 0.4, "confidence": 0.6, "dropped": 0.2, "load": [0.8, 0.0]}
    every = {"balance_loss": 1.5, "z_loss": 1.0, "entropy": 0.3, "confidence": 0.4, "dropped": 0.1}
    assert {name for name in means if name.count("/") == 1} == {f"router/{name}" for name in every}
    for prefix, expected in (("router", every), ("router/encoder/layers_1", layer)):
        for name, value in expected.items():
            np.testing.assert_allclose(means[f"{prefix}/{name}"], value, rtol=1e-6, err_msg=f"{prefix}/{name}")
    np.testing.assert_allclose(means["router/decoder/layers_1/load"], [14 / 30, 14 / 30], rtol=1e-6)
    assert means["router/decoder/layers_3/load"] == [0.0, 0.0]
    assert len(means) == 5 + 3 * 6
    assert routing_metrics({}) == {}


def test_reports_of_scanned_layers_are_taken_apart() -> None:
    pair = jax.tree.map(lambda a, b: jnp.stack([a, b]), REPORT["encoder/layers_1"], REPORT["decoder/layers_1"])
    variables = {
        "encoder": {"layers": {"mlp": {"report": pair}}},
        "decoder": {"layers_0": {"mlp": {"report": REPORT["encoder/layers_1"]}}},
    }
    found = router_reports({REPORTS: variables}, {"encoder": {"layers": {"mlp": {}}}})
    assert list(found) == ["decoder/layers_0", "encoder/layers_0", "encoder/layers_1"]
    assert [float(each.tokens) for each in found.values()] == [10, 10, 30]
    np.testing.assert_array_equal(found["encoder/layers_1"].load, [14, 14])
    assert router_reports({}, {}) == {}


def test_the_loss_has_the_auxiliary_loss_once_per_target_token() -> None:
    model, batch = EncoderDecoderModel(tiny_t5()), tiny_batch()
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7, VOCAB)), jnp.float32)
    quiet, loud = (jax.jit(model.loss_of)(logits, reports, batch) for reports in ({}, REPORT))
    assert loud.loss.weight == quiet.loss.weight == 7 + 6 + 5
    np.testing.assert_allclose(loud.loss.mean() - quiet.loss.mean(), 2.5, rtol=1e-5)
    assert loud.metrics.keys() - quiet.metrics.keys() == routing_metrics(REPORT).keys()


# ---- In a T5

SPARSE = SparseMlp(Experts(3, 8), Router(TopK(2), balance_loss=0.5, z_loss=0.1), FixedCapacity(4))
BATCH = tiny_batch()


def switch(scan: bool = False, remat: str | None = None) -> EncoderDecoderModel:
    """The encoder's second and fourth layers are sparse, and the decoder's only one."""
    network = tiny_t5()

    def sparse(layer: nn.Module) -> nn.Module:
        return dataclasses.replace(layer, mlp=SPARSE)

    (dense,), (decoder_layer,) = network.encoder.stack.pattern, network.decoder.stack.pattern
    encoder = LayerStack((dense, sparse(dense)), 2, scan, remat)
    decoder = LayerStack((sparse(decoder_layer),), 1, scan, remat)
    return EncoderDecoderModel(
        dataclasses.replace(
            network,
            encoder=dataclasses.replace(network.encoder, stack=encoder),
            decoder=dataclasses.replace(network.decoder, stack=decoder),
        )
    )


def stacked(params: Params) -> Params:
    """Weights of a loop as scan wants them."""

    def joined(*layers: Params) -> Params:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *layers)

    def rest(side: Params) -> Params:
        return {name: leaf for name, leaf in side.items() if not name.startswith("layers_")}

    encoder, decoder = params["encoder"], params["decoder"]
    block = {f"layers_{i}": joined(encoder[f"layers_{i}"], encoder[f"layers_{i + 2}"]) for i in range(2)}
    return params | {
        "encoder": rest(encoder) | {"layers": block},
        "decoder": rest(decoder) | {"layers": joined(decoder["layers_0"])},
    }


Outcome = tuple[float, Params, dict[str, RouterReport]]


@functools.cache
def outcome(scan: bool, remat: str | None) -> Outcome:
    """Loss, gradients with respect to the loop's weights, and reports."""
    model = switch(scan, remat)

    def loss(params: Params) -> tuple[Array, dict[str, RouterReport]]:
        params = stacked(params) if scan else params
        logits, reports = model.forward(params, BATCH)
        return model.loss_of(logits, reports, BATCH).loss.mean(), reports

    (value, reports), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(random_params(switch()))
    return float(value), gradients, reports


def test_scan_and_remat_change_neither_loss_nor_gradients_nor_reports() -> None:
    found, expected = outcome(True, "full"), outcome(False, None)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for (name, leaf), (_, wanted) in zip(named_leaves(found[1]), named_leaves(expected[1]), strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=2e-5, atol=2e-5, err_msg=name)
    by_order = zip(sorted(found[2].items()), sorted(expected[2].items()), strict=True)
    for (_, values), (name, wanted) in by_order:
        jax.tree.map(lambda a, b, name=name: np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=name), values, wanted)


def test_reports_are_named_as_layers_of_a_loop_are() -> None:
    names = ["decoder/layers_0", "encoder/layers_1", "encoder/layers_3"]
    assert sorted(outcome(False, None)[2]) == names
    assert sorted(outcome(True, "full")[2]) == names


def test_reports_count_the_real_tokens_of_both_sides() -> None:
    """The decoder reads a start token, which is real, and then its targets but for the last column."""
    reports = outcome(False, None)[2]
    real = {"encoder": 9 + 8 + 7, "decoder": 7 + 7 + 6}
    for name, each in reports.items():
        assert each.tokens == real[name.split("/")[0]]
        assert each.tokens - each.dropped <= each.load.sum() <= 2 * (each.tokens - each.dropped)
