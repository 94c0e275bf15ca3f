"""Products of narrow factors against float64, forward and backward; and that no factor is multiplied in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.layers.products import product

SHAPES = {
    "ri,io->ro": ((33, 16), (16, 24)),
    "bqhd,bkhd->bhqk": ((2, 5, 3, 4), (2, 7, 3, 4)),
    "bhqk,bkhd->bqhd": ((2, 3, 5, 7), (2, 7, 3, 4)),
    "bhdq,bhqk->bhdk": ((2, 3, 4, 5), (2, 3, 5, 7)),
    "egci,eio->egco": ((2, 3, 4, 5), (2, 5, 6)),
    "ble,bve->blv": ((2, 3, 5), (2, 7, 5)),
}


def factors(equation: str) -> list[np.ndarray]:
    """Numbers that bfloat16 holds exactly: x, y, and a gradient."""
    rng = np.random.default_rng(0)
    x, y = (rng.integers(-8, 9, shape).astype(np.float32) for shape in SHAPES[equation])
    return [x, y, rng.integers(-8, 9, np.einsum(equation, x, y).shape).astype(np.float32)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("equation", SHAPES)
def test_product_and_gradient(equation: str, dtype: str) -> None:
    x, y, gradient = factors(equation)
    x_dims, y_dims, out = equation.replace("->", ",").split(",")
    expected = [
        np.einsum(equation, x, y),
        np.einsum(f"{out},{y_dims}->{x_dims}", gradient, y),
        np.einsum(f"{x_dims},{out}->{y_dims}", x, gradient),
    ]

    @jax.jit
    def all_three(x: jax.Array, y: jax.Array, gradient: jax.Array) -> list[jax.Array]:
        result, pull = jax.vjp(lambda x, y: product(equation, x, y), x, y)
        return [result, *pull(gradient)]

    result = all_three(jnp.asarray(x, dtype), jnp.asarray(y), jnp.asarray(gradient))
    assert [each.dtype for each in result] == [np.float32, np.dtype(dtype), np.float32]
    by_x = expected[1].astype(dtype)  # the only one that is rounded
    for each, exact in zip(result, (expected[0], by_x, expected[2]), strict=True):
        np.testing.assert_array_equal(np.asarray(each, np.float32), np.asarray(exact, np.float32))


def test_narrow_factors_are_rounded_and_sums_are_not() -> None:
    x, y = np.full((1, 3), 1.0, np.float32), np.asarray([[1 + 2**-9], [256.0], [2**-3]], np.float32)
    assert float(product("ri,io->ro", jnp.asarray(x, "bfloat16"), jnp.asarray(y))[0, 0]) == 1.0 + 256.0 + 0.125
    assert float(product("ri,io->ro", jnp.asarray(x), jnp.asarray(y))[0, 0]) == 1.0 + 2**-9 + 256.0 + 0.125


def test_the_gradient_multiplies_narrow_factors_alone() -> None:
    x, y, gradient = factors("ri,io->ro")

    def pulled(x: jax.Array, y: jax.Array, gradient: jax.Array) -> tuple[jax.Array, ...]:
        return jax.vjp(lambda x, y: product("ri,io->ro", x, y), x, y)[1](gradient)

    lowered = jax.jit(pulled).lower(jnp.asarray(x, "bfloat16"), jnp.asarray(y), jnp.asarray(gradient)).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    assert len(products) == 2
    for line in products:
        assert line.count("xbf16>") == 2 and line.count("xf32>") == 1, line
