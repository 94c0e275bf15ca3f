"""Matrices: linear projections over any number of dimensions, and the embedding table."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jax.typing import DTypeLike

from t5x_like.layers.parameters import parameter
from t5x_like.typing import Array, Float, Int, PRNGKey


def default_dtype() -> str:
    """`bfloat16` where the hardware multiplies it (TPU, GPU), `float32` on a CPU: one gin file for all of them."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@dataclasses.dataclass(frozen=True)
class FanInNormal:
    """Normal with variance `scale / fan_in`, as Mesh-TensorFlow's T5 draws its matrices (Raffel et al. 2020).

    An object rather than a closure, so that two configs compare equal. Flax's own takes leading output dimensions for a
    receptive field and counts them into the fan-in.

    Attributes:
      scale: numerator of the variance.
      in_axes: how many leading dimensions of the kernel are summed over; the fan-in is their product.
    """

    scale: float = 1.0
    in_axes: int = 1

    def __call__(self, key: PRNGKey, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        """Draws a kernel."""
        stddev = (self.scale / math.prod(shape[: self.in_axes])) ** 0.5
        return stddev * jax.random.normal(key, shape, dtype)


class Linear(nn.Module):
    """`x @ kernel` without a bias, over the last `contract` dimensions of `x`.

    Flax's `DenseGeneral` with several output dimensions fails under `jax.set_mesh` with logical partitioning.

    Attributes:
      features: output dimensions.
      kernel_axes: logical names of the kernel's dimensions, `contract` input ones first.
      contract: how many trailing dimensions of the input are summed over.
      kernel_init: initialiser; None means `FanInNormal` over the contracted dimensions.
      dtype: of the product; the kernel is kept in float32.
    """

    features: tuple[int, ...]
    kernel_axes: tuple[str | None, ...]
    contract: int = 1
    kernel_init: Initializer | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Contracts `x [..., *inputs]` with a kernel `[*inputs, *features]` to `[..., *features]`."""
        init = self.kernel_init or FanInNormal(in_axes=self.contract)
        shape = (*x.shape[-self.contract :], *self.features)
        kernel = parameter(self, "kernel", init, self.kernel_axes, shape)
        # As one matrix product: XLA's CPU backend takes 1.4 times as long over [batch, length] as over one long batch.
        rows = x.astype(self.dtype).reshape(-1, math.prod(shape[: self.contract]))
        product = rows @ kernel.astype(self.dtype).reshape(rows.shape[1], -1)
        return product.reshape(*x.shape[: -self.contract], *self.features)


class Embedding(nn.Module):
    """A table of one vector per token.

    Attributes:
      vocab_size: rows; real checkpoints pad it to a multiple of 128.
      embed_dim: columns.
      dtype: of what comes out.
      init_stddev: T5 draws embeddings with a standard deviation of 1.
    """

    vocab_size: int
    embed_dim: int
    dtype: str = "float32"
    init_stddev: float = 1.0

    def setup(self) -> None:
        """Makes the table, which `__call__` and `attend` share."""
        init = nn.initializers.normal(self.init_stddev)
        self.embedding = parameter(self, "embedding", init, ("vocab", "embed"), (self.vocab_size, self.embed_dim))

    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length embed"]:
        """Looks tokens up; ids outside the table raise nothing under jit, so the data layer checks them."""
        return jnp.take(self.embedding.astype(self.dtype), tokens, axis=0)

    def attend(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length vocab"]:
        """Logits from a tied table, in float32: the inner product with every row."""
        return jnp.einsum("ble,ve->blv", x.astype(jnp.float32), self.embedding)
