import jax
import pytest
from jax.sharding import PartitionSpec as P

from t5x_like.errors import UserError
from t5x_like.sharding import Partitioner, ShardingRules, check_divisible, constrain, fsdp_rules, make_mesh


def mesh(**axes: int) -> jax.sharding.Mesh:
    return make_mesh(**axes)


def test_a_mesh_axis_splits_an_array_once_and_the_first_dimension_that_asks_gets_it() -> None:
    rules, eight = fsdp_rules(), mesh(data=4, model=2)
    assert rules.spec(("embed", "heads", "head_dim"), eight) == P("data", "model", None)
    assert rules.spec(("batch", "length", "embed"), eight) == P("data", None, None)
    assert rules.spec(("vocab", "mlp"), eight) == P("model", None)


def test_mesh_axes_of_size_one_are_left_out_and_several_are_joined() -> None:
    assert ShardingRules().spec(("batch", "embed"), mesh(data=8)) == P("data", None)
    assert ShardingRules().spec(("batch",), mesh(replica=2, data=2, model=2)) == P(("replica", "data"))


def test_minus_one_takes_what_is_left() -> None:
    assert dict(mesh(model=2).shape) == {"replica": 1, "data": 4, "expert": 1, "model": 2}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 3}, "does not make 8 devices; let the product be 8"),
        ({"model": 3}, "does not make 8 devices"),
        ({"data": -1, "model": -1}, "at most one is -1"),
        ({"data": 0}, "sizes are positive"),
    ],
)
def test_a_mesh_that_cannot_be_is_explained(axes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_mesh(**axes)


def test_an_unknown_mesh_axis_is_named() -> None:
    with pytest.raises(UserError, match=r"ShardingRules.embed: 'dtaa' is no mesh axis"):
        ShardingRules(embed="dtaa")


def test_every_dimension_that_does_not_divide_is_listed_in_one_message() -> None:
    partitioner = Partitioner(mesh(data=4, model=2))
    shardings = {"a": partitioner.sharding("batch", "vocab"), "b": partitioner.sharding("batch")}
    with pytest.raises(UserError) as error:
        check_divisible({"a": (6, 7), "b": (9,)}, shardings)
    assert "a: dimension 0 of (6, 7) is split 4 ways over data" in str(error.value)
    assert "a: dimension 1 of (6, 7) is split 2 ways over model" in str(error.value)
    assert "b: dimension 0 of (9,) is split 4 ways over data" in str(error.value)
    check_divisible({"a": (8, 6), "b": (4,)}, shardings)


def test_constrain_splits_within_a_partitioner_and_does_nothing_outside() -> None:
    x = jax.numpy.zeros((8, 4))
    assert constrain(x, "batch", "embed") is x
    partitioner = Partitioner(mesh(data=8))
    with partitioner.active():
        split = jax.jit(lambda x: constrain(x, "batch", "embed"))(x)
    assert split.sharding.shard_shape(x.shape) == (1, 4)
