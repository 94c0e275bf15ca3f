import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_t5 import quick_jit

from t5x_like.architectures.stack import REMAT_POLICIES, LayerStack, fresh_copy
from t5x_like.errors import UserError
from t5x_like.layers.dropout import Dropout
from t5x_like.layers.mlp import MlpBlock
from t5x_like.typing import Array, Float, Params

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)


class Network(nn.Module):
    """Nothing but a stack."""

    stack: LayerStack

    @nn.compact
    def __call__(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        return self.stack(self, x)


def init(network: Network) -> Params:
    return nn.unbox(quick_jit(network.init)(jax.random.key(0), X))["params"]


@pytest.mark.parametrize("remat", [None, "full"])
def test_patterns_alternate(remat: str | None) -> None:
    pattern = (MlpBlock(5), MlpBlock(6, ("gelu", "linear")))
    looped, scanned = (Network(LayerStack(pattern, 3, scan, remat)) for scan in (False, True))
    together = init(scanned)
    apart = {
        f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[:, i // 2], together["layers"][f"layers_{i % 2}"])
        for i in range(6)
    }
    assert [apart[f"layers_{i}"]["wo"]["kernel"].shape for i in range(6)] == [(5, 4), (6, 4)] * 3
    made = nn.unbox(jax.eval_shape(looped.init, jax.random.key(0), X))["params"]
    assert jax.tree.map(jnp.shape, apart) == jax.tree.map(lambda leaf: leaf.shape, made)
    found, expected = quick_jit(scanned.apply)({"params": together}, X), quick_jit(looped.apply)({"params": apart}, X)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_every_layer_draws_its_own_parameters(scan: bool) -> None:
    leaves = jax.tree.leaves(init(Network(LayerStack((MlpBlock(5),), 3, scan))))
    assert sum(leaf.size for leaf in leaves) == 3 * 2 * 4 * 5
    numbers = np.concatenate([np.ravel(leaf) for leaf in leaves])
    assert len(np.unique(numbers)) == numbers.size


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", [None, "full"])
def test_every_layer_draws_its_own_dropout(scan: bool, remat: str | None) -> None:
    network = Network(LayerStack((Dropout(0.5, ()),), 2, scan, remat))
    out = quick_jit(network.apply)({}, jnp.ones((10, 10, 100)), rngs={"dropout": jax.random.key(0)})
    assert abs((out != 0).mean() - 0.25) < 0.02  # and not 0.5


@functools.cache
def loss_and_gradient(scan: bool, remat: str | None) -> tuple[Array, Params]:
    def loss(params: Params) -> Array:
        network = Network(LayerStack((MlpBlock(5, dropout_rate=0.5),), 2, scan, remat))
        return (network.apply({"params": params}, X, rngs={"dropout": jax.random.key(1)}) ** 2).sum()

    params = init(Network(LayerStack((MlpBlock(5),), 2, scan)))
    return quick_jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_recomputing_changes_no_loss_no_gradient_and_no_dropout(remat: str, scan: bool) -> None:
    found, expected = loss_and_gradient(scan, remat), loss_and_gradient(scan, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_mistakes() -> None:
    with pytest.raises(UserError, match=r"LayerStack\.remat: 'most' is not one of full, save_qkv, .*, dots or None"):
        LayerStack((MlpBlock(5),), 2, remat="most")
    with pytest.raises(UserError, match="needs a pattern and repeats >= 1, got 1 layers x 0"):
        LayerStack((MlpBlock(5),), 0)
    with pytest.raises(UserError, match="got 0 layers x 2"):
        LayerStack((), 2)


def test_copies_share_neither_themselves_nor_their_children() -> None:
    inner = MlpBlock(5)
    network = Network(LayerStack((inner,), 2))
    copy = fresh_copy(network, name="other")
    assert copy.name == "other"
    assert copy.stack == network.stack
    outer = nn.Sequential((inner, inner))
    first, second = fresh_copy(outer).layers
    assert first == second == inner
    assert len({id(first), id(second), id(inner)}) == 3
