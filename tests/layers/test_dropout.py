import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.layers.dropout import Dropout

X = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (40, 5, 300)), jnp.float32)
KEY = {"dropout": jax.random.key(0)}


def test_is_on_only_with_a_key() -> None:
    np.testing.assert_array_equal(Dropout(0.5).apply({}, X), X)
    np.testing.assert_array_equal(Dropout(0.0).apply({}, X, rngs=KEY), X)
    assert (Dropout(0.5).apply({}, X, rngs=KEY) != X).any()


@pytest.mark.parametrize("broadcast_dims", [(-2,), ()])
def test_zeroes_a_share_and_keeps_the_mean(broadcast_dims: tuple[int, ...]) -> None:
    out = np.asarray(Dropout(0.25, broadcast_dims).apply({}, X, rngs=KEY))
    kept = out != 0
    np.testing.assert_allclose(out[kept], np.asarray(X)[kept] / 0.75, rtol=1e-6)
    draws = 40 * 300 if broadcast_dims else X.size
    assert abs(kept.mean() - 0.75) < 4 * (0.75 * 0.25 / draws) ** 0.5
    assert abs(out.mean() / X.mean() - 1) < 0.02


def test_mask_is_shared_over_length_unless_told_otherwise() -> None:
    shared = np.asarray(Dropout(0.5).apply({}, X, rngs=KEY)) == 0
    assert (shared == shared[:, :1]).all()
    assert (shared[0] != shared[1]).any()
    apart = np.asarray(Dropout(0.5, ()).apply({}, X, rngs=KEY)) == 0
    assert abs((apart == apart[:, :1])[:, 1:].mean() - 0.5) < 0.01
