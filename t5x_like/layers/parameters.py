"""How a layer owns a weight: float32, with a name for every dimension."""

from typing import cast

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Initializer

from t5x_like.typing import Array, Float


def parameter(
    module: nn.Module, name: str, init: Initializer, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> Float[Array, "..."]:
    """The parameter `name` of `module`, made by `init` at first; `axes` names its dimensions (None: never split)."""
    return cast(Array, module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32))
