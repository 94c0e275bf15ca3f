"""Logits of a vocabulary that are not multiplied out: a loss goes through them part by part."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5x_like.layers.products import product
from t5x_like.sharding import constrain
from t5x_like.typing import Array, Float, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LazyLogits:
    """Hidden states, and the matrix that makes logits of them.

    Attributes:
      hidden: `[batch, length, embed]`, in the dtype of the product.
      table: `[vocab, embed]`, or `[embed, vocab]` where `transposed`; float32. A third dimension, in front, is `batch`.
      bias: `[vocab]`, or None; `[batch, vocab]` if the table has one too.
      transposed: how the table lies in memory.
    """

    hidden: PyTree  # arrays, or what JAX puts in their place
    table: PyTree
    bias: PyTree = None
    transposed: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def vocab_size(self) -> int:
        """How many logits a hidden state has."""
        return self.table.shape[-1 if self.transposed else -2]

    def values(self) -> Float[Array, "batch length vocab"]:
        """All of them, in float32."""
        rows = "b" if self.table.ndim == 3 else ""
        table = rows + ("ev" if self.transposed else "ve")
        logits = product(f"ble,{table}->blv", self.hidden, self.table).astype(jnp.float32)
        if self.bias is not None:
            logits += jnp.broadcast_to(self.bias if not rows else self.bias[:, None], logits.shape)
        return constrain(logits, "batch", "length", "vocab")


def values_of(outputs: PyTree) -> PyTree[Array]:
    """A network's outputs with all logits in them multiplied out."""
    return jax.tree.map(
        lambda leaf: leaf.values() if isinstance(leaf, LazyLogits) else leaf,
        outputs,
        is_leaf=lambda leaf: isinstance(leaf, LazyLogits),
    )


def multiplied_out(method: Callable[..., PyTree]) -> Callable[..., PyTree[Array]]:
    """A network's method with the same arguments whose logits are arrays: what `__call__` is to `outputs`."""

    @functools.wraps(method, updated=())  # nor is it `nn.compact` if the method is
    def call(network: nn.Module, *args: PyTree, **kwargs: PyTree) -> PyTree[Array]:
        return values_of(getattr(network, method.__name__)(*args, **kwargs))

    return call
