"""From token ids to vectors: tables of tokens, positions and segments, and their sum."""

import flax.linen as nn
import jax.numpy as jnp

from t5x_like.errors import UserError
from t5x_like.layers.logits import LazyLogits
from t5x_like.layers.parameters import parameter
from t5x_like.typing import Array, Float, Int


class Embedding(nn.Module):
    """A table of one vector per token.

    Attributes:
      vocab_size: rows; real checkpoints pad it to a multiple of 128.
      embed_dim: columns.
      dtype: of what comes out.
      init_stddev: T5 draws embeddings with a standard deviation of 1.
      output_bias: logits from the table have a learned bias (BERT).
      vocab_axis: the logical axis of the rows; None keeps a few of them, such as segments, on every device.
    """

    vocab_size: int
    embed_dim: int
    dtype: str = "float32"
    init_stddev: float = 1.0
    output_bias: bool = False
    vocab_axis: str | None = "vocab"

    def setup(self) -> None:
        """Makes the table, which `__call__` and `attend` share."""
        init, axes = nn.initializers.normal(self.init_stddev), (self.vocab_axis, "embed")
        self.embedding = parameter(self, "embedding", init, axes, (self.vocab_size, self.embed_dim))
        if self.output_bias:
            self.bias = parameter(self, "bias", nn.initializers.zeros, ("vocab",), (self.vocab_size,))

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "#batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length embed"]:
        """Looks tokens up, wherever they stand. Ids outside the table raise nothing: the data layer checks."""
        return jnp.take(self.embedding.astype(self.dtype), tokens, axis=0)

    def attend(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length vocab"]:
        """Logits from a tied table, in float32: the inner product with every row."""
        return self.logits(x).values()

    def logits(self, x: Float[Array, "batch length embed"]) -> LazyLogits:
        """`attend`, not multiplied out."""
        return LazyLogits(x.astype(jnp.float32), self.embedding, self.bias if self.output_bias else None)


class LearnedPositions(nn.Module):
    """A table of one vector per position (Gehring et al. 2017).

    Attributes:
      max_length: rows that positions can use.
      embed_dim: columns.
      dtype: of what comes out.
      init_stddev: of the table.
      padding_id: RoBERTa's way, if given: real tokens are numbered from padding_id + 1 on, in rows of their own.
    """

    max_length: int
    embed_dim: int
    dtype: str = "float32"
    init_stddev: float = 0.02
    padding_id: int | None = None

    @nn.compact
    def __call__(
        self, positions: Int[Array, "#batch length"], tokens: Int[Array, "batch length"]
    ) -> Float[Array, "#batch length embed"]:
        """Looks positions up; a sequence longer than the table is a `UserError`."""
        if tokens.shape[1] > self.max_length:
            raise UserError(
                f"LearnedPositions: {tokens.shape[1]} tokens in a row, but max_length is {self.max_length}; "
                "shorten TASK_FEATURE_LENGTHS, or build the model with more positions"
            )
        rows = self.max_length
        if self.padding_id is not None:
            rows += self.padding_id + 1
            real = (tokens != self.padding_id).astype(tokens.dtype)
            positions = jnp.cumsum(real, axis=1) * real + self.padding_id
        init = nn.initializers.normal(self.init_stddev)
        table = parameter(self, "embedding", init, (None, "embed"), (rows, self.embed_dim))
        return jnp.take(table.astype(self.dtype), positions, axis=0)


class SinusoidalPositions(nn.Module):
    """Sines and cosines of geometrically growing wavelengths (Vaswani et al. 2017, section 3.5).

    Sines fill the first half of the vector and cosines the second, as in the authors' code; the paper's formula takes
    turns, which is the same up to the order of columns.

    Attributes:
      embed_dim: even.
      dtype: of what comes out.
    """

    embed_dim: int
    dtype: str = "float32"

    def __call__(
        self, positions: Int[Array, "#batch length"], tokens: Int[Array, "batch length"]
    ) -> Float[Array, "#batch length embed"]:
        """Any position has its vector, whatever its token."""
        return sinusoids(positions, self.embed_dim).astype(self.dtype)


def sinusoids(positions: Int[Array, "rows length"], embed_dim: int) -> Float[Array, "rows length embed_dim"]:
    """The vectors of `SinusoidalPositions`; positions may be negative, as the distances of XLNet are."""
    half = embed_dim // 2
    rates = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * rates[None, None]
    return jnp.concatenate((jnp.sin(angles), jnp.cos(angles)), axis=-1)


class InputEmbedding(nn.Module):
    """The sum of what a token is, where it stands, and which segment it belongs to.

    Attributes:
      tokens: the table of tokens, tied to the output.
      positions: called with positions and tokens; None where attention alone knows them.
      segments: a table of segments (BERT's token types).
      norm: of the sum.
      scaled: multiply token vectors by sqrt(embed_dim), as the first Transformer does.
    """

    tokens: nn.Module
    positions: nn.Module | None = None
    segments: nn.Module | None = None
    norm: nn.Module | None = None
    scaled: bool = False

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "#batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length embed"]:
        """Embeds tokens; without `positions` they are columns, without `segment_ids` all in segment 0."""
        x = self.tokens(tokens)
        if self.scaled:
            x *= x.shape[-1] ** 0.5
        if self.positions is not None:
            columns = jnp.arange(tokens.shape[1])[None] if positions is None else positions
            x += jnp.broadcast_to(self.positions(columns, tokens), x.shape)
        if self.segments is not None:
            x += self.segments(jnp.zeros_like(tokens) if segment_ids is None else segment_ids)
        return x if self.norm is None else self.norm(x)

    def logits(self, x: Float[Array, "batch length embed"]) -> LazyLogits:
        """Logits from the tied table of tokens."""
        return self.tokens.logits(x)
