"""Names, shapes and logical axes: the checkpoint format. A change here breaks every checkpoint there is."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from tiny_t5 import tiny_batch, tiny_t5

from t5x_like.architectures.t5 import T5
from t5x_like.architectures.variables import named_axes, named_leaves
from t5x_like.models.encoder_decoder import EncoderDecoderModel

Golden = dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]

OUTSIDE: Golden = {
    "token_embedder/embedding": ((19, 10), ("vocab", "embed")),
    "encoder/encoder_norm/scale": ((10,), ("embed",)),
    "decoder/decoder_norm/scale": ((10,), ("embed",)),
}
SHARED_BIAS: Golden = {
    "encoder/relpos_bias/rel_embedding": ((3, 8), ("heads", None)),
    "decoder/relpos_bias/rel_embedding": ((3, 8), ("heads", None)),
}
HEAD: Golden = {"decoder/logits_dense/kernel": ((10, 19), ("embed", "vocab"))}
ENCODER_LAYER: Golden = {
    "pre_attention_layer_norm/scale": ((10,), ("embed",)),
    "attention/query/kernel": ((10, 3, 4), ("embed", "heads", "head_dim")),
    "attention/key/kernel": ((10, 3, 4), ("embed", "heads", "head_dim")),
    "attention/value/kernel": ((10, 3, 4), ("embed", "heads", "head_dim")),
    "attention/out/kernel": ((3, 4, 10), ("heads", "head_dim", "embed")),
    "pre_mlp_layer_norm/scale": ((10,), ("embed",)),
    "mlp/wi_0/kernel": ((10, 14), ("embed", "mlp")),
    "mlp/wi_1/kernel": ((10, 14), ("embed", "mlp")),
    "mlp/wo/kernel": ((14, 10), ("mlp", "embed")),
}
DECODER_LAYER: Golden = {
    "pre_self_attention_layer_norm/scale": ((10,), ("embed",)),
    "self_attention/query/kernel": ((10, 3, 4), ("embed", "heads", "head_dim")),
    "self_attention/key/kernel": ((10, 3, 4), ("embed", "heads", "head_dim")),
    "self_attention/value/kernel": ((10, 3, 4), ("embed", "heads", "head_dim")),
    "self_attention/out/kernel": ((3, 4, 10), ("heads", "head_dim", "embed")),
    "pre_cross_attention_layer_norm/scale": ((10,), ("embed",)),
    "encoder_decoder_attention/query/kernel": ((10, 3, 4), ("embed", "heads", "head_dim")),
    "encoder_decoder_attention/key/kernel": ((10, 3, 4), ("embed", "heads", "head_dim")),
    "encoder_decoder_attention/value/kernel": ((10, 3, 4), ("embed", "heads", "head_dim")),
    "encoder_decoder_attention/out/kernel": ((3, 4, 10), ("heads", "head_dim", "embed")),
    "pre_mlp_layer_norm/scale": ((10,), ("embed",)),
    "mlp/wi_0/kernel": ((10, 14), ("embed", "mlp")),
    "mlp/wi_1/kernel": ((10, 14), ("embed", "mlp")),
    "mlp/wo/kernel": ((14, 10), ("mlp", "embed")),
}
SCANNED_ENCODER: Golden = {
    "encoder/layers/pre_attention_layer_norm/scale": ((10, 1), ("embed", "layers")),
    "encoder/layers/attention/query/kernel": ((10, 1, 3, 4), ("embed", "layers", "heads", "head_dim")),
    "encoder/layers/attention/key/kernel": ((10, 1, 3, 4), ("embed", "layers", "heads", "head_dim")),
    "encoder/layers/attention/value/kernel": ((10, 1, 3, 4), ("embed", "layers", "heads", "head_dim")),
    "encoder/layers/attention/out/kernel": ((3, 1, 4, 10), ("heads", "layers", "head_dim", "embed")),
    "encoder/layers/pre_mlp_layer_norm/scale": ((10, 1), ("embed", "layers")),
    "encoder/layers/mlp/wi_0/kernel": ((10, 1, 14), ("embed", "layers", "mlp")),
    "encoder/layers/mlp/wi_1/kernel": ((10, 1, 14), ("embed", "layers", "mlp")),
    "encoder/layers/mlp/wo/kernel": ((14, 1, 10), ("mlp", "layers", "embed")),
}
SCANNED_DECODER: Golden = {
    "decoder/layers/pre_self_attention_layer_norm/scale": ((10, 2), ("embed", "layers")),
    "decoder/layers/self_attention/query/kernel": ((10, 2, 3, 4), ("embed", "layers", "heads", "head_dim")),
    "decoder/layers/self_attention/key/kernel": ((10, 2, 3, 4), ("embed", "layers", "heads", "head_dim")),
    "decoder/layers/self_attention/value/kernel": ((10, 2, 3, 4), ("embed", "layers", "heads", "head_dim")),
    "decoder/layers/self_attention/out/kernel": ((3, 2, 4, 10), ("heads", "layers", "head_dim", "embed")),
    "decoder/layers/pre_cross_attention_layer_norm/scale": ((10, 2), ("embed", "layers")),
    "decoder/layers/encoder_decoder_attention/query/kernel": ((10, 2, 3, 4), ("embed", "layers", "heads", "head_dim")),
    "decoder/layers/encoder_decoder_attention/key/kernel": ((10, 2, 3, 4), ("embed", "layers", "heads", "head_dim")),
    "decoder/layers/encoder_decoder_attention/value/kernel": ((10, 2, 3, 4), ("embed", "layers", "heads", "head_dim")),
    "decoder/layers/encoder_decoder_attention/out/kernel": ((3, 2, 4, 10), ("heads", "layers", "head_dim", "embed")),
    "decoder/layers/pre_mlp_layer_norm/scale": ((10, 2), ("embed", "layers")),
    "decoder/layers/mlp/wi_0/kernel": ((10, 2, 14), ("embed", "layers", "mlp")),
    "decoder/layers/mlp/wi_1/kernel": ((10, 2, 14), ("embed", "layers", "mlp")),
    "decoder/layers/mlp/wo/kernel": ((14, 2, 10), ("mlp", "layers", "embed")),
}
LAYER_BIAS: Golden = {"relpos_bias/rel_embedding": ((3, 8), ("heads", None))}


def looped(encoder_layer: Golden, decoder_layer: Golden) -> Golden:
    return {
        **{f"encoder/layers_{i}/{name}": leaf for i in range(1) for name, leaf in encoder_layer.items()},
        **{f"decoder/layers_{i}/{name}": leaf for i in range(2) for name, leaf in decoder_layer.items()},
    }


@pytest.mark.parametrize(
    ("network", "golden"),
    [
        (tiny_t5(), OUTSIDE | SHARED_BIAS | HEAD | looped(ENCODER_LAYER, DECODER_LAYER)),
        (tiny_t5(tied=True), OUTSIDE | SHARED_BIAS | looped(ENCODER_LAYER, DECODER_LAYER)),
        (tiny_t5(bias_per_layer=True), OUTSIDE | HEAD | looped(ENCODER_LAYER | LAYER_BIAS, DECODER_LAYER | LAYER_BIAS)),
        (tiny_t5(scan=True), OUTSIDE | SHARED_BIAS | HEAD | SCANNED_ENCODER | SCANNED_DECODER),
        (tiny_t5(scan=True, remat="full"), OUTSIDE | SHARED_BIAS | HEAD | SCANNED_ENCODER | SCANNED_DECODER),
        (tiny_t5(remat="full"), OUTSIDE | SHARED_BIAS | HEAD | looped(ENCODER_LAYER, DECODER_LAYER)),
    ],
    ids=["t5_1_1", "t5_1_0", "umt5", "scan", "scan and remat", "remat"],
)
def test_names_shapes_and_axes(network: T5, golden: Golden) -> None:
    model = EncoderDecoderModel(network)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tiny_batch()))
    axes = dict(named_axes(model.logical_axes(tiny_batch())))
    assert {name: (leaf.shape, axes[name]) for name, leaf in named_leaves(shapes)} == golden
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("float32")}
    assert len(axes) == len(golden)


def test_networks_compare_by_value() -> None:
    assert tiny_t5() == tiny_t5()
    assert EncoderDecoderModel(tiny_t5(scan=True)) == EncoderDecoderModel(tiny_t5(scan=True))
    for other in (
        tiny_t5(scan=True),
        tiny_t5(remat="full"),
        tiny_t5(tied=True),
        tiny_t5(dropout_rate=0.1),
        tiny_t5(dtype="bfloat16"),
        tiny_t5().clone(token_embedder=nn.Embed(19, 10)),
    ):
        assert other != tiny_t5()
