"""A T5 small enough to compile in a second, with every part that tests swap."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.architectures.stack import LayerStack
from t5x_like.architectures.t5 import T5
from t5x_like.architectures.transformer import Decoder, DecoderLayer, Encoder, EncoderLayer
from t5x_like.layers.attention import MultiHeadAttention
from t5x_like.layers.embeddings import Embedding
from t5x_like.layers.linear import Linear
from t5x_like.layers.mlp import MlpBlock
from t5x_like.layers.positions import RelativePositionBias
from t5x_like.models.encoder_decoder import EncoderDecoderModel
from t5x_like.typing import Params

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""For tests, which compile for longer than they compute."""

VOCAB, EMBED, HEADS, HEAD_DIM, MLP = 19, 10, 3, 4, 14
ENCODER_LAYERS, DECODER_LAYERS = 1, 2


def tiny_t5(
    scan: bool = False,
    remat: str | None = None,
    bias_per_layer: bool = False,
    tied: bool = False,
    dropout_rate: float = 0.0,
    dtype: str = "float32",
) -> T5:
    """T5 1.1; `tied`: 1.0's logits; `bias_per_layer`: UMT5."""
    attention = MultiHeadAttention(HEADS, HEAD_DIM, dropout_rate, dtype)
    mlp = MlpBlock(MLP, ("gelu", "linear"), dropout_rate, dtype)

    def bias(bidirectional: bool) -> nn.Module:
        return RelativePositionBias(HEADS, num_buckets=8, max_distance=12, bidirectional=bidirectional)

    encoder_layer = EncoderLayer(attention, mlp, dropout_rate, relpos_bias=bias(True) if bias_per_layer else None)
    decoder_layer = DecoderLayer(
        attention, attention, mlp, dropout_rate, relpos_bias=bias(False) if bias_per_layer else None
    )
    return T5(
        token_embedder=Embedding(VOCAB, EMBED, dtype),
        encoder=Encoder(
            LayerStack((encoder_layer,), ENCODER_LAYERS, scan, remat),
            dropout_rate,
            relpos_bias=None if bias_per_layer else bias(True),
        ),
        decoder=Decoder(
            LayerStack((decoder_layer,), DECODER_LAYERS, scan, remat),
            dropout_rate,
            relpos_bias=None if bias_per_layer else bias(False),
            logits_dense=None if tied else Linear((VOCAB,), ("embed", "vocab")),
        ),
        scale_decoder_output=tied,
    )


def tiny_batch(seed: int = 0, rows: int = 3, encoder_length: int = 9, length: int = 7) -> dict[str, np.ndarray]:
    """Random tokens, with padding at the end of every row but the first."""
    rng = np.random.default_rng(seed)

    def tokens(length: int) -> np.ndarray:
        drawn = rng.integers(2, VOCAB, (rows, length)).astype(np.int32)
        return np.where(np.arange(length) < length - np.arange(rows)[:, None], drawn, 0).astype(np.int32)

    inputs, targets = tokens(encoder_length), tokens(length)
    return {
        "encoder_input_tokens": inputs,
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_loss_weights": (targets != 0).astype(np.int32),
    }


def random_params(model: EncoderDecoderModel, seed: int = 0) -> Params:
    """Parameters that all matter, unlike fresh ones: norms' scales are not 1. Compiles nothing."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tiny_batch()))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.0, 0.5, leaf.shape), leaf.dtype), shapes)
