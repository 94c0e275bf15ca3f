"""Attention of two streams by distance: XLNet (Yang et al. 2019) on Transformer-XL (Dai et al. 2019).

Every token has a row in the content stream, which knows what stands there; every token to be predicted has another in
the query stream, which knows only where. Both read the content, with the same weights. So they are one sequence here:
the rows of content, and behind them those of the targets.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer

from t5x_like.errors import UserError
from t5x_like.layers.attention import Bias, attention_weights
from t5x_like.layers.dropout import Dropout
from t5x_like.layers.embeddings import sinusoids
from t5x_like.layers.linear import Linear, Normal
from t5x_like.layers.masks import Mask
from t5x_like.layers.parameters import parameter
from t5x_like.sharding import constrain
from t5x_like.typing import Array, Bool, Float, Int, PyTree, Shaped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TwoStreamMask(Mask):
    """Which rows of both streams see which keys; always written out, never cut.

    Attributes, beside those of `Mask`, which hold for the rows of content (`key_segments` must be given):
      hidden: `[batch, length, k_len]`, True where the order of factorisation hides a key from a token.
      target_positions: `[batch, targets]`, the column of each row of the query stream; there may be none.
      query_types: `[batch, length]`, the segment each token is of; segments see each other, but differently.
      key_types: `[batch, k_len]`, likewise.
    """

    hidden: PyTree = None
    target_positions: PyTree = None
    query_types: PyTree = None
    key_types: PyTree = None

    def allowed(self) -> Bool[Array, "batch 1 rows k_len"]:
        """True where a row sees a key. A row of content sees its own token, whatever hides it; a target does not."""
        seen = super().allowed()[:, 0] & ~self.hidden
        own = self.query_positions[:, None] == self.key_positions[None]
        return self._of_both(seen | own[None], seen)[:, None]

    def same_type(self) -> Bool[Array, "batch 1 rows k_len"]:
        """True where a row's token and a key are of the same segment."""
        same = self.query_types[:, :, None] == self.key_types[:, None]
        return self._of_both(same, same)[:, None]

    def row_positions(self) -> Int[Array, "batch rows"]:
        """The column of each row."""
        columns = jnp.broadcast_to(self.query_positions[None], self.query_types.shape)
        return jnp.concatenate((columns, self.target_positions), axis=1)

    def with_memory(self, size: int) -> "TwoStreamMask":
        """The mask with `size` more keys in front, which all rows see, and which are of segment 0."""
        front = ((0, 0), (size, 0))
        return dataclasses.replace(
            self,
            key_positions=jnp.concatenate((self.key_positions[0] + jnp.arange(-size, 0), self.key_positions)),
            key_segments=jnp.pad(self.key_segments, front, constant_values=1),
            hidden=jnp.pad(self.hidden, ((0, 0), *front)),
            key_types=jnp.pad(self.key_types, front),
        )

    def _of_both(
        self, content: Shaped[Array, "batch length k_len"], query: Shaped[Array, "batch length k_len"]
    ) -> Shaped[Array, "batch rows k_len"]:
        """What `content` says of every token, and behind it what `query` says of the targets."""
        return jnp.concatenate((content, jnp.take_along_axis(query, self.target_positions[..., None], axis=1)), axis=1)


