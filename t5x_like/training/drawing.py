"""Fresh parameters, each kind of them drawn by a small program of its own."""

import functools
from collections.abc import Callable

import jax
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr
from jax.typing import ArrayLike

from t5x_like.typing import Array, Params


def drawn(init: Callable[[], Params]) -> Params:
    """What `init()` returns, bit for bit, without computing anything else.

    The trace of `init`, less the forward pass, is run equation by equation: parameters that are drawn alike (see
    `layers.parameters`) share an equation, which is compiled once. As one program, T5 small's 190 draws are 190 loops
    and kernels, of which XLA's CPU compiler makes the most.
    """
    closed, shapes = jax.make_jaxpr(init, return_shape=True)()
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals))
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))

    def value(variable: core.Var | core.Literal) -> ArrayLike:
        return variable.val if isinstance(variable, core.Literal) else values[variable]

    for equation in jaxpr.eqns:
        results = _program(equation.primitive, *equation.params.items())(*map(value, equation.invars))
        values |= zip(equation.outvars, results if equation.primitive.multiple_results else [results], strict=True)
    return jax.tree.unflatten(jax.tree.structure(shapes), map(value, jaxpr.outvars))


@functools.lru_cache(maxsize=256)
def _program(primitive: core.Primitive, *params: tuple[str, object]) -> Callable[..., Array | list[Array]]:
    # Level 1 takes LLVM half the time of level 2, its default, and gives the same bits.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(functools.partial(primitive.bind, **dict(params)), compiler_options=options)
