"""Which position may see which, said in few words, so that attention can compute any block of it by itself."""

import dataclasses

import jax
import jax.numpy as jnp

from t5x_like.typing import Array, Bool, Int, PyTree

Allowed = Bool[Array, "#batch 1 q_len k_len"]
"""A mask written out: True where a query may look at a key."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which queries see which keys; `allowed` writes it out.

    A pytree, so that it passes through scan and rematerialisation. (Its arrays are annotated loosely: JAX also builds
    one of placeholders.)

    Attributes:
      query_positions: column of each query, `[q_len]`.
      key_positions: column of each key, `[k_len]`.
      query_segments: `[batch, q_len]`; a query sees the keys of its own segment only. None: of all segments.
      key_segments: `[batch, k_len]`; 0 is padding, which nobody sees. None: all keys are real.
      seen_by_all: `[batch, k_len]`, True for keys that `causal` and `radius` do not hide: the prefix of a prefix LM,
        the global tokens of a Longformer.
      causal: a query sees no key behind it.
      radius: a query sees no key farther away than this; None: all distances.
      itself: queries and keys are the same, in columns 0, 1, ...; kernels want to know who cannot be told positions.
    """

    query_positions: PyTree
    key_positions: PyTree
    query_segments: PyTree = None
    key_segments: PyTree = None
    seen_by_all: PyTree = None
    causal: bool = dataclasses.field(default=False, metadata={"static": True})
    radius: int | None = dataclasses.field(default=None, metadata={"static": True})
    itself: bool = dataclasses.field(default=False, metadata={"static": True})

    def allowed(self) -> Allowed:
        """The mask as booleans; the batch has size 1 where all rows are alike."""
        distance = (self.query_positions[:, None] - self.key_positions[None, :])[None]
        allowed = jnp.ones_like(distance, jnp.bool_)
        if self.causal:
            allowed &= distance >= 0
        if self.radius is not None:
            allowed &= jnp.abs(distance) <= self.radius
        if self.seen_by_all is not None:
            allowed = jnp.broadcast_to(allowed, (len(self.seen_by_all), *allowed.shape[1:]))
            allowed |= jnp.broadcast_to(self.seen_by_all[:, None], allowed.shape)
        if self.key_segments is not None:
            seen = (self.key_segments > 0)[:, None]
            if self.query_segments is not None:
                seen &= self.query_segments[:, :, None] == self.key_segments[:, None]
            allowed = jnp.broadcast_to(allowed, (len(seen), *allowed.shape[1:]))
            allowed &= jnp.broadcast_to(seen, allowed.shape)
        return allowed[:, None]

    def reaches(self) -> Bool[Array, ""] | bool:
        """False where positions alone tell that no query sees any key; simply True for masks that never tell so."""
        if self.seen_by_all is not None or not (self.causal or self.radius is not None):
            return True
        ahead = self.key_positions.min() - self.query_positions.max()
        behind = self.query_positions.min() - self.key_positions.max()
        reaches = ahead <= 0 if self.causal else jnp.bool_(True)
        return reaches if self.radius is None else reaches & (jnp.maximum(ahead, behind) <= self.radius)

    def queries(self, start: Int[Array, ""] | int, size: int) -> "Mask":
        """The mask of `size` queries from `start` on."""
        return dataclasses.replace(
            self,
            query_positions=_cut(self.query_positions, start, size),
            query_segments=_cut(self.query_segments, start, size),
            itself=False,
        )

    def keys(self, start: Int[Array, ""] | int, size: int) -> "Mask":
        """The mask of `size` keys from `start` on."""
        return dataclasses.replace(
            self,
            key_positions=_cut(self.key_positions, start, size),
            key_segments=_cut(self.key_segments, start, size),
            seen_by_all=_cut(self.seen_by_all, start, size),
            itself=False,
        )


def _cut(array: Array | None, start: Int[Array, ""] | int, size: int) -> Array | None:
    return None if array is None else jax.lax.dynamic_slice_in_dim(array, start, size, axis=-1)


def within(length: int, segments: Int[Array, "batch length"] | None = None, causal: bool = False) -> Mask:
    """The mask of a sequence that looks at itself; positions of segment 0 are padding."""
    columns = jnp.arange(length)
    return Mask(columns, columns, segments, segments, causal=causal, itself=True)
