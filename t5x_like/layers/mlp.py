"""The position-wise feed-forward block."""

import functools
import operator
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
from flax.typing import Initializer

from t5x_like.errors import UserError
from t5x_like.layers.dropout import Dropout
from t5x_like.layers.linear import FanInNormal, Linear
from t5x_like.layers.routing import Tokens
from t5x_like.sharding import constrain
from t5x_like.typing import Array, Float

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),  # tanh form, as in T5 1.1
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "linear": lambda x: x,
}


def check_activations(owner: str, activations: tuple[str, ...]) -> None:
    """Raises a `UserError` if `owner`'s `activations` names one that is not in `ACTIVATIONS`."""
    for name in activations:
        if name not in ACTIVATIONS:
            raise UserError(f"{owner}.activations: {name!r} is not one of {', '.join(ACTIVATIONS)}")


def input_names(activations: tuple[str, ...]) -> list[str]:
    """T5X's names of the matrices in front of the activations."""
    return ["wi"] if len(activations) == 1 else [f"wi_{i}" for i in range(len(activations))]


@functools.partial(jax.checkpoint, static_argnums=0)
def gated(activations: tuple[str, ...], branches: Sequence[Float[Array, "..."]]) -> Float[Array, "..."]:
    """The product of activations. Only `branches` are kept for the backward pass, which computes the rest again."""
    return functools.reduce(operator.mul, (ACTIVATIONS[name](x) for name, x in zip(activations, branches, strict=True)))


class MlpBlock(nn.Module):
    """Two matrices with an activation between (Vaswani et al. 2017, eq. 2), or its gated form (Shazeer 2020).

    Attributes:
      mlp_dim: width in the middle.
      activations: one per input matrix; their outputs are multiplied. T5 1.0: `("relu",)`, 1.1: `("gelu", "linear")`.
      dropout_rate: between the matrices.
      dtype: of the products.
      init_scale: kernels have variance init_scale / fan_in.
      use_bias: on all matrices.
      kernel_init: draws the kernels instead, if given.
      out_init: draws the last one instead, if given.
    """

    mlp_dim: int
    activations: tuple[str, ...] = ("relu",)
    dropout_rate: float = 0.0
    dtype: str = "float32"
    init_scale: float = 1.0
    use_bias: bool = False
    kernel_init: Initializer | None = None
    out_init: Initializer | None = None

    def __post_init__(self) -> None:
        check_activations("MlpBlock", self.activations)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length embed"], tokens: Tokens | None = None
    ) -> Float[Array, "batch length embed"]:
        """Maps every position by itself, whatever its token."""
        names = input_names(self.activations)
        branches = [self._linear(name, self.mlp_dim, ("embed", "mlp"), None)(x) for name in names]
        hidden = gated(self.activations, branches)
        hidden = constrain(Dropout(self.dropout_rate)(hidden), "batch", "length", "mlp")
        return self._linear("wo", x.shape[-1], ("mlp", "embed"), self.out_init)(hidden)

    def _linear(self, name: str, features: int, axes: tuple[str, str], init: Initializer | None) -> Linear:
        init = init or self.kernel_init or FanInNormal(self.init_scale)
        return Linear((features,), axes, kernel_init=init, dtype=self.dtype, use_bias=self.use_bias, name=name)
