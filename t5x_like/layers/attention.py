"""Attention: the formula, and the module that owns its four projections and its cache."""

import dataclasses
from typing import Protocol, TypeAlias, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Initializer
from jax.sharding import PartitionSpec

from t5x_like.layers.dropout import Dropout
from t5x_like.layers.linear import FanInNormal, Linear
from t5x_like.layers.masks import Allowed, Mask
from t5x_like.layers.positions import BucketBias
from t5x_like.layers.products import contiguous, product
from t5x_like.sharding import LogicalAxes, active_sharding, constrain, divides, per_shard
from t5x_like.typing import Array, Float, Int, PyTree

MASKED = -1e10
"""Stands in for minus infinity: finite, so that a query which sees nothing gets uniform weights instead of NaN."""

Bias: TypeAlias = Float[Array, "#batch #heads q_len k_len"] | BucketBias
"""Added to the logits: an array, or what makes any block of one."""


@runtime_checkable
class Attend(Protocol):
    """The formula of attention between projected heads; which one is a matter of cost, not of result."""

    def __call__(
        self,
        query: Float[Array, "batch q_len heads head_dim"],
        key: Float[Array, "batch k_len heads head_dim"],
        value: Float[Array, "batch k_len heads head_dim"],
        bias: Bias | None,
        mask: Mask | None,
    ) -> Float[Array, "batch q_len heads head_dim"]:
        """Mixes values; queries are already scaled, and whatever dropout there is has been done to the values."""
        ...


@dataclasses.dataclass(frozen=True)
class DotProduct:
    """The plain form, all weights in memory at once (Vaswani et al. 2017, eq. 1)."""

    def __call__(
        self,
        query: Float[Array, "batch q_len heads head_dim"],
        key: Float[Array, "batch k_len heads head_dim"],
        value: Float[Array, "batch k_len heads head_dim"],
        bias: Bias | None,
        mask: Mask | None,
    ) -> Float[Array, "batch q_len heads head_dim"]:
        """See `Attend`."""
        dense = bias.values() if isinstance(bias, BucketBias) else bias
        weights = attention_weights(query, key, dense, None if mask is None else mask.allowed())
        return product("bhqk,bkhd->bqhd", weights.astype(value.dtype), value).astype(value.dtype)


def attention_weights(
    query: Float[Array, "batch q_len heads head_dim"],
    key: Float[Array, "batch k_len heads head_dim"],
    bias: Float[Array, "#batch #heads q_len k_len"] | None = None,
    allowed: Allowed | None = None,
) -> Float[Array, "batch heads q_len k_len"]:
    """How much each query takes from each key: a softmax in float32, since in bfloat16 it loses rare tokens."""
    logits = product("bqhd,bkhd->bhqk", query, key).astype(jnp.float32)
    if bias is not None:
        logits += jnp.broadcast_to(bias, logits.shape)
    if allowed is not None:
        logits = jnp.where(allowed, logits, MASKED)
    return jax.nn.softmax(logits)


CACHED = {"key": (0, 2, 3, 1), "value": (0, 2, 1, 3)}
"""In which order dimensions lie in a decoding cache."""


