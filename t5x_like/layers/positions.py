"""Where a token stands: T5's relative position buckets."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.layers.parameters import parameter
from t5x_like.typing import Array, Float, Int, PyTree


def relative_position_bucket(
    relative_position: Int[Array, "q_len k_len"], bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[Array, "q_len k_len"]:
    """Buckets of the distance `key - query` (Raffel et al. 2020, section 2.1): near ones own one, far ones share (log).

    Half the buckets serve keys to the right if `bidirectional`; otherwise those share bucket 0. Distances from
    `max_distance` on share the last bucket.
    """
    offset = jnp.zeros_like(relative_position)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(relative_position > 0, num_buckets, 0).astype(relative_position.dtype)
        distance = jnp.abs(relative_position)
    else:
        distance = jnp.maximum(-relative_position, 0)
    exact = num_buckets // 2
    # Where buckets start is found on the host: the logarithm of a device may round their first distances out of them.
    growth = (max_distance / exact) ** (np.arange(1, num_buckets - exact) / (num_buckets - exact))
    starts = np.ceil(exact * growth - 1e-6).astype(np.int32)
    logarithmic = exact + jnp.searchsorted(starts, distance, side="right", method="compare_all")
    return offset + jnp.where(distance < exact, distance, logarithmic.astype(relative_position.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BucketBias:
    """T5's bias before it is written out, so that attention can compute any block of it by itself.

    A pytree, so that it passes through scan and rematerialisation. (Its arrays are annotated loosely: JAX also builds
    one of placeholders.)

    Attributes:
      table: a number per head and bucket, `[heads, num_buckets]`.
      query_positions: of each query, `[q_len]`.
      key_positions: of each key, `[k_len]`.
      bidirectional: see `relative_position_bucket`, as for the others.
      num_buckets: columns of the table.
      max_distance: from here on all distances look alike.
    """

    table: PyTree
    query_positions: PyTree
    key_positions: PyTree
    bidirectional: bool = dataclasses.field(metadata={"static": True})
    num_buckets: int = dataclasses.field(metadata={"static": True})
    max_distance: int = dataclasses.field(metadata={"static": True})

    def values(self) -> Float[Array, "1 heads q_len k_len"]:
        """The bias written out."""
        return self._of(self.key_positions[None, :] - self.query_positions[:, None])[None]

    def diagonals(self) -> Float[Array, "heads diagonals"]:
        """The bias where both positions are consecutive: entry `q_len - 1 + i` is that of column - row = i.

        `q_len + k_len - 1` numbers then say it all. They are NaN where a position does not follow the one before it,
        lest a bias that has no such diagonals be taken for one.
        """
        first = self.key_positions[0] - self.query_positions[-1]
        count = len(self.query_positions) + len(self.key_positions) - 1
        steps = jnp.concatenate([jnp.diff(self.query_positions), jnp.diff(self.key_positions)])
        return jnp.where((steps == 1).all(), self._of((first + jnp.arange(count))[None])[:, 0], jnp.nan)

    def queries(self, start: Int[Array, ""] | int, size: int) -> "BucketBias":
        """The bias of `size` queries from `start` on."""
        return dataclasses.replace(self, query_positions=_cut(self.query_positions, start, size))

    def keys(self, start: Int[Array, ""] | int, size: int) -> "BucketBias":
        """The bias of `size` keys from `start` on."""
        return dataclasses.replace(self, key_positions=_cut(self.key_positions, start, size))

    def _of(self, distance: Int[Array, "rows columns"]) -> Float[Array, "heads rows columns"]:
        bucket = relative_position_bucket(distance, self.bidirectional, self.num_buckets, self.max_distance)
        return jnp.take(self.table, bucket, axis=1)


def _cut(positions: Int[Array, " length"], start: Int[Array, ""] | int, size: int) -> Int[Array, " size"]:
    return jax.lax.dynamic_slice_in_dim(positions, start, size)


GLOROT = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")


class RelativePositionBias(nn.Module):
    """A learned number per head and bucket, added to attention logits.

    Attributes:
      num_heads: rows of the table.
      num_buckets: columns.
      max_distance: from here on all distances look alike.
      bidirectional: True in encoders.
    """

    num_heads: int
    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True

    @nn.compact
    def __call__(self, query_positions: Int[Array, " q_len"], key_positions: Int[Array, " k_len"]) -> BucketBias:
        """The bias between positions; only differences count, so packed rows may use their plain column numbers."""
        table = parameter(self, "rel_embedding", GLOROT, ("heads", None), (self.num_heads, self.num_buckets))
        buckets = (self.bidirectional, self.num_buckets, self.max_distance)
        return BucketBias(table, query_positions, key_positions, *buckets)
