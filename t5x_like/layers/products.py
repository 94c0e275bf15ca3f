"""Products of arrays whose entries may be bfloat16, while their sums are float32: forward, and backward too."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from t5x_like.typing import Array, Float


def product(
    equation: str, x: Float[Array, "..."], y: Float[Array, "..."], sums: str = "float32"
) -> Float[Array, "..."]:
    """`jnp.einsum(equation, x, y)` of entries in x's dtype, summed up in float32.

    JAX's own gradient of such a product multiplies float32 with bfloat16, which no hardware is fast at. Here the
    gradient is narrowed to x's dtype first, and what comes out of its products is float32 for whichever factor is.

    Args:
      equation: one letter per dimension; each stands in two of x, y and the result.
      x: says in which dtype entries are multiplied.
      y: rounded to it; a kernel in float32 gets a float32 gradient.
      sums: the dtype of what is summed up over devices, where a mesh splits a dimension that both have; within a device
        sums are float32 on all hardware. In x's dtype it is half as much to send.

    Returns:
      `sums` (x's dtype, where that is wider).
    """
    if x.dtype.itemsize >= 4:
        return jnp.einsum(equation, x, y)
    return _narrow_product(equation, sums, x, y)


def kept(name: str | None, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, which rematerialisation may keep under a name: that of the module whose weights made it (`wi`, `query`)."""
    return x if name is None else checkpoint_name(x, name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _narrow_product(equation: str, sums: str, x: Array, y: Array) -> Array:
    return _multiply(equation, sums, x, y.astype(x.dtype))


def _forward(equation: str, sums: str, x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return _multiply(equation, sums, x, y.astype(x.dtype)), (x, y)  # not a call of its own, which would hide from remat


def _backward(equation: str, sums: str, factors: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, y = factors
    x_dims, y_dims, out = _dimensions(equation)
    gradient = gradient.astype(x.dtype)
    by_x = _multiply(f"{out},{y_dims}->{x_dims}", sums, gradient, y.astype(x.dtype))
    by_y = _multiply(f"{x_dims},{out}->{y_dims}", "float32", x, gradient)
    return by_x.astype(x.dtype), by_y.astype(y.dtype)


_narrow_product.defvjp(_forward, _backward)


def _dimensions(equation: str) -> tuple[str, str, str]:
    factors, out = equation.split("->")
    x, y = factors.split(",")
    return x, y, out


def _multiply(equation: str, sums: str, x: Array, y: Array) -> Array:
    """An einsum laid out as XLA's CPU backend has a fast bfloat16 product for: rows of the left factor are contiguous.

    Left as it is, it turns other layouts into float32 (2.5 times as slow), or fails to run them (jaxlib 0.10.2).
    """
    x_dims, y_dims, out = _dimensions(equation)
    batch = "".join(d for d in out if d in x_dims and d in y_dims)
    summed = "".join(d for d in x_dims if d in y_dims and d not in out)

    def ordered(dims: str) -> str:
        return batch + "".join(d for d in dims if d not in batch + summed) + summed

    # What is in order already goes to the left; otherwise the smaller one, since it has to be copied.
    if y_dims == ordered(y_dims) or (x_dims != ordered(x_dims) and math.prod(y.shape) < math.prod(x.shape)):
        (x_dims, x), (y_dims, y) = (y_dims, y), (x_dims, x)
    left, right = ordered(x_dims), y_dims if y_dims.startswith(batch) else ordered(y_dims)
    x, y = (contiguous(jnp.einsum(f"{a}->{b}", f)) for a, b, f in ((x_dims, left, x), (y_dims, right, y)))
    return jnp.einsum(f"{left},{right}->{out}", x, y, preferred_element_type=sums)


def contiguous(x: Array) -> Array:
    """`x`, written to memory in the order of its dimensions where that matters: on a CPU."""
    rows_first = Layout(tuple(range(x.ndim)))
    return jax.lax.platform_dependent(x, cpu=lambda x: with_layout_constraint(x, rows_first), default=lambda x: x)
