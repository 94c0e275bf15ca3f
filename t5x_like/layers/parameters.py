"""How a layer owns a weight: float32, with a name for every dimension."""

import functools
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer

from t5x_like.sharding import active_sharding
from t5x_like.typing import Array, Float, PRNGKey


def parameter(
    module: nn.Module, name: str, init: Initializer, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> Float[Array, "..."]:
    """The parameter `name` of `module`, made by `init` at first; `axes` names its dimensions (None: never split)."""
    draw = functools.partial(_draw, init, shape, active_sharding(*axes))
    return cast(Array, module.param(name, nn.with_logical_partitioning(draw, axes)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # traced once for all parameters that are drawn alike
def _draw(
    init: Initializer, shape: tuple[int, ...], sharding: jax.NamedSharding | None, key: PRNGKey
) -> Float[Array, "..."]:
    drawn = init(key, shape, jnp.float32)
    return drawn if sharding is None else jax.lax.with_sharding_constraint(drawn, sharding)
