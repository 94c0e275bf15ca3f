"""Where a token stands: T5's relative position buckets."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from t5x_like.layers.parameters import parameter
from t5x_like.typing import Array, Float, Int


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
    def __call__(
        self, query_positions: Int[Array, " q_len"], key_positions: Int[Array, " k_len"]
    ) -> Float[Array, "1 heads q_len k_len"]:
        """The bias between positions; only differences count, so packed rows may use their plain column numbers."""
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        table = parameter(self, "rel_embedding", init, ("heads", None), (self.num_heads, self.num_buckets))
        distance = key_positions[None, :] - query_positions[:, None]
        bucket = relative_position_bucket(distance, self.bidirectional, self.num_buckets, self.max_distance)
        return jnp.take(table, bucket, axis=1)[None]