class TwoStreamAttention(nn.Module):
    """Multi-head attention that knows distances, and remembers the text before.

    With a mutable `cache` it keeps what the content stream puts in, and the next call, for the text that follows, reads
    that too: Transformer-XL's memory, through which no gradient flows.

    Attributes:
      num_heads: heads.
      head_dim: size of each.
      dropout_rate: on the attention weights, one mask for all rows, and on the vectors of distances.
      dtype: of the products.
      memory_length: how many tokens are kept at most.
      kernel_init: draws all parameters, the biases too.
    """

    num_heads: int
    head_dim: int
    dropout_rate: float = 0.0
    dtype: str = "float32"
    memory_length: int = 0
    kernel_init: Initializer = Normal()

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch rows embed"], mask: TwoStreamMask, bias: Bias | None = None
    ) -> Float[Array, "batch rows embed"]:
        """Attends from the rows of both streams to the content (Dai et al. 2019, 3.3; Yang et al. 2019, 2.3-2.5).

        Args:
          x: rows of content, and behind them those of targets.
          mask: which rows see which tokens.
          bias: must be None, as what depends on distance is this module's own.

        Returns:
          Same shape as `x`.
        """
        if bias is not None:
            raise UserError("TwoStreamAttention knows distances by itself; let relpos_bias be None")
        length = len(mask.key_positions)
        content = self._with_memory(x[:, :length])
        mask = mask.with_memory(content.shape[1] - length)
        query, key, value = self._project("query", x), self._project("key", content), self._project("value", content)

        distances = sinusoids(jnp.arange(content.shape[1] - 1, -length, -1)[None], x.shape[-1])
        distance_key = self._project("distance", Dropout(self.dropout_rate)(distances))[0]
        by_distance = distance_logits(self._plus("distance_bias", query), distance_key, mask.row_positions(), length)
        segments = self._vectors("segment_embedding", 2)
        by_segment = jnp.einsum("bqhd,shd->bhqs", self._plus("segment_bias", query), segments)
        by_segment = jnp.where(mask.same_type(), by_segment[..., :1], by_segment[..., 1:])

        logits = (by_distance + by_segment).astype(jnp.float32)
        weights = attention_weights(self._plus("content_bias", query), key, logits, mask.allowed())
        value = Dropout(self.dropout_rate, broadcast_dims=(-1,))(value)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)
        mixed = constrain(mixed, "batch", "length", "heads", "head_dim")
        axes = ("heads", "head_dim", "embed")
        return Linear((x.shape[-1],), axes, 2, self.kernel_init, self.dtype, name="out")(mixed)

    def _project(self, name: str, x: Array) -> Array:
        features, axes = (self.num_heads, self.head_dim), ("embed", "heads", "head_dim")
        projected = Linear(features, axes, 1, self.kernel_init, self.dtype, name=name)(x)
        return constrain(projected, "batch", "length", "heads", "head_dim")

    def _plus(self, name: str, query: Array) -> Array:
        """Queries with a bias, divided by the square root of their size."""
        bias = jnp.broadcast_to(self._vectors(name), query.shape)
        return (query + bias) * self.head_dim**-0.5

    def _vectors(self, name: str, *count: int) -> Array:
        axes, shape = ("heads", "head_dim"), (self.num_heads, self.head_dim)
        vectors = parameter(self, name, self.kernel_init, (*(None for _ in count), *axes), (*count, *shape))
        return vectors.astype(self.dtype)

    def _with_memory(self, content: Array) -> Array:
        """Content behind what is remembered; remembers the end of both."""
        if self.has_variable("cache", "memory"):
            content = jnp.concatenate((self.get_variable("cache", "memory"), content), axis=1)
        if self.memory_length and self.is_mutable_collection("cache"):
            self.put_variable("cache", "memory", jax.lax.stop_gradient(content[:, -self.memory_length :]))
        return content


def distance_logits(
    query: Float[Array, "batch rows heads head_dim"],
    key: Float[Array, "distances heads head_dim"],
    positions: Int[Array, "batch rows"],
    length: int,
) -> Float[Array, "batch heads rows k_len"]:
    """Inner products of queries with the distances between them and all keys.

    Transformer-XL computes those with all distances there are, and shifts each row to its place (Dai et al. 2019,
    appendix B). Rows of the query stream stand anywhere, so here each row takes the window of its distances.

    Args:
      query: rows.
      key: of the distances (query - key) in descending order, from the greatest, `k_len - 1`, to `1 - length`.
      positions: of the rows, 0 being the first column behind the memory.
      length: columns where rows can be.
    """
    k_len = len(key) - length + 1

    def window(row: Float[Array, "heads distances"], position: Int[Array, ""]) -> Float[Array, "heads k_len"]:
        return jax.lax.dynamic_slice_in_dim(row, length - 1 - position, k_len, axis=-1)

    return jax.vmap(jax.vmap(window))(jnp.einsum("bqhd,rhd->bqhr", query, key), positions).swapaxes(1, 2)
