"""Fresh parameters, each kind of them drawn by a small program of its own."""

import functools
from collections.abc import Callable, Sequence

import jax
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr
from jax.typing import ArrayLike

from t5x_like.typing import Array, Params


def drawn(init: Callable[[], Params]) -> Params:
    """What `init()` returns, bit for bit, without computing anything else.

    The trace of `init`, less the forward pass, is run equation by equation, and equal equations share a program:
    parameters that are drawn alike (see `layers.parameters`) are. One program of T5 small's 190 draws, each a loop and
    kernels of its own, takes XLA's CPU compiler ten seconds.
    """
    closed, shapes = jax.make_jaxpr(init, return_shape=True)()
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals))
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    last_reader = {variable: equation for equation in jaxpr.eqns for variable in _variables(equation.invars)}

    def value(variable: core.Var | core.Literal) -> ArrayLike:
        return variable.val if isinstance(variable, core.Literal) else values[variable]

    for equation in jaxpr.eqns:
        results = _program(equation.primitive, *equation.params.items())(*map(value, equation.invars))
        values |= zip(equation.outvars, results if equation.primitive.multiple_results else [results], strict=True)
        for variable in _variables(equation.invars) - set(jaxpr.outvars):
            if last_reader[variable] is equation:
                del values[variable]  # or a scanned layer's parameters would be in memory twice
    return jax.tree.unflatten(jax.tree.structure(shapes), map(value, jaxpr.outvars))


def _variables(atoms: Sequence[core.Var | core.Literal]) -> set[core.Var]:
    return {atom for atom in atoms if isinstance(atom, core.Var)}


@functools.lru_cache(maxsize=256)
def _program(primitive: core.Primitive, *params: tuple[str, object]) -> Callable[..., Array | list[Array]]:
    """An equation as a program, whatever mesh its arguments come from."""
    # Level 1 takes LLVM half the time of level 2, its default, and gives the same bits.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(functools.partial(primitive.bind, **dict(params)), compiler_options=options)
