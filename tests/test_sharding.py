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
    assert rules.spec(("batch", "group", "embed"), eight) == P("data", None, None)
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
    partitioner, axes = Partitioner(mesh(data=4, model=2)), ("batch", "vocab")
    with pytest.raises(UserError) as error:
        check_divisible({"a": ((6, 7), axes), "b": ((9,), axes[:1])}, partitioner)
    assert str(error.value) == (
        "the mesh replica=1,data=4,expert=1,model=2 does not divide these arrays; "
        "no mesh of 8 devices does: change the sizes or the rules\n"
        "  a: dimension 0 (batch) of (6, 7) is split 4 ways over data\n"
        "  a: dimension 1 (vocab) of (6, 7) is split 2 ways over model\n"
        "  b: dimension 0 (batch) of (9,) is split 4 ways over data"
    )
    check_divisible({"a": ((8, 6), axes), "b": ((4,), axes[:1])}, partitioner)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((6, 12), "replica=1,data=2,expert=1,model=4"),
        ((2, 1024), "replica=1,data=2,expert=1,model=4"),
        ((16, 3), "replica=1,data=8,expert=1,model=1"),
    ],
)
def test_the_nearest_mesh_that_divides_is_named(shape: tuple[int, int], wanted: str) -> None:
    with pytest.raises(UserError, match=f"the nearest that does: {wanted}\n"):
        check_divisible({"a": (shape, ("batch", "vocab"))}, Partitioner(mesh(data=4, model=2)))


def test_a_batch_may_be_split_further_than_parameters() -> None:
    """Where `data` is too long for the parameters and nothing else divides, parts of it become replicas."""
    arrays = {"x": ((8,), ("batch",)), "table": ((3, 4), ("vocab", "embed"))}
    with pytest.raises(UserError, match="the nearest that does: replica=2,data=4,expert=1,model=1\n"):
        check_divisible(arrays, Partitioner(mesh(data=8), fsdp_rules()))


def test_length_takes_what_other_dimensions_leave() -> None:
    eight, context = mesh(data=4, model=2), ShardingRules(batch="expert", length=("data", "model"))
    assert ShardingRules().spec(("batch", "length", "embed"), eight) == P("data", "model", None)
    assert ShardingRules().spec(("batch", "length", "heads", "head_dim"), eight) == P("data", None, "model", None)
    assert context.spec(("batch", "length", "embed"), eight) == P(None, ("data", "model"), None)
    assert context.spec(("batch", "length", "mlp"), eight) == P(None, "data", "model")


def test_a_length_too_short_to_be_split_stays_whole() -> None:
    with Partitioner(mesh(data=4, model=2)).active():
        one, eight = (jax.jit(lambda x: constrain(x, "batch", "length"))(jax.numpy.ones((4, n))) for n in (1, 8))
    assert one.sharding.shard_shape(one.shape) == (1, 1)
    assert eight.sharding.shard_shape(eight.shape) == (1, 4)


def test_constrain_splits_within_a_partitioner_and_does_nothing_outside() -> None:
    x = jax.numpy.zeros((8, 4))
    assert constrain(x, "batch", "embed") is x
    partitioner = Partitioner(mesh(data=8))
    with partitioner.active():
        split = jax.jit(lambda x: constrain(x, "batch", "embed"))(x)
    assert split.sharding.shard_shape(x.shape) == (1, 4)
