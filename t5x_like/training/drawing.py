"""Fresh parameters, each kind of them drawn by a small program of its own."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr
from jax.typing import ArrayLike

from t5x_like.typing import Params


def drawn(init: Callable[[], Params]) -> Params:
    """What `init()` returns, bit for bit, without computing anything else.

    The trace of `init`, less the forward pass, is run equation by equation, and equal equations share a program:
    parameters that are drawn alike (see `layers.parameters`) are. One program of T5 small's 190 draws, each a loop and
    kernels of its own, takes XLA's CPU compiler ten seconds.
    """
    closed, shapes = jax.make_jaxpr(init, return_shape=True)()
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals))
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))

    def value(variable: core.Var | core.Literal) -> ArrayLike:
        return variable.val if isinstance(variable, core.Literal) else values[variable]

    for equation, program in zip(jaxpr.eqns, _programs(jaxpr.eqns), strict=True):
        results = program(*map(value, equation.invars))
        values |= zip(equation.outvars, results if equation.primitive.multiple_results else [results], strict=True)
    return jax.tree.unflatten(jax.tree.structure(shapes), map(value, jaxpr.outvars))


def _programs(equations: Sequence[core.JaxprEqn]) -> list[jax.stages.Compiled]:
    """A compiled program for every equation, the same one for equal ones."""
    kinds = [(e.primitive, tuple(e.params.items()), tuple(x.aval for x in e.invars)) for e in equations]
    lowered = {
        (primitive, params, arguments): jax.jit(partial(primitive.bind, **dict(params))).lower(*arguments)
        for primitive, params, arguments in dict.fromkeys(kinds)
    }
    # Level 1 takes LLVM half the time of level 2, its default, and gives the same bits.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    with ThreadPoolExecutor() as pool:
        compiled = pool.map(lambda program: program.compile(options), lowered.values())
        programs = dict(zip(lowered, compiled, strict=True))
    return [programs[kind] for kind in kinds]
