"""Matrices: linear projections over any number of dimensions, and how they are drawn."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jax.typing import DTypeLike

from t5x_like.layers.logits import LazyLogits
from t5x_like.layers.parameters import parameter
from t5x_like.layers.products import kept, product
from t5x_like.sharding import active_sharding, target_devices
from t5x_like.typing import Array, Float, PRNGKey


def default_dtype() -> str:
    """`bfloat16` where the hardware multiplies it (TPU, GPU), `float32` on a CPU: one gin file for all of them."""
    return "float32" if target_devices()[0].platform == "cpu" else "bfloat16"


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


@dataclasses.dataclass(frozen=True)
class Normal:
    """Normal with a fixed standard deviation, as BERT (0.02) and GPT draw their matrices.

    Attributes:
      stddev: standard deviation.
      layers: GPT-2 divides that of what is added to the residual stream by the square root of how many such sums there
        are (Radford et al. 2019, section 2.3): two a layer. 0 divides by nothing.
    """

    stddev: float = 0.02
    layers: int = 0

    def __call__(self, key: PRNGKey, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        """Draws a kernel."""
        return self.stddev * max(2 * self.layers, 1) ** -0.5 * jax.random.normal(key, shape, dtype)


class Linear(nn.Module):
    """`x @ kernel`, over the last `contract` dimensions of `x`.

    Flax's `DenseGeneral` with several output dimensions fails under `jax.set_mesh` with logical partitioning.

    Attributes:
      features: output dimensions.
      kernel_axes: logical names of the kernel's dimensions, `contract` input ones first.
      contract: how many trailing dimensions of the input are summed over.
      kernel_init: initialiser; None means `FanInNormal` over the contracted dimensions.
      dtype: of the factors; sums, and the kernel, are kept in float32.
      use_bias: add a learned vector, which starts at zero.
    """

    features: tuple[int, ...]
    kernel_axes: tuple[str | None, ...]
    contract: int = 1
    kernel_init: Initializer | None = None
    dtype: str = "float32"
    use_bias: bool = False

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Contracts `x [..., *inputs]` with a kernel `[*inputs, *features]` to `[..., *features]`."""
        kernel, bias = self._parameters(x.shape[-self.contract :])
        x, batch = x.astype(self.dtype), x.shape[: -self.contract]
        inputs, outputs, sums = "ij"[: self.contract], "op"[: len(self.features)], self.dtype
        if active_sharding() is None:
            # As one matrix product: XLA's CPU backend takes 1.4 times as long over [batch, length] as over one long
            # batch. On a mesh, which may split both, the two stay apart.
            x, kernel = x.reshape(math.prod(batch), -1), kernel.reshape(-1, math.prod(self.features))
            inputs, outputs, sums = "i", "o", "float32"
        rows = "abcd"[: x.ndim - len(inputs)]
        y = product(f"{rows}{inputs},{inputs}{outputs}->{rows}{outputs}", x, kernel, sums)
        y = y.reshape(*batch, *self.features)
        y = y if bias is None else y + jnp.broadcast_to(bias, y.shape).astype(y.dtype)
        return kept(self.name, y.astype(self.dtype))

    def logits(self, x: Float[Array, "batch length embed"]) -> LazyLogits:
        """The same where features are a vocabulary, not multiplied out; float32 then, whatever `dtype` is."""
        return LazyLogits(x.astype(self.dtype), *self._parameters(x.shape[-1:]), transposed=True)

    @nn.compact
    def _parameters(self, inputs: tuple[int, ...]) -> tuple[Array, Array | None]:
        init = self.kernel_init or FanInNormal(in_axes=self.contract)
        kernel = parameter(self, "kernel", init, self.kernel_axes, (*inputs, *self.features))
        if not self.use_bias:
            return kernel, None
        axes = self.kernel_axes[self.contract :]
        return kernel, parameter(self, "bias", nn.initializers.zeros, axes, self.features)
