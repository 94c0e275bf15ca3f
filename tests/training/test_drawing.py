"""Fresh parameters: the values of one program for all, without the forward pass, split as they are to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_batch, tiny_model

from t5x_like.sharding import Partitioner, fsdp_rules, make_mesh
from t5x_like.training import train_state
from t5x_like.training.drawing import drawn
from t5x_like.training.optimizers import adafactor

SCANNED = ("SCAN_LAYERS=True",)
REMAT = ("REMAT='full'",)


@pytest.mark.parametrize("bindings", [(), SCANNED, REMAT], ids=["loop", "scan", "remat"])
def test_parameters_are_those_of_one_program(bindings: tuple[str, ...]) -> None:
    """To the last digit but one: tests compile without optimisation, where additions and products are not fused."""
    model, batch = tiny_model(*bindings), random_batch(2)

    def init() -> train_state.Params:
        return model.init(jax.random.key(3), batch)

    found, expected = drawn(init), jax.jit(init)()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=3e-7), found, expected)


@pytest.mark.parametrize("bindings", [(), SCANNED], ids=["loop", "scan"])
def test_every_device_draws_its_own_part(bindings: tuple[str, ...]) -> None:
    partitioner = Partitioner(make_mesh(data=4, model=2), fsdp_rules())
    model, batch, optimizer = tiny_model(*bindings), random_batch(8), adafactor(1e-3)
    state = train_state.create_sharded(model, optimizer, batch, 0, partitioner)
    shardings = train_state.state_shardings(model, optimizer, batch, partitioner)
    jax.tree.map(lambda x, s: s.is_equivalent_to(x.sharding, x.ndim) or pytest.fail(f"{x.sharding}"), state, shardings)
    kernel = state.params["encoder"]["layers" if bindings else "layers_0"]["mlp"]["wi_0"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (16 // 4, *((2,) if bindings else ()), 32 // 2)


def test_what_is_not_asked_for_is_not_computed() -> None:
    computed: list[float] = []

    def init() -> jax.Array:
        kernel = jax.random.normal(jax.random.key(0), (4,))
        unused = jax.pure_callback(lambda x: computed.append(1.0) or x, kernel, kernel)
        jnp.dot(unused, kernel)
        return kernel

    np.testing.assert_array_equal(drawn(init), jax.random.normal(jax.random.key(0), (4,)))
    assert computed == []
