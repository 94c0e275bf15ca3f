"""Normalisation. Statistics are float32 whatever the activations are."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5x_like.layers.parameters import parameter
from t5x_like.typing import Array, Float


@functools.partial(jax.checkpoint, static_argnums=2)
def rms_norm(
    x: Float[Array, "*batch embed"], scale: Float[Array, " embed"], epsilon: float
) -> Float[Array, "*batch embed"]:
    """`x / rms(x) * scale` (Zhang & Sennrich 2019): no mean is subtracted and no bias added, as T5 does.

    Only `x` is kept for the backward pass.
    """
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + epsilon)).astype(x.dtype) * jnp.broadcast_to(scale, x.shape).astype(
        x.dtype
    )


class RMSNorm(nn.Module):
    """T5's layer norm: `rms_norm` with a learned scale that starts at one."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        """Normalises the last dimension."""
        scale = parameter(self, "scale", nn.initializers.ones, ("embed",), (x.shape[-1],))
        return rms_norm(x, scale, self.epsilon)


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016): mean 0 and variance 1, then a learned scale and bias.

    Attributes:
      epsilon: added to the variance; BERT 1e-12, GPT-2 and RoBERTa 1e-5.
    """

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        """Normalises the last dimension."""
        scale = parameter(self, "scale", nn.initializers.ones, ("embed",), (x.shape[-1],))
        bias = parameter(self, "bias", nn.initializers.zeros, ("embed",), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.epsilon)
        return (normal * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(bias, x.shape)).astype(x.dtype)
