import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_t5 import quick_jit

from t5x_like.layers.embeddings import Embedding
from t5x_like.layers.linear import FanInNormal, Linear, default_dtype
from t5x_like.typing import Params


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def variables(**params: np.ndarray) -> dict[str, Params]:
    return {"params": jax.tree.map(jnp.asarray, params)}


def test_one_input_and_two_output_dimensions() -> None:
    x, kernel = random(2, 3, 5), random(5, 4, 6)
    out = Linear((4, 6), ("embed", "heads", "head_dim")).apply(
        {"params": {"kernel": jnp.asarray(kernel)}}, jnp.asarray(x)
    )
    for b in range(2):
        for i in range(3):
            expected = [[sum(x[b, i, e] * kernel[e, h, d] for e in range(5)) for d in range(6)] for h in range(4)]
            np.testing.assert_allclose(out[b, i], expected, rtol=1e-4, atol=1e-6)


def test_two_input_dimensions() -> None:
    x, kernel = random(2, 3, 4, 6), random(4, 6, 5)
    out = Linear((5,), ("heads", "head_dim", "embed"), contract=2).apply(
        {"params": {"kernel": jnp.asarray(kernel)}}, jnp.asarray(x)
    )
    expected = x.reshape(2, 3, 24) @ kernel.reshape(24, 5)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("linear", "inputs", "stddev"),
    [
        (Linear((30, 40), ("embed", "heads", "head_dim")), (50,), 50**-0.5),
        (Linear((40,), ("heads", "head_dim", "embed"), contract=2), (30, 50), 1500**-0.5),
        (Linear((1200,), ("embed", "mlp"), kernel_init=FanInNormal(1 / 16)), (50,), 800**-0.5),
    ],
)
def test_fresh_kernels(linear: Linear, inputs: tuple[int, ...], stddev: float) -> None:
    kernel = quick_jit(linear.init)(jax.random.key(0), jnp.zeros((1, *inputs)))["params"]["kernel"]
    assert kernel.names == linear.kernel_axes
    assert kernel.value.dtype == jnp.float32
    assert abs(kernel.value.mean()) < 0.01 * stddev
    assert abs(kernel.value.std() - stddev) < 0.01 * stddev


def test_products_in_bfloat16() -> None:
    x, kernel = random(2, 64), random(64, 3)
    out = Linear((3,), ("embed", "mlp"), dtype="bfloat16").apply(
        {"params": {"kernel": jnp.asarray(kernel)}}, jnp.asarray(x)
    )
    assert out.dtype == jnp.bfloat16
    rounded = (jnp.asarray(a).astype(jnp.bfloat16).astype(jnp.float32) for a in (x, kernel))
    np.testing.assert_allclose(out, np.matmul(*rounded), rtol=2**-7, atol=1e-2)
    assert default_dtype() == "float32"  # on a CPU


def test_initialisers_compare_by_value() -> None:
    assert FanInNormal(0.5) == FanInNormal(0.5) != FanInNormal(0.25)


def test_embedding_looks_up_rows_and_gives_logits() -> None:
    table, x = random(7, 4), random(2, 3, 4)
    tokens = np.asarray([[0, 6, 3], [3, 3, 1]], np.int32)
    module = Embedding(7, 4)
    np.testing.assert_array_equal(module.apply(variables(embedding=table), jnp.asarray(tokens)), table[tokens])
    logits = module.apply(variables(embedding=table), jnp.asarray(x), method="attend")
    np.testing.assert_allclose(logits, x @ table.T, rtol=1e-5, atol=1e-6)


def test_embedding_in_bfloat16_gives_float32_logits() -> None:
    module, table = Embedding(7, 4, "bfloat16"), random(7, 4)
    rows = module.apply(variables(embedding=table), jnp.asarray([[5]]))
    assert rows.dtype == jnp.bfloat16
    logits = module.apply(variables(embedding=table), rows, method="attend")
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, np.asarray(rows, np.float32) @ table.T, rtol=1e-5, atol=1e-6)


def test_fresh_embedding() -> None:
    table = Embedding(200, 300).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]["embedding"]
    assert table.names == ("vocab", "embed")
    assert abs(table.value.std() - 1) < 0.01
