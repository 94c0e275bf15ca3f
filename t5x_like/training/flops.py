"""How much arithmetic a program holds, and how much this machine does in a second."""

import functools
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend import core

from t5x_like.typing import PyTree


def matmul_flops(function: Callable[..., PyTree], *args: PyTree) -> int:
    """Floating point operations in the matrix products of one call, from its jaxpr; loops count once per trip.

    XLA's own `cost_analysis` counts the body of a scan once. Elementwise work is left out, as is usual for a model's
    FLOPs (Chowdhery et al. 2022, appendix B). `while` loops, whose trips are unknown, count once.

    Args:
      function: traced, never run.
      args: arrays or `jax.ShapeDtypeStruct`s.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(_shape(equation.invars[0])[axis] for axis in contracted)
            total += 2 * depth * math.prod(_shape(equation.outvars[0]))
        else:
            trips = equation.params["length"] if equation.primitive.name == "scan" else 1
            total += trips * sum(_count(inner) for inner in core.jaxprs_in_params(equation.params))
    return total


def _shape(variable: core.Var | core.Literal) -> tuple[int, ...]:
    return tuple(variable.aval.shape)  # type: ignore[attr-defined]  # the operands of products are arrays


@functools.cache
def matmul_peak(dtype: str, size: int = 2048) -> float:
    """FLOP/s of a square matrix product on one local device, measured now: the best of a few (about half a second)."""
    x = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    multiply(x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        multiply(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
