import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.layers.norms import RMSNorm, rms_norm


def naive(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def test_formula() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(2, 3, 5)) + 3).astype(np.float32)  # the mean stays in
    x[0, 0] = 0  # only epsilon keeps this from dividing by zero
    x[1] *= 1e-3  # small enough for epsilon to matter
    scale = rng.normal(size=5).astype(np.float32)
    for epsilon in (1e-6, 1e-2):
        found = rms_norm(jnp.asarray(x), jnp.asarray(scale), epsilon)
        np.testing.assert_allclose(found, naive(x, scale, epsilon), rtol=1e-5)


def test_statistics_of_bfloat16_are_float32() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4096)), jnp.bfloat16)
    found = rms_norm(x, jnp.ones(4096), 1e-6)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found, naive(np.asarray(x), np.ones(4096), 1e-6), rtol=2**-7)  # one rounding


def test_module_starts_as_ones_and_uses_its_epsilon() -> None:
    x = jnp.asarray([[0.01, -0.02]])
    found, variables = RMSNorm(1e-2).init_with_output(jax.random.key(0), x)
    assert variables["params"]["scale"].value.tolist() == [1, 1]
    np.testing.assert_allclose(found, naive(np.asarray(x), np.ones(2), 1e-2), rtol=1e-6)
