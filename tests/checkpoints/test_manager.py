"""Our own checkpoints: what is kept, what comes back, on which mesh, and what is refused."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from t5x_like.checkpoints.manager import CheckpointPolicy, Checkpoints, CorruptCheckpoint
from t5x_like.checkpoints.restore import RestoreFrom
from t5x_like.errors import RunFailed, UserError
from t5x_like.sharding import make_mesh
from t5x_like.training.train_state import TrainState

POSITION = {"0": {"block": 3, "row": 5, "tasks": {"a": [1, 2]}}}


def state(value: float = 1.0) -> TrainState:
    params = {"encoder": {"kernel": jnp.full((8, 4), value, jnp.float32)}, "decoder": {"scale": jnp.arange(4.0)}}
    return TrainState(jnp.int32(7), params, {"ema": jax.tree.map(lambda x: x + 100, params), "count": jnp.int32(7)})


def like(tree: TrainState, sharding: jax.sharding.Sharding | None = None) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree)


def save(folder: Path, steps: list[int], policy: CheckpointPolicy, metrics: dict[int, float] | None = None) -> None:
    with Checkpoints(folder, policy) as checkpoints:
        for step in steps:
            found = {"task/bleu": metrics[step]} if metrics and step in metrics else None
            checkpoints.save(step, state(step), POSITION, found)


def steps(folder: Path) -> list[int]:
    with Checkpoints(folder) as checkpoints:
        return checkpoints.steps()


def test_what_was_saved_comes_back_with_its_position(tmp_path: Path) -> None:
    save(tmp_path, [1, 2], CheckpointPolicy())
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(like(state()))
    assert restored is not None
    assert restored.position == POSITION
    assert restored.warnings == []
    for leaf, expected in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state(2)), strict=True):
        np.testing.assert_array_equal(leaf, expected)


def test_the_newest_the_regular_and_the_best_stay(tmp_path: Path) -> None:
    scores = {1: 0.1, 2: 0.9, 3: 0.2, 5: 0.8, 6: 0.3, 7: 0.1}
    policy = CheckpointPolicy(keep_last=2, keep_every=4, keep_best=1, best_metric="task/bleu")
    save(tmp_path / "max", list(range(1, 10)), policy, scores)
    assert steps(tmp_path / "max") == [2, 4, 8, 9]
    policy = CheckpointPolicy(keep_last=1, keep_best=2, best_metric="task/bleu", best_mode="min")
    save(tmp_path / "min", list(range(1, 10)), policy, scores)
    assert steps(tmp_path / "min") == [1, 7, 9]
    save(tmp_path / "last", list(range(1, 6)), CheckpointPolicy(keep_last=3))
    assert steps(tmp_path / "last") == [3, 4, 5]


def test_a_state_goes_to_another_mesh(tmp_path: Path) -> None:
    save(tmp_path, [1], CheckpointPolicy())
    mesh = make_mesh(data=4, model=2)
    target = like(state(), jax.NamedSharding(mesh, P()))
    split = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=jax.NamedSharding(mesh, P("data", "model")))
    target.params["encoder"]["kernel"] = split
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(1, target)
    kernel = restored.params["encoder"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 2)
    np.testing.assert_array_equal(kernel, np.ones((8, 4)))


def test_parameters_alone_are_the_average_where_there_is_one(tmp_path: Path) -> None:
    save(tmp_path / "run" / "checkpoints", [3], CheckpointPolicy())
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        kernel = checkpoints.restore_params(3, {"encoder/kernel": like(state()).params["encoder"]["kernel"]})
    np.testing.assert_array_equal(kernel["encoder/kernel"], np.full((8, 4), 103.0))


def test_an_array_that_changed_on_disk_is_named(tmp_path: Path) -> None:
    save(tmp_path, [1], CheckpointPolicy())
    digests = tmp_path / "1" / "digests" / "metadata"
    text = digests.read_text()
    with Checkpoints(tmp_path) as checkpoints:
        right = checkpoints.saved_digests(1)["params/encoder/kernel"]
    digests.write_text(text.replace(str(right), str(right + 1)))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CorruptCheckpoint, match=r"1: not what was saved: params/encoder/kernel$"):
            checkpoints.restore(1, like(state()))
        with pytest.raises(RunFailed, match="no checkpoint is whole"):
            checkpoints.restore_latest(like(state()))


def test_a_checkpoint_without_its_metadata_is_stepped_over(tmp_path: Path) -> None:
    save(tmp_path, [1, 2], CheckpointPolicy())
    (tmp_path / "2" / "state" / "_METADATA").unlink()
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(like(state()))
    assert restored is not None
    np.testing.assert_array_equal(restored.state.params["encoder"]["kernel"], np.ones((8, 4)))
    assert f"{tmp_path / '2'}: cannot be read" in restored.warnings[0]


def test_another_model_is_refused_with_the_parameters_that_differ(tmp_path: Path) -> None:
    save(tmp_path, [1], CheckpointPolicy())
    other = like(state())
    other.params["encoder"] = {"wi": other.params["encoder"]["kernel"]}
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.restore_latest(other)
    assert "encoder/kernel: (8, 4) in the checkpoint, missing in the model" in str(error.value)
    assert "encoder/wi: missing in the checkpoint, (8, 4) in the model" in str(error.value)


def test_renames_take_other_names_and_mistakes_are_explained(tmp_path: Path) -> None:
    save(tmp_path / "run" / "checkpoints", [3], CheckpointPolicy())
    ours = {"body": {"kernel": jnp.zeros((8, 4))}, "head": jnp.zeros(2)}
    path = str(tmp_path / "run")
    taken = RestoreFrom(path, include="body/.*", renames=(("^body/", "encoder/"),))(ours)
    np.testing.assert_array_equal(taken["body"]["kernel"], np.full((8, 4), 103.0))
    np.testing.assert_array_equal(taken["head"], np.zeros(2))
    with pytest.raises(UserError, match=r"head: \(2,\) is wanted, over there is nothing"):
        RestoreFrom(path, renames=(("^body/", "encoder/"),))(ours)
    with pytest.raises(UserError, match=r"matches no parameter, such as body/kernel"):
        RestoreFrom(path, include="decoder")(ours)
    with pytest.raises(UserError, match=r"has no checkpoint of step 4; it has \[3\]"):
        RestoreFrom(path, step=4, include="body/.*")(ours)
    with pytest.raises(UserError, match="is no regular expression"):
        RestoreFrom(path, include="(")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"save_period": 0}, "at least 1"),
        ({"keep_best": 2}, "needs best_metric"),
        ({"best_mode": "best"}, "it is 'max' or 'min'"),
    ],
)
def test_a_policy_that_cannot_be_is_explained(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CheckpointPolicy(**fields)


def test_two_parameters_may_come_from_one(tmp_path: Path) -> None:
    """As a student's and its teacher's do; each has its own memory, which the training step gives away."""
    save(tmp_path / "run" / "checkpoints", [3], CheckpointPolicy())
    ours = {"body": {"kernel": jnp.zeros((8, 4))}, "twin": {"kernel": jnp.zeros((8, 4))}}
    taken = RestoreFrom(str(tmp_path / "run"), renames=(("^(body|twin)/", "encoder/"),))(ours)
    for name in ours:
        np.testing.assert_array_equal(taken[name]["kernel"], np.full((8, 4), 103.0))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(taken)]
    assert len(set(pointers)) == 2


def test_a_parameter_of_another_shape_is_refused(tmp_path: Path) -> None:
    """Neither cut nor padded, which would leave zeros that no digest tells from saved ones."""
    save(tmp_path, [1], CheckpointPolicy())
    for shape in ((8, 6), (8, 2)):
        other = like(state())
        kernel = other.params["encoder"]["kernel"]
        other.params["encoder"]["kernel"] = jax.ShapeDtypeStruct(shape, kernel.dtype, sharding=kernel.sharding)
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError) as error:
            checkpoints.restore_latest(other)
        assert f"encoder/kernel: (8, 4) in the checkpoint, {shape} in the model" in str(error.value)


def test_what_is_saved_is_verified_though_its_memory_is_given_away_at_once(tmp_path: Path) -> None:
    """Digests may still be computing when the next step takes the state's memory."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
    trained = jax.jit(lambda: jnp.arange(2.0**20).reshape(1024, 1024))()
    with Checkpoints(tmp_path, CheckpointPolicy()) as checkpoints:
        saved = TrainState(jnp.int32(0), {"kernel": trained}, {})
        checkpoints.save(0, saved, POSITION)
        jax.block_until_ready(step(saved))
        shapes = TrainState(*(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), part) for part in saved))
        restored, _ = checkpoints.restore(0, like(jax.jit(lambda: jax.tree.map(jnp.zeros_like, shapes))()))
    np.testing.assert_array_equal(restored.params["kernel"], np.arange(2.0**20).reshape(1024, 1024))
