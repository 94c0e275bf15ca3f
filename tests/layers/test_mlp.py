import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.layers.mlp import MlpBlock

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 4)).astype(np.float32)
WI_0, WI_1 = RNG.normal(size=(2, 4, 6)).astype(np.float32)
WO = RNG.normal(size=(6, 4)).astype(np.float32)

NAIVE = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_exact": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "linear": lambda x: x,
}


def apply(block: MlpBlock, x: np.ndarray, **kernels: np.ndarray) -> jax.Array:
    params = {name: {"kernel": jnp.asarray(kernel)} for name, kernel in kernels.items()}
    return block.apply({"params": params}, jnp.asarray(x), rngs={"dropout": jax.random.key(0)})


@pytest.mark.parametrize("activation", NAIVE)
def test_plain(activation: str) -> None:
    out = apply(MlpBlock(6, (activation,)), X, wi=WI_0, wo=WO)
    np.testing.assert_allclose(out, NAIVE[activation](X @ WI_0) @ WO, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_gated(activation: str) -> None:
    out = apply(MlpBlock(6, (activation, "linear")), X, wi_0=WI_0, wi_1=WI_1, wo=WO)
    np.testing.assert_allclose(out, (NAIVE[activation](X @ WI_0) * (X @ WI_1)) @ WO, rtol=1e-4, atol=1e-5)


def test_dropout_is_between_the_matrices() -> None:
    x, one = np.ones((50, 3, 4), np.float32), np.eye(4, dtype=np.float32)
    out = apply(MlpBlock(4, ("relu",), dropout_rate=0.5), x, wi=one, wo=one)
    assert set(np.unique(out)) == {0.0, 2.0}


def test_unknown_activation() -> None:
    with pytest.raises(UserError, match="'gleu' is not one of relu, gelu, gelu_exact, silu, linear"):
        MlpBlock(6, ("gleu",))
