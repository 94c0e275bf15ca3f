"""Attention by JAX's own Pallas kernels, where there is hardware for them."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from t5x_like.layers.attention import Bias
from t5x_like.layers.chunked_attention import Chunked, Key, Query, mean_unless
from t5x_like.layers.masks import Mask
from t5x_like.sharding import per_shard, ways
from t5x_like.typing import Array

HEADS, SEGMENTS = ("batch", "length", "heads", "head_dim"), ("batch", "length")
"""Logical axes."""

TILE = 128
"""The kernels' unit of length, and the longest head they are asked for."""


@dataclasses.dataclass(frozen=True)
class Fused:
    """Attention by JAX's own Pallas kernels where they apply, else by `fallback`; memory is linear either way.

    They apply on TPUs (flash attention) and NVIDIA GPUs (flash attention in Triton), shard by shard, to lengths that
    128 divides and heads of 16 to 128, without a bias (the TPU's takes one that is written out, the GPU's none), to a
    sequence that looks at itself, causally or not, in segments or not; on TPUs also at another one, not causally.

    Never run on real hardware: numbers and gradients of both are tested in interpret mode on a CPU, the TPU's is also
    compiled for TPU topologies, the GPU's for nothing. Its block sizes are guesses.

    Attributes:
      fallback: for everything else.
    """

    fallback: Chunked = Chunked()

    def __call__(self, query: Query, key: Key, value: Key, bias: Bias | None, mask: Mask | None) -> Query:
        """See `Attend`."""
        tiled = query.shape[1] % TILE == key.shape[1] % TILE == 0 and 16 <= query.shape[3] <= TILE
        whole = query.shape[0] % ways("batch") == query.shape[2] % ways("heads") == 0
        if bias is not None or not tiled or not whole or not (mask is None or _only_segments(mask)):
            return self.fallback(query, key, value, bias, mask)

        def chunked(query: Array, key: Array, value: Array, mask: Mask | None) -> Array:
            return self.fallback(query, key, value, None, mask)

        square = query.shape[1] == key.shape[1] if mask is None else mask.itself
        kernels = {"tpu": tpu_kernel, "cuda": gpu_kernel} if square else {"tpu": tpu_kernel}
        return jax.lax.platform_dependent(query, key, value, mask, **kernels, default=chunked)


def _only_segments(mask: Mask) -> bool:
    return mask.radius is None and mask.seen_by_all is None and (mask.itself or not mask.causal)


def tpu_kernel(query: Query, key: Key, value: Key, mask: Mask | None) -> Query:
    """Flash attention on a TPU, for what `Fused` says."""
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, SegmentIds, flash_attention

    segments: tuple[Array, ...] = ()
    if mask is not None and mask.key_segments is not None:
        segments = mask.query_segments, mask.key_segments
        if mask.query_segments is None:
            real = (mask.key_segments > 0).astype(jnp.int32)
            segments = jnp.ones((len(real), query.shape[1]), real.dtype), real
    q, k = math.gcd(query.shape[1], 4 * TILE), math.gcd(key.shape[1], 4 * TILE)
    sizes = BlockSizes(q, k, k, 1, *(q, k, k, q), *(k, k, q))  # forward; gradients of keys; of queries
    causal = mask is not None and mask.causal

    def attend(query: Array, key: Array, value: Array, *segments: Array) -> Array:
        heads_first = [x.swapaxes(1, 2) for x in (query, key, value)]
        ids = SegmentIds(*segments) if segments else None
        return flash_attention(*heads_first, None, ids, causal=causal, block_sizes=sizes).swapaxes(1, 2)

    mixed = per_shard(attend, (*[HEADS] * 3, *[SEGMENTS] * len(segments)), HEADS)(query, key, value, *segments)
    return _mean_if_blind(mask, mixed, value)


def gpu_kernel(query: Query, key: Key, value: Key, mask: Mask | None, interpret: bool = False) -> Query:
    """Flash attention in Triton on a GPU, for what `Fused` says; `interpret` runs it anywhere, slowly."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    segments = () if mask is None or mask.key_segments is None else (mask.key_segments,)
    causal = mask is not None and mask.causal

    def attend(query: Array, key: Array, value: Array, segments: Array | None = None) -> Array:
        return mha(query, key, value, segments, 1.0, causal, interpret=interpret)

    mixed = per_shard(attend, (*[HEADS] * 3, *[SEGMENTS] * len(segments)), HEADS)(query, key, value, *segments)
    return _mean_if_blind(mask, mixed, value)


def _mean_if_blind(mask: Mask | None, mixed: Query, value: Key) -> Query:
    """Kernels let padding see padding; in a sequence that looks at itself that is all that sees nothing."""
    if mask is None or mask.key_segments is None:
        return mixed
    seeing = mask.query_segments > 0 if mask.itself else mask.allowed().any((1, 3))
    return mean_unless(seeing[:, :, None, None], mixed, value)
