"""Which position may see which: boolean masks `[batch, heads, q_len, k_len]`, True where attention is allowed."""

import jax.numpy as jnp

from t5x_like.typing import Array, Bool, Int

Mask = Bool[Array, "#batch #heads _ _"]


def key_mask(real: Bool[Array, "batch k_len"]) -> Mask:
    """Every query sees the real keys, none sees padding."""
    return real[:, None, None, :]


def causal_mask(query_positions: Int[Array, " q_len"], key_positions: Int[Array, " k_len"]) -> Mask:
    """A query sees keys at its own position and before."""
    return (query_positions[:, None] >= key_positions[None, :])[None, None]


def segment_mask(query_segments: Int[Array, "batch q_len"], key_segments: Int[Array, "batch k_len"]) -> Mask:
    """Packed examples see only their own; segment 0 is padding."""
    return (query_segments[:, :, None] == key_segments[:, None, :])[:, None]


def combine(first: Mask, *others: Mask) -> Mask:
    """Allowed only where every mask allows."""
    shape = jnp.broadcast_shapes(first.shape, *(mask.shape for mask in others))
    combined = jnp.broadcast_to(first, shape)
    for mask in others:
        combined &= jnp.broadcast_to(mask, shape)
    return combined
