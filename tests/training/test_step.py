"""The training step: its arithmetic, its meshes, and what it does when numbers go wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import random_batch, tiny_model

from t5x_like.architectures.variables import named_leaves
from t5x_like.models.contract import Model
from t5x_like.sharding import Partitioner, ShardingRules, fsdp_rules, make_mesh
from t5x_like.training import train_state
from t5x_like.training.optimizers import adafactor, freeze, partition
from t5x_like.training.step import TrainStep, step_key
from t5x_like.training.train_state import TrainState

SGD = optax.sgd(0.1)


@functools.cache
def after_one_step(partitioner: Partitioner, microbatches: int = 1, bindings: tuple[str, ...] = ()) -> tuple:
    """State and report after one SGD step, whose update is the gradient itself."""
    model, batch = tiny_model(*bindings), random_batch(8, pack=True)
    state = train_state.create_sharded(model, SGD, batch, 0, partitioner)
    shardings = train_state.state_shardings(model, SGD, batch, partitioner)
    step = TrainStep(model, SGD, microbatches=microbatches).compiled(partitioner, shardings)
    return jax.device_get(step(state, jax.device_put(batch, partitioner.sharding("batch"))))


def created(model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    return jax.jit(lambda: train_state.create(model, optimizer, random_batch(8), 0))()


def assert_close(result: tuple, expected: tuple) -> None:
    for (name, leaf), (_, wanted) in zip(named_leaves(result[0].params), named_leaves(expected[0].params), strict=True):
        np.testing.assert_allclose(leaf, wanted, atol=1e-5, err_msg=name)
    for name, value in expected[1].scalars.items():
        np.testing.assert_allclose(result[1].scalars[name], value, rtol=1e-5, err_msg=name)


ONE = Partitioner(make_mesh(data=1, devices=jax.devices()[:1]))


@pytest.mark.parametrize(
    "partitioner",
    [
        Partitioner(make_mesh(data=4, model=2)),
        Partitioner(make_mesh(data=4, model=2), fsdp_rules()),
        Partitioner(make_mesh(replica=2, data=2, expert=2)),
        Partitioner(make_mesh(data=8), ShardingRules(embed="data")),
    ],
    ids=["data 4 model 2", "data 4 model 2 fsdp", "replica 2 data 2 expert 2", "data 8 fsdp"],
)
def test_a_mesh_gives_one_devices_loss_and_gradients(partitioner: Partitioner) -> None:
    assert_close(after_one_step(partitioner), after_one_step(ONE))


def test_fsdp_splits_parameters_and_optimizer_state_over_data() -> None:
    partitioner = Partitioner(make_mesh(data=4, model=2), fsdp_rules())
    optimizer = adafactor(1e-3, min_dim_size_to_factor=1)
    shardings = train_state.state_shardings(tiny_model(), optimizer, random_batch(8), partitioner)
    shapes = train_state.abstract(tiny_model(), optimizer, random_batch(8), shardings)
    state = {name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in named_leaves(shapes)}
    assert state["params/encoder/layers_0/mlp/wi_0/kernel"] == (16 // 4, 32 // 2)
    rows = next(name for name in state if name.endswith("v_row/encoder/layers_0/mlp/wi_0/kernel"))
    columns = next(name for name in state if name.endswith("v_col/encoder/layers_0/mlp/wi_0/kernel"))
    assert (state[rows], state[columns]) == ((16 // 4,), (32 // 2,))


def test_a_mesh_that_does_not_divide_the_parameters_names_them_before_compiling() -> None:
    partitioner = Partitioner(make_mesh(data=1, model=8))
    with pytest.raises(
        ValueError, match=r"encoder/layers_0/attention/query/kernel: dimension 1 \(heads\) of \(16, 2, 8\)"
    ):
        train_state.state_shardings(tiny_model(), SGD, random_batch(8), partitioner)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_add_up_to_the_big_batch(microbatches: int) -> None:
    """Rows differ in real tokens, so a mean of means would not."""
    assert_close(after_one_step(ONE, microbatches), after_one_step(ONE))


def test_microbatches_on_a_mesh() -> None:
    assert_close(after_one_step(Partitioner(make_mesh(data=4, model=2)), 2), after_one_step(ONE))


def test_the_loss_is_a_mean_over_real_target_tokens() -> None:
    model, batch = tiny_model(), random_batch(8)
    state = created(model, SGD)
    _, report = jax.jit(TrainStep(model, SGD))(state, batch)
    log_probabilities = jax.nn.log_softmax(jax.jit(model.logits)(state.params, batch))
    real = [(row, column) for row, column in np.argwhere(batch["decoder_target_tokens"] != 0)]
    losses = [-log_probabilities[r, c, batch["decoder_target_tokens"][r, c]] for r, c in real]
    assert report.tokens == len(real)
    np.testing.assert_allclose(report.scalars["loss"] - report.scalars["z_loss"], np.mean(losses), rtol=1e-5)


def test_scanned_and_unscanned_layers_train_alike() -> None:
    """Three Adafactor steps from the same weights: factoring, parameter scale and clipping are per layer."""
    loop, scan = tiny_model(), tiny_model("SCAN_LAYERS=True")
    optimizer = adafactor(0.1, min_dim_size_to_factor=4)
    state = created(loop, optimizer)

    def stack(side: dict) -> dict:
        layers = [side[f"layers_{i}"] for i in range(2)]
        rest = {name: value for name, value in side.items() if not name.startswith("layers_")}
        return {**rest, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *layers)}

    def stacked(params: dict) -> dict:
        return {name: stack(side) if name in ("encoder", "decoder") else side for name, side in params.items()}

    params = stacked(state.params)
    scanned = TrainState(state.step, params, optimizer.init(params))
    loop_step, scan_step = jax.jit(TrainStep(loop, optimizer)), jax.jit(TrainStep(scan, optimizer))
    for seed in range(3):
        state, report = loop_step(state, random_batch(8, seed))
        scanned, scanned_report = scan_step(scanned, random_batch(8, seed))
        np.testing.assert_allclose(report.scalars["loss"], scanned_report.scalars["loss"], rtol=1e-5)
    for (name, leaf), (_, wanted) in zip(
        named_leaves(scanned.params), named_leaves(stacked(state.params)), strict=True
    ):
        np.testing.assert_allclose(leaf, wanted, atol=2e-4, rtol=2e-4, err_msg=name)


def test_a_step_that_is_not_finite_leaves_parameters_and_optimizer_bit_identical() -> None:
    model, batch = tiny_model(), random_batch(8)
    optimizer = adafactor(1e-2)
    step = jax.jit(TrainStep(model, optimizer))
    state, _ = step(created(model, optimizer), batch)
    params = jax.tree.map(lambda x: x, state.params)
    params["token_embedder"]["embedding"] = params["token_embedder"]["embedding"].at[5].set(jnp.nan)
    poisoned = state._replace(params=params)
    batch["encoder_input_tokens"][0, 0] = 5
    after, report = step(poisoned, batch)
    assert not report.finite
    assert after.step == state.step + 1
    for (name, leaf), (_, before) in zip(named_leaves(after[1:]), named_leaves(poisoned[1:]), strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(before).tobytes(), name
    assert jax.jit(TrainStep(model, optimizer))(state, random_batch(8))[1].finite


def test_a_step_lowered_from_shapes_is_the_compiled_one() -> None:
    model, batch = tiny_model(), random_batch(8, pack=True)
    shardings = train_state.state_shardings(model, SGD, batch, ONE)
    shapes = train_state.abstract(model, SGD, batch, shardings)
    program = TrainStep(model, SGD).lowered(ONE, shardings, shapes, batch).compile()
    state = train_state.create_sharded(model, SGD, batch, 0, ONE)
    result = program(state, jax.device_put(batch, ONE.sharding("batch")))
    jax.tree.map(np.testing.assert_array_equal, result, after_one_step(ONE))


def test_dropout_is_a_function_of_seed_and_step() -> None:
    model, batch = tiny_model("DROPOUT_RATE=0.5"), random_batch(8)
    state = created(model, SGD)

    steps = {seed: jax.jit(TrainStep(model, SGD, seed)) for seed in (1, 2)}

    def loss(seed: int, step: int) -> float:
        return float(steps[seed](state._replace(step=jnp.int32(step)), batch)[1].scalars["loss"])

    assert loss(1, 3) == loss(1, 3)
    assert len({loss(1, 3), loss(1, 4), loss(2, 3)}) == 3
    expected = jax.jit(model.loss)(state.params, batch, step_key(1, jnp.int32(3))).loss
    np.testing.assert_allclose(loss(1, 3), expected.total / expected.weight, rtol=1e-6)


def test_frozen_parameters_stay_bit_identical_and_the_others_move() -> None:
    model, batch = tiny_model(), random_batch(8)
    optimizer = partition((("token_embedder/.*|encoder/.*", freeze()),), adafactor(1e-2))
    state = created(model, optimizer)
    after, _ = jax.jit(TrainStep(model, optimizer))(state, batch)
    for (name, leaf), (_, before) in zip(named_leaves(after.params), named_leaves(state.params), strict=True):
        assert np.array_equal(leaf, before) == name.startswith(("token_embedder/", "encoder/")), name
