"""The smallest networks of the family: a decoder that stands alone, and an encoder for any head."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.architectures.bert import Bert
from t5x_like.architectures.gpt import Gpt
from t5x_like.architectures.stack import LayerStack
from t5x_like.architectures.transformer import Decoder, DecoderLayer, Encoder, EncoderLayer
from t5x_like.layers.attention import MultiHeadAttention
from t5x_like.layers.embeddings import Embedding, InputEmbedding, LearnedPositions
from t5x_like.layers.mlp import MlpBlock
from t5x_like.layers.norms import LayerNorm
from t5x_like.layers.residual import PostNorm
from t5x_like.models.network import NetworkModel
from t5x_like.typing import Batch, Params

VOCAB, EMBED = 17, 12
ATTENTION = MultiHeadAttention(3, 4, scaled=True, use_bias=True)
MLP = MlpBlock(10, ("gelu_exact",), use_bias=True)


def embedder(segments: bool) -> InputEmbedding:
    return InputEmbedding(
        tokens=Embedding(VOCAB, EMBED, output_bias=segments),
        positions=LearnedPositions(32, EMBED, init_stddev=1.0),
        segments=Embedding(2, EMBED) if segments else None,
        norm=LayerNorm() if segments else None,
    )


def tiny_gpt(prefix_lm: bool = False, scan: bool = False) -> Gpt:
    layer = DecoderLayer(ATTENTION, None, MLP, norm=LayerNorm())
    return Gpt(embedder(segments=False), Decoder(LayerStack((layer,), 2, scan), norm=LayerNorm()), prefix_lm)


def tiny_bert(head: nn.Module) -> Bert:
    layer = EncoderLayer(ATTENTION, MLP, norm=LayerNorm(), residual=PostNorm())
    return Bert(embedder(segments=True), Encoder(LayerStack((layer,), 2), norm=None), head)


def random_params(model: NetworkModel, batch: Batch, seed: int = 0) -> Params:
    """Parameters that all matter, biases too. Compiles nothing."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32), shapes)
