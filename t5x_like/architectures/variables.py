"""Between Linen's variables and what the rest of the library sees: plain trees of arrays, and trees of logical axes."""

import flax.linen as nn
import jax

from t5x_like.typing import Params, PyTree


def _is_box(x: object) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def unbox(variables: PyTree) -> Params:
    """The arrays (or shapes) of freshly initialised variables, without the names of their dimensions."""
    return jax.tree.map(lambda x: x.value if _is_box(x) else x, variables, is_leaf=_is_box)


def logical_axes(variables: PyTree) -> PyTree:
    """The names of the dimensions of every parameter, e.g. `("embed", "heads", "head_dim")`, `layers` included."""
    return jax.tree.map(lambda x: tuple(x.names) if _is_box(x) else (None,) * x.ndim, variables, is_leaf=_is_box)
