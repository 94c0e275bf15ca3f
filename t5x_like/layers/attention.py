"""Attention: the formula, and the module that owns its four projections and its cache."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5x_like.layers.dropout import Dropout
from t5x_like.layers.linear import FanInNormal, Linear
from t5x_like.layers.masks import Mask
from t5x_like.sharding import constrain
from t5x_like.typing import Array, Float, Int

MASKED = -1e10
"""Stands in for minus infinity: finite, so that a query which sees nothing gets uniform weights instead of NaN."""


def attention_weights(
    query: Float[Array, "batch q_len heads head_dim"],
    key: Float[Array, "batch k_len heads head_dim"],
    bias: Float[Array, "#batch heads q_len k_len"] | None = None,
    mask: Mask | None = None,
) -> Float[Array, "batch heads q_len k_len"]:
    """How much each query takes from each key: a softmax in float32, since in bfloat16 it loses rare tokens."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32)
    if bias is not None:
        logits += jnp.broadcast_to(bias, logits.shape)
    if mask is not None:
        logits = jnp.where(mask, logits, MASKED)
    return jax.nn.softmax(logits)


class MultiHeadAttention(nn.Module):
    """Attention with learned projections and no biases (Vaswani et al. 2017, eq. 1, without its 1/sqrt(head_dim)).

    T5 folds that factor into the query's initialiser; updates scaled by the parameter's size keep it there.

    Attributes:
      num_heads: heads.
      head_dim: size of each; heads x head_dim need not be embed_dim (T5-11B: 128 x 128 against 1,024).
      dropout_rate: on the attention weights, one mask for all queries.
      dtype: of the products.
      init_scale: kernels have variance init_scale / fan_in, the query's a further head_dim below.
    """

    num_heads: int
    head_dim: int
    dropout_rate: float = 0.0
    dtype: str = "float32"
    init_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch q_len embed"],
        context: Float[Array, "batch k_len embed"] | None = None,
        bias: Float[Array, "#batch heads q_len _"] | None = None,
        mask: Mask | None = None,
        position: Int[Array, ""] | None = None,
    ) -> Float[Array, "batch q_len embed"]:
        """Attends from `x` to `context` (None: to itself).

        The `cache` collection, if mutable, is made by the first call (without `position`): the keys and values of
        `context`, or room for as many of its own as `x` is long. Calls with a `position` then read and fill it.

        Args:
          x: queries.
          context: keys and values; calls with a `position` take them from the cache instead.
          bias: added to the logits.
          mask: True where a query may look.
          position: where `x` starts in the sequence, in cached decoding; `bias` and `mask` then cover all cached keys.

        Returns:
          Same shape as `x`.
        """
        query = self._project("query", x, self.init_scale / self.head_dim)
        if position is None:
            source = x if context is None else context
            key, value = self._project("key", source), self._project("value", source)
            if self.is_mutable_collection("cache"):
                self._make_cache(key, value, keep=context is not None)
        elif self.has_variable("cache", "context_key"):
            key, value = (
                self.get_variable("cache", "context_key"),
                self.get_variable("cache", "context_value"),
            )
        else:
            key, value = self._append("key", x, position), self._append("value", x, position)
        weights = attention_weights(query, key, bias, mask)
        weights = Dropout(self.dropout_rate)(weights).astype(self.dtype)
        mixed = constrain(jnp.einsum("bhqk,bkhd->bqhd", weights, value), "batch", "length", "heads", "head_dim")
        init, axes = FanInNormal(self.init_scale, in_axes=2), ("heads", "head_dim", "embed")
        return Linear((x.shape[-1],), axes, contract=2, kernel_init=init, dtype=self.dtype, name="out")(mixed)

    def _project(self, name: str, x: Array, init_scale: float | None = None) -> Array:
        init = FanInNormal(self.init_scale if init_scale is None else init_scale)
        features, axes = (self.num_heads, self.head_dim), ("embed", "heads", "head_dim")
        projected = Linear(features, axes, kernel_init=init, dtype=self.dtype, name=name)(x)
        return constrain(projected, "batch", "length", "heads", "head_dim")

    def _make_cache(self, key: Array, value: Array, keep: bool) -> None:
        for name, entry in (("key", key), ("value", value)):
            if keep:
                self.put_variable("cache", f"context_{name}", entry)
            else:
                self.put_variable("cache", f"cached_{name}", jnp.zeros_like(entry))

    def _append(self, name: str, x: Array, position: Array) -> Array:
        """Writes the keys (or values) of `x` into the cache from `position` on, and returns all of it."""
        cache = self.get_variable("cache", f"cached_{name}")
        cache = jax.lax.dynamic_update_slice_in_dim(cache, self._project(name, x), position, axis=1)
        self.put_variable("cache", f"cached_{name}", cache)
        return cache
