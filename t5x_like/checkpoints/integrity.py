"""Digests of arrays, so that a checkpoint whose bytes have changed is found out and named (Orbax checks none)."""

import jax
import jax.numpy as jnp

from t5x_like.architectures.variables import named_leaves
from t5x_like.typing import Array, PyTree, UInt


def digest(x: Array) -> UInt[Array, ""]:
    """A 32-bit sum of the array's bits, each word weighted by its place.

    Integer sums wrap and do not depend on their order: every mesh and every number of hosts gives the same digest, and
    no array leaves its devices.
    """
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    words = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, width)
    place = sum(
        (jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(2 * 1000003**axis % 2**32)
         for axis in range(words.ndim)),
        start=jnp.uint32(1),
    )  # fmt: skip
    return jnp.sum(words.astype(jnp.uint32) * place, dtype=jnp.uint32)


@jax.jit
def _digests(tree: PyTree) -> PyTree:
    return jax.tree.map(digest, tree)


def digests(tree: PyTree) -> dict[str, int]:
    """The digest of every array, by name."""
    return {name: int(value) for name, value in named_leaves(jax.device_get(_digests(tree)))}


def differences(tree: PyTree, saved: dict[str, int]) -> list[str]:
    """Names of the arrays of `tree` that are not what was saved."""
    return [name for name, value in digests(tree).items() if saved.get(name, value) != value]
