"""Ways to run a job: how they are written, counted, and turned into gin."""

import pytest

from t5x_like.errors import UserError
from t5x_like.planning.choice import Choice, choices, parse_mesh
from t5x_like.recipe import Recipe
from t5x_like.sharding import fsdp_rules

RECIPE = Recipe(["models/t5_1_1_tiny.gin", "runs/pretrain.gin"], ["BATCH_SIZE=16"])


def test_a_mesh_is_written_by_its_axes() -> None:
    assert parse_mesh("data=16,model=4", 64) == (1, 16, 1, 4)
    assert parse_mesh("model=4", 64) == (1, 16, 1, 4)
    assert parse_mesh("replica=2,expert=4,model=2", 64) == (2, 4, 4, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle=4", r"--mesh=modle=4: 'modle=4' is not AXIS=SIZE.* Did you mean 'model'\?"),
        ("data=four", "'data=four' is not AXIS=SIZE"),
        ("data=3,model=4", "3 x 4 is not 64, the number of devices; try data=16"),
        ("model=0", "'model=0' is not AXIS=SIZE"),
    ],
)
def test_mistakes_in_a_mesh(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_mesh(text, 64)


def test_a_choice_becomes_bindings_and_a_partitioner_of_its_mesh() -> None:
    experiment = Choice((1, 4, 1, 2), "full", 2).of(RECIPE).build()
    assert experiment.partitioner is not None
    assert dict(experiment.partitioner.mesh.shape) == {"replica": 1, "data": 4, "expert": 1, "model": 2}
    assert experiment.partitioner.rules == fsdp_rules()
    assert experiment.trainer.microbatches == 2
    assert experiment.model.network.encoder.stack.remat == "full"
    whole = Choice((1, 8, 1, 1), "none", 1, fsdp=False).of(RECIPE).build()
    assert whole.partitioner is not None
    assert whole.partitioner.rules.embed is None
    assert whole.model.network.encoder.stack.remat is None


def test_every_way_is_tried_within_what_is_given() -> None:
    every = list(choices(8, 1, 1, Choice(), microbatches=(1, 2)))
    meshes = {choice.mesh for choice in every}
    assert meshes == {(1, 8, 1, 1), (1, 4, 1, 2), (1, 2, 1, 4), (1, 1, 1, 8)}
    assert len(every) == 4 * 6 * 2 * 2  # meshes, policies on the device and none, microbatches, FSDP or not
    assert {choice.mesh[2] for choice in choices(8, 1, 4, Choice()) if choice.mesh} == {1, 2, 4}
    assert {choice.mesh[0] for choice in choices(8, 2, 1, Choice()) if choice.mesh} == {2}
    only, whole = choices(8, 1, 1, Choice((1, 8, 1, 1), "full", 4))
    assert str(whole) == "data 8, remat full, 4 microbatches, whole parameters"
    assert str(only) == "data 8, remat full, 4 microbatches, FSDP"