class MultiHeadAttention(nn.Module):
    """Attention with learned projections.

    T5 does not divide its logits by sqrt(head_dim): it folds that factor into the query's initialiser, and updates
    scaled by the parameter's size keep it there.

    Attributes:
      num_heads: heads.
      head_dim: size of each; heads x head_dim need not be embed_dim (T5-11B: 128 x 128 against 1,024).
      dropout_rate: on the attention weights, one mask for all queries.
      dtype: of the products.
      init_scale: kernels have variance init_scale / fan_in, the query's a further head_dim below.
      scaled: divide logits by sqrt(head_dim), as everything but T5 does; the query is then drawn like the others.
      use_bias: on all projections.
      kernel_init: draws the kernels instead, if given.
      out_init: draws the output's instead, if given.
      attend: the formula.
    """

    num_heads: int
    head_dim: int
    dropout_rate: float = 0.0
    dtype: str = "float32"
    init_scale: float = 1.0
    scaled: bool = False
    use_bias: bool = False
    kernel_init: Initializer | None = None
    out_init: Initializer | None = None
    attend: Attend = DotProduct()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch q_len embed"],
        context: Float[Array, "batch k_len embed"] | None = None,
        bias: Bias | None = None,
        mask: Mask | None = None,
        position: Int[Array, ""] | None = None,
    ) -> Float[Array, "batch q_len embed"]:
        """Attends from `x` to `context` (None: to itself).

        The `cache` collection, if mutable, is made by the first call (without `position`): the keys and values of
        `context`, or room for as many of its own as `x` is long. Calls with a `position` then read and fill it. Keys
        lie in it as `[batch, heads, head_dim, k_len]` and values as `[batch, heads, k_len, head_dim]`, so that no step
        has to turn them round. Rows of `x` in a `position` call may be a multiple of those of `context`: so many in a
        row then share it (beams of an example).

        Args:
          x: queries.
          context: keys and values; calls with a `position` take them from the cache instead.
          bias: added to the logits.
          mask: which query sees which key.
          position: where `x` starts in the sequence, in cached decoding; `bias` and `mask` then cover all cached keys.

        Returns:
          Same shape as `x`.
        """
        query = self._project("query", x, self.init_scale if self.scaled else self.init_scale / self.head_dim)
        if self.scaled:
            query *= self.head_dim**-0.5
        attend = DotProduct() if self.is_initializing() else self.attend  # parameters are the same, traced sooner
        if position is None:
            source = x if context is None else context
            key, value = self._project("key", source), self._project("value", source)
            if self.is_mutable_collection("cache"):
                self._make_cache(key, value, keep=context is not None)
        elif self.has_variable("cache", "context_key"):
            key, value = (_from_cache(name, self.get_variable("cache", f"context_{name}")) for name in CACHED)
            attend, query = DotProduct(), query.reshape(len(key), -1, *query.shape[2:])  # too few for other forms
            if mask is not None:
                mask = dataclasses.replace(mask, query_positions=jnp.resize(mask.query_positions, query.shape[1:2]))
        else:
            key, value = (self._append(name, x, position) for name in CACHED)
        # One mask for all queries drops whole keys, so it may as well drop their values.
        value = Dropout(self.dropout_rate, broadcast_dims=(-1,))(value)
        mixed = attend_over_context(attend, query, key, value, bias, mask).reshape(
            *x.shape[:2], self.num_heads, self.head_dim
        )
        mixed = constrain(mixed, "batch", "length", "heads", "head_dim")
        init = self.out_init or self.kernel_init or FanInNormal(self.init_scale, in_axes=2)
        out = Linear((x.shape[-1],), ("heads", "head_dim", "embed"), 2, init, self.dtype, self.use_bias, name="out")
        return out(mixed)

    def _project(self, name: str, x: Array, init_scale: float | None = None) -> Array:
        init = self.kernel_init or FanInNormal(self.init_scale if init_scale is None else init_scale)
        features, axes = (self.num_heads, self.head_dim), ("embed", "heads", "head_dim")
        projected = Linear(features, axes, 1, init, self.dtype, self.use_bias, name=name)(x)
        return constrain(projected, "batch", "length", "heads", "head_dim")

    def _make_cache(self, key: Array, value: Array, keep: bool) -> None:
        for name, entry in zip(CACHED, (key, value), strict=True):
            entry = contiguous(entry.transpose(CACHED[name]))
            if keep:
                self.put_variable("cache", f"context_{name}", entry)
            else:
                self.put_variable("cache", f"cached_{name}", jnp.zeros_like(entry))

    def _append(self, name: str, x: Array, position: Array) -> Array:
        """Writes the keys (or values) of `x` into the cache from `position` on, and returns all of it."""
        cache = self.get_variable("cache", f"cached_{name}")
        new = self._project(name, x).transpose(CACHED[name])
        cache = jax.lax.dynamic_update_slice_in_dim(cache, new, position, axis=CACHED[name].index(1))
        self.put_variable("cache", f"cached_{name}", cache)
        return _from_cache(name, cache)


def _from_cache(name: str, cache: Array) -> Array:
    """Keys or values as attention takes them."""
    return cache.transpose(np.argsort(CACHED[name]))


# ---- Context parallelism ----

QUERIES: LogicalAxes = ("batch", "length", "heads", "head_dim")
KEYS: LogicalAxes = ("batch", None, "heads", "head_dim")


def attend_over_context(
    attend: Attend,
    query: Float[Array, "batch q_len heads head_dim"],
    key: Float[Array, "batch k_len heads head_dim"],
    value: Float[Array, "batch k_len heads head_dim"],
    bias: Bias | None,
    mask: Mask | None,
) -> Float[Array, "batch q_len heads head_dim"]:
    """What `attend` gives; where a mesh splits the length, every device attends from its own queries to all keys.

    Keys and values are gathered (Grattafiori et al. 2024, section 3.3.2): that costs less than attention itself once a
    sequence is long, and serves any mask and bias. Lengths that the mesh does not divide are left to the compiler.
    """
    queries, keys = active_sharding(*QUERIES), active_sharding(*KEYS)
    if queries is None or keys is None or queries.spec[1] is None or not divides(queries, query.shape):
        return attend(query, key, value, bias, mask)
    mask = None if mask is None else dataclasses.replace(mask, itself=False)  # queries are a part of the keys
    specs = (queries.spec, keys.spec, keys.spec, _bias_specs(bias, queries.spec), _mask_specs(mask, queries.spec))
    return per_shard(attend, specs, queries.spec)(query, key, value, bias, mask)


def _bias_specs(bias: Bias | None, queries: PartitionSpec) -> PyTree[PartitionSpec]:
    batch, length, heads, _ = queries
    if bias is None:
        return None
    if isinstance(bias, BucketBias):
        return dataclasses.replace(
            bias, table=PartitionSpec(heads), query_positions=PartitionSpec(length), key_positions=PartitionSpec()
        )
    parts = zip(bias.shape, (batch, heads, length, None), strict=True)
    return PartitionSpec(*(None if size == 1 else part for size, part in parts))


def _mask_specs(mask: Mask | None, queries: PartitionSpec) -> PyTree[PartitionSpec]:
    batch, length, *_ = queries
    if mask is None:
        return None
    return dataclasses.replace(
        mask,
        query_positions=PartitionSpec(length),
        key_positions=PartitionSpec(),
        query_segments=None if mask.query_segments is None else PartitionSpec(batch, length),
        key_segments=None if mask.key_segments is None else PartitionSpec(batch),
        seen_by_all=None if mask.seen_by_all is None else PartitionSpec(batch),
    )
