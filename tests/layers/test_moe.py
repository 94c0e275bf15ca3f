"""The sparse layer against `naive_moe`, with itself under other meshes and groupings, and what it costs."""

import dataclasses
import functools
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import naive_moe
import numpy as np
import pytest
from naive_moe import Naive

from t5x_like.architectures.transformer import DecoderLayer
from t5x_like.architectures.variables import logical_axes
from t5x_like.errors import UserError
from t5x_like.layers.attention import MultiHeadAttention
from t5x_like.layers.mlp import MlpBlock
from t5x_like.layers.moe import REPORTS, Experts, RouterReport, SparseMlp
from t5x_like.layers.routing import (
    CapacityFactor,
    ExpertChoice,
    FixedCapacity,
    HashRouter,
    Router,
    TokenChoices,
    Tokens,
    TopK,
)
from t5x_like.sharding import Partitioner, make_mesh
from t5x_like.typing import Array, Bool, Float, Params, PRNGKey, PyTree

BATCH, LENGTH, EXPERTS, EMBED, MLP = 4, 5, 4, 6, 7
GATED = ("gelu", "linear")
KEY = jax.random.key(11)


@dataclasses.dataclass(frozen=True)
class FixedDraws(TopK):
    """Training's policy with a key that tests know, without the rest of training."""

    def __call__(
        self, probabilities: Float[Array, "G S E"], real: Bool[Array, "G S"], capacity: int, key: PRNGKey | None
    ) -> TokenChoices:
        return super().__call__(probabilities, real, capacity, KEY)


def make_params(layer: SparseMlp, seed: int = 0, embed: int = EMBED) -> Params:
    """Drawn by NumPy: kernels that keep activations near 1, and a router that is far from undecided."""
    rng = np.random.default_rng(seed)
    experts = layer.expert
    names = ["wi"] if len(experts.activations) == 1 else ["wi_0", "wi_1"]
    shapes = dict.fromkeys(names, (experts.num_experts, embed, experts.mlp_dim))
    shapes["wo"] = (experts.num_experts, experts.mlp_dim, embed)
    params = {"expert": {k: {"kernel": rng.normal(0, s[1] ** -0.5, s)} for k, s in shapes.items()}}
    if isinstance(layer.router, Router):
        kernel = rng.normal(0, 1.5 * embed**-0.5, (embed, experts.num_experts))
        params["router"] = {"router_weights": {"kernel": kernel}}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def make_inputs(seed: int = 0, batch: int = BATCH, length: int = LENGTH) -> tuple[Array, Array]:
    """Activations and ids."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(batch, length, EMBED)), jnp.float32)
    return x, jnp.asarray(rng.integers(1, 50, (batch, length)), jnp.int32)


WHOLE = jnp.ones((BATCH, LENGTH), bool)
PADDED = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]], bool)


def apply(
    layer: SparseMlp, params: Params, x: Array, tokens: Tokens, key: PRNGKey | None = None
) -> tuple[Array, RouterReport]:
    rngs = None if key is None else {"dropout": key}
    y, variables = layer.apply({"params": params}, x, tokens, rngs=rngs, mutable=[REPORTS])
    return y, variables[REPORTS]["report"]


run = jax.jit(apply, static_argnums=0)


def weighed(y: Array) -> np.ndarray:
    """Weights that make a scalar of an output in which every entry counts differently."""
    return np.random.default_rng(5).normal(size=y.shape).astype(np.float32)


def loss_and_gradients(
    layer: SparseMlp, params: Params, x: Array, tokens: Tokens
) -> tuple[tuple[Array, tuple[Array, RouterReport]], tuple[Params, Array]]:
    """Of the weighed output and the auxiliary loss, with respect to parameters and inputs."""

    def loss(params: Params, x: Array) -> tuple[Array, tuple[Array, RouterReport]]:
        y, report = apply(layer, params, x, tokens)
        return (y * weighed(y)).sum() + report.loss / report.tokens, (y, report)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)


# ---- Against the oracle

MODES: dict[str, dict] = {
    "top 1": {},
    "top 2": {"choices": 2},
    "top 3": {"choices": 3},
    "top 3 normalized": {"choices": 3, "normalize": True},
    "top 2 policy": {"choices": 2, "normalize": True, "second_threshold": 0.4},
    "top 1 priority": {"prioritize": True},
    "top 3 priority": {"choices": 3, "prioritize": True},
    "expert choice": {"kind": "expert_choice"},
    "hash": {"kind": "hash"},
}
SLOTS = {"tight": 2, "ample": 100, "dropless": None}


def both(mode: str, slots: str) -> tuple[SparseMlp, Naive]:
    """The same layer twice. Tight ones have groups of two rows, the others gated experts."""
    options = dict(MODES[mode])
    activations, rows = (("relu",), 2) if slots == "tight" else (GATED, 1)
    weights = {"balance_loss": 0.7, "z_loss": 0.3}
    naive = Naive(EXPERTS, **options, capacity=SLOTS[slots], activations=activations, rows=rows, **weights)
    kind = options.pop("kind", "top_k")
    choose = (FixedDraws if "second_threshold" in options else TopK)(**options)
    router = HashRouter() if kind == "hash" else Router(choose if kind == "top_k" else ExpertChoice(), **weights)
    capacity = None if slots == "dropless" else FixedCapacity(SLOTS[slots])
    return SparseMlp(Experts(EXPERTS, MLP, activations), router, capacity, rows * LENGTH), naive


CASES = [(mode, "tight") for mode in MODES]
CASES += [(m, "ample") for m in ("top 1", "top 2 policy", "top 3 normalized", "expert choice", "hash")]
CASES += [(m, "dropless") for m in ("top 1", "top 3 normalized", "top 2 policy")]


@pytest.mark.parametrize("real", [WHOLE, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize(("mode", "slots"), CASES)
def test_the_oracle(mode: str, slots: str, real: Array) -> None:
    layer, naive = both(mode, slots)
    params, (x, ids) = make_params(layer), make_inputs()
    draws = None
    if naive.second_threshold is not None:
        shape = (BATCH // naive.rows, naive.choices, naive.rows * LENGTH)
        draws = np.asarray(jax.random.uniform(KEY, shape))
    (_, (y, report)), gradients = jax.jit(loss_and_gradients, static_argnums=0)(layer, params, x, Tokens(ids, real))

    def oracle(params: Params, x: np.ndarray) -> tuple[float, naive_moe.Result]:
        made = naive_moe.sparse_mlp(naive, params, x, np.asarray(real), np.asarray(ids), draws)
        return (made.y * weighed(y)).sum() + made.loss / made.tokens, made

    primal = jax.tree.map(np.float64, (params, x))
    _, made = oracle(*primal)
    np.testing.assert_allclose(y, made.y, rtol=0, atol=2e-6)
    for name in RouterReport._fields:
        np.testing.assert_allclose(getattr(report, name), getattr(made, name), rtol=1e-6, err_msg=name)
    if naive.kind != "expert_choice":
        assert made.dropped == 0 or slots == "tight"
        assert made.load.sum() < naive.choices * made.tokens or slots != "tight"
    assert_slopes(lambda point: oracle(*point)[0], primal, gradients)


def assert_slopes(function: Callable[[tuple], float], primal: tuple, gradients: tuple) -> None:
    """Central differences along random directions, one leaf at a time; each mixes every entry of the leaf."""
    rng = np.random.default_rng(3)
    leaves, tree = jax.tree.flatten(primal)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(primal)]
    for i, gradient in enumerate(np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradients)):
        for _ in range(2):
            direction = rng.normal(size=gradient.shape)
            up, down = (
                function(jax.tree.unflatten(tree, [*leaves[:i], leaves[i] + step * direction, *leaves[i + 1 :]]))
                for step in (1e-5, -1e-5)
            )
            found, expected = (gradient * direction).sum(), (up - down) / 2e-5
            tolerance = 3e-6 * (1e-3 + np.linalg.norm(gradient))  # float32's roundings, over the direction
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=names[i])


# ---- Which tokens matter to which


def test_a_padded_batch_is_the_unpadded_one() -> None:
    layer = SparseMlp(Experts(EXPERTS, MLP, GATED), Router(TopK(2), balance_loss=1.0), FixedCapacity(2))
    (x, ids), params = make_inputs(), make_params(layer)
    y, report = run(layer, params, x, Tokens(ids, WHOLE))
    junk = make_inputs(1)
    longer = [jnp.concatenate(pair, axis=1) for pair in zip((x, ids), junk, strict=True)]
    padded, padded_report = run(layer, params, longer[0], Tokens(longer[1], jnp.pad(WHOLE, ((0, 0), (0, LENGTH)))))
    np.testing.assert_allclose(padded[:, :LENGTH], y, rtol=1e-6, atol=1e-6)
    assert not padded[:, LENGTH:].any()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), padded_report, report)
    assert report.dropped > 0


@pytest.mark.parametrize("choose", [TopK(), TopK(2, prioritize=True), ExpertChoice()], ids=str)
def test_groups_do_not_compete(choose: TopK | ExpertChoice) -> None:
    layer = SparseMlp(Experts(EXPERTS, MLP), Router(choose), FixedCapacity(2), 2 * LENGTH)
    (x, ids), (other, other_ids), params = make_inputs(), make_inputs(1), make_params(layer)
    first, _ = run(layer, params, x, Tokens(ids, WHOLE))
    second, _ = run(layer, params, jnp.concatenate([x[:2], other[2:]]), Tokens(other_ids, WHOLE))
    np.testing.assert_allclose(first[:2], second[:2], rtol=1e-6, atol=1e-6)
    assert not np.allclose(first[2:], second[2:])


@pytest.mark.parametrize("router", [Router(TopK()), HashRouter()], ids=["top 1", "hash"])
def test_the_last_token_changes_nothing_before_it(router: Router | HashRouter) -> None:
    layer = SparseMlp(Experts(EXPERTS, MLP), router, FixedCapacity(1))
    (x, ids), (other, other_ids), params = make_inputs(), make_inputs(1), make_params(layer)
    y, report = run(layer, params, x, Tokens(ids, WHOLE))
    changed = Tokens(ids.at[:, -1].set(other_ids[:, -1]), WHOLE)
    after, _ = run(layer, params, x.at[:, -1].set(other[:, -1]), changed)
    np.testing.assert_allclose(after[:, :-1], y[:, :-1], rtol=1e-6, atol=1e-6)
    assert report.dropped > 0


CROWDING = jnp.zeros((EMBED, EXPERTS), jnp.float32).at[:, 0].set(1.0)  # sends tokens of ones to expert 0


class Spy:
    """A capacity of 1 that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int, bool]] = []

    def __call__(self, group_size: int, num_experts: int, choices: int, training: bool) -> int:
        self.asked.append((group_size, num_experts, choices, training))
        return 1


@pytest.mark.parametrize(
    ("group_size", "length", "tokens"),
    [
        *((None, 5, 5), (4, 5, 5), (9, 5, 5)),  # at least one sequence, and whole ones
        *((10, 5, 10), (15, 5, 10), (1000, 5, 20)),  # a number of sequences that divides the batch of 4
        (1000, 1, 1),  # a cached step: every row by itself
    ],
)
def test_a_group_is_whole_sequences(group_size: int | None, length: int, tokens: int) -> None:
    (x, ids), spy = make_inputs(length=length), Spy()
    layer = SparseMlp(Experts(EXPERTS, MLP), Router(TopK(2)), spy, group_size)
    jax.eval_shape(lambda: apply(layer, make_params(layer), x, Tokens(ids, ids > 0)))
    assert spy.asked == [(tokens, EXPERTS, 2, False)]


def test_rows_of_a_group_share_its_slots() -> None:
    """One slot per group, and everyone wants expert 0's."""
    layer = SparseMlp(Experts(EXPERTS, MLP), Router(), FixedCapacity(1), 2 * LENGTH)
    params = make_params(layer) | {"router": {"router_weights": {"kernel": CROWDING}}}
    y, report = run(layer, params, jnp.ones((BATCH, LENGTH, EMBED)), Tokens(jnp.ones(WHOLE.shape, jnp.int32), WHOLE))
    np.testing.assert_array_equal(report.load, [2, 0, 0, 0])
    assert report.dropped == 18
    assert sorted(zip(*np.nonzero(np.asarray(y).any(axis=-1)), strict=True)) == [(0, 0), (2, 0)]


def test_capacity_is_trainings_where_there_is_a_dropout_key() -> None:
    """8 tokens over 4 experts: 2 each, times 1.25 is 3 slots, times 2 is 4."""
    shape = (2, 8)
    tokens = Tokens(jnp.ones(shape, jnp.int32), jnp.ones(shape, bool))
    layer = SparseMlp(Experts(EXPERTS, MLP), Router(), CapacityFactor(minimum=1))
    params = make_params(layer) | {"router": {"router_weights": {"kernel": CROWDING}}}
    for key, slots in ((KEY, 3), (None, 4)):
        _, report = run(layer, params, jnp.ones((*shape, EMBED)), tokens, key)
        assert (report.load[0], report.dropped) == (2 * slots, 16 - 2 * slots)


# ---- One layer, two ways


def test_dropless_is_ample_capacity() -> None:
    ample = SparseMlp(Experts(EXPERTS, MLP, GATED), Router(TopK(3)), FixedCapacity(1000), 2 * LENGTH)
    dropless = dataclasses.replace(ample, capacity=None)
    (x, ids), params = make_inputs(), make_params(ample)
    found, expected = (run(layer, params, x, Tokens(ids, PADDED)) for layer in (dropless, ample))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, expected)


@pytest.mark.parametrize(
    ("activations", "capacity"), [(("relu",), None), (GATED, FixedCapacity(1000))], ids=["plain", "gated"]
)
def test_equal_experts_are_a_dense_block(activations: tuple[str, ...], capacity: FixedCapacity | None) -> None:
    layer = SparseMlp(Experts(EXPERTS, MLP, activations), Router(TopK(2, normalize=True)), capacity)
    (x, ids), params = make_inputs(), make_params(layer)
    one = jax.tree.map(lambda kernel: kernel[0], params["expert"])
    params["expert"] = jax.tree.map(lambda kernel: jnp.broadcast_to(kernel[:1], kernel.shape), params["expert"])
    y, _ = run(layer, params, x, Tokens(ids, WHOLE))
    np.testing.assert_allclose(y, MlpBlock(MLP, activations).apply({"params": one}, x), rtol=1e-5, atol=1e-6)


def test_bfloat16_activations_are_routed_in_float32() -> None:
    shape = (8, 64)
    layer = SparseMlp(Experts(EXPERTS, MLP, dtype="bfloat16"), Router(), FixedCapacity(1000))
    x, ids = make_inputs(0, *shape)
    x, params, tokens = x.astype(jnp.bfloat16), make_params(layer), Tokens(ids, jnp.ones(shape, bool))
    # What all experts have in common changes no choice, but takes the bits of a number that has few.
    common = 10 * np.random.default_rng(1).normal(size=(EMBED, 1)).astype(np.float32)
    kernel = params["router"]["router_weights"]["kernel"] = params["router"]["router_weights"]["kernel"] + common
    routed = jax.jit(lambda x: layer.router.apply({"params": params["router"]}, x, tokens, EXPERTS, 64))(x)
    choices = (np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)).argmax(axis=-1)
    np.testing.assert_array_equal(routed.choices.experts[:, 0], choices)
    rounded = np.asarray(x) @ np.asarray(kernel).astype(jnp.bfloat16)
    assert (rounded.argmax(axis=-1) != choices).any(), "lower precision would choose others"
    assert routed.choices.gates.dtype == jnp.float32
    y, report = run(layer, params, x, tokens)
    naive = Naive(EXPERTS, capacity=1000)
    made = naive_moe.sparse_mlp(naive, *jax.tree.map(np.float64, (params, x)), np.asarray(tokens.real), np.asarray(ids))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(report.load, made.load)
    np.testing.assert_allclose(y.astype(jnp.float32), made.y, atol=0.03)  # bfloat16 has 8 bits, outputs are below 2


# ---- Randomness


def test_noise_needs_a_dropout_key_and_repeats_with_it() -> None:
    layer = SparseMlp(Experts(EXPERTS, MLP, dropout_rate=0.3), Router(jitter_noise=0.1), FixedCapacity(1000))
    (x, ids), params = make_inputs(), make_params(layer)
    tokens = Tokens(ids, WHOLE)
    quiet, _ = run(layer, params, x, tokens)
    primal = jax.tree.map(np.float64, (params, x))
    made = naive_moe.sparse_mlp(Naive(EXPERTS), *primal, np.asarray(WHOLE), np.asarray(ids))
    np.testing.assert_allclose(quiet, made.y, atol=2e-6)
    other_key = jax.jit(lambda x: layer.apply({"params": params}, x, tokens, rngs={"params": KEY}))(x)
    np.testing.assert_array_equal(other_key, quiet)
    first, again, other = (run(layer, params, x, tokens, jax.random.key(seed))[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != quiet).any()
    assert (first != other).any()


def test_jitter_reaches_the_router_alone() -> None:
    """One choice with a normalized gate of 1: as long as the choice stands, noise may not change the output."""
    layer = SparseMlp(Experts(EXPERTS, MLP), Router(TopK(normalize=True), jitter_noise=1e-3), FixedCapacity(1000))
    (x, ids), params = make_inputs(), make_params(layer)
    (quiet, calm), (noisy, jittered) = (run(layer, params, x, Tokens(ids, WHOLE), key) for key in (None, KEY))
    np.testing.assert_array_equal(quiet, noisy)
    assert calm.entropy != jittered.entropy


def masks(capacity: FixedCapacity | None) -> np.ndarray:
    """Dropout's, of 50 rows with one token each and 40 columns: all kernels are identities."""
    layer = SparseMlp(Experts(2, 40, dropout_rate=0.2), Router(TopK(normalize=True)), capacity)
    params = make_params(layer, embed=40)
    params["expert"] = {name: {"kernel": jnp.broadcast_to(jnp.eye(40), (2, 40, 40))} for name in ("wi", "wo")}
    tokens = Tokens(jnp.ones((50, 1), jnp.int32), jnp.ones((50, 1), bool))
    return np.asarray(run(layer, params, jnp.ones((50, 1, 40)), tokens, KEY)[0][:, 0])


@pytest.mark.parametrize("capacity", [FixedCapacity(1), None], ids=["capacity", "dropless"])
def test_expert_dropout_zeroes_its_share_and_every_sequence_has_its_mask(capacity: FixedCapacity | None) -> None:
    out = masks(capacity)
    assert set(np.unique(out)) == {0.0, 1.25}
    assert len(np.unique(out, axis=0)) == 50
    assert abs((out == 0).mean() - 0.2) < 0.04


# ---- Reports and mistakes


def test_there_is_no_report_where_nobody_can_read_it() -> None:
    layer = SparseMlp(Experts(EXPERTS, MLP), Router(), FixedCapacity(2))
    (x, ids), params = make_inputs(), make_params(layer)
    assert jax.eval_shape(lambda: layer.apply({"params": params}, x, Tokens(ids, WHOLE))).shape == x.shape
    _, variables = jax.eval_shape(lambda: layer.apply({"params": params}, x, Tokens(ids, WHOLE), mutable=["cache"]))
    assert variables == {}


def test_mistakes() -> None:
    with pytest.raises(UserError, match=r"Experts\.activations: 'gleu' is not one of relu"):
        Experts(EXPERTS, MLP, ("gleu",))
    layer = SparseMlp(Experts(EXPERTS, MLP), Router(ExpertChoice()), capacity=None)
    (x, ids), params = make_inputs(), make_params(layer)
    with pytest.raises(
        UserError, match=r"SparseMlp\.capacity is None \(dropless\), but experts that choose need a cap"
    ):
        run(layer, params, x, Tokens(ids, WHOLE))


def group_on_mesh(group_size: int, batch: int) -> None:
    layer = SparseMlp(Experts(8, MLP), group_size=group_size)
    x, ids = make_inputs(batch=batch)
    with Partitioner(make_mesh(data=1, expert=8)).active():
        jax.eval_shape(lambda: layer.apply({"params": make_params(layer)}, x, Tokens(ids, jnp.ones(ids.shape, bool))))


def test_a_group_size_that_the_mesh_does_not_divide_is_explained() -> None:
    message = r"SparseMlp\.group_size 10 makes 4 groups of 2 sequences, which the mesh splits 8 ways; set it to 5\n"
    with pytest.raises(UserError, match=message):
        group_on_mesh(2 * LENGTH, 8)


def test_the_group_size_that_the_message_recommends_works() -> None:
    with pytest.raises(UserError, match="makes 6 groups of 4 sequences, which the mesh splits 8 ways; set it to 15\n"):
        group_on_mesh(4 * LENGTH, 24)
    group_on_mesh(15, 24)
    with pytest.raises(UserError, match="make the batch a multiple of 8"):
        group_on_mesh(LENGTH, 12)


@pytest.mark.parametrize("choose", [ExpertChoice(), TopK(prioritize=True)], ids=str)
def test_a_decoder_refuses_routers_that_look_ahead(choose: TopK | ExpertChoice) -> None:
    attention = MultiHeadAttention(2, 3)
    DecoderLayer(attention, attention, SparseMlp(Experts(EXPERTS, MLP), Router(TopK(2))))
    DecoderLayer(attention, attention, SparseMlp(Experts(EXPERTS, MLP), HashRouter()))
    with pytest.raises(
        UserError, match=r"DecoderLayer\.mlp: its router looks at tokens that the decoder has yet to write"
    ):
        DecoderLayer(attention, attention, SparseMlp(Experts(EXPERTS, MLP), Router(choose)))


# ---- Meshes and what the layer costs

MESHES = {
    "expert 8": {"data": 1, "expert": 8},
    "data 2 expert 4": {"data": 2, "expert": 4},
    "data 4 model 2": {"data": 4, "model": 2},
    "replica 2 expert 4": {"replica": 2, "data": 1, "expert": 4},
}
SHARDED = {
    "top 1": SparseMlp(Experts(8, 8), Router(), FixedCapacity(2), 8),
    "top 2": SparseMlp(Experts(8, 8, GATED), Router(TopK(2, normalize=True)), FixedCapacity(2), 8),
    "expert choice": SparseMlp(Experts(8, 8), Router(ExpertChoice()), FixedCapacity(3), 8),
    "dropless": SparseMlp(Experts(8, 8, GATED), Router(TopK(2)), None, 8),
}


def compiled(partitioner: Partitioner, layers: tuple[SparseMlp, ...], *args: PyTree) -> jax.stages.Compiled:
    """Loss and gradients of layers, given parameters of each, under a mesh that splits them as in training."""

    def step(params: tuple[Params, ...], x: Array, tokens: Tokens) -> tuple[list, list]:
        made = [loss_and_gradients(layer, each, x, tokens) for layer, each in zip(layers, params, strict=True)]
        return [values for values, _ in made], [gradients for _, gradients in made]

    _, x, tokens = args
    names = [logical_axes(jax.eval_shape(layer.init, KEY, x, tokens)["params"]) for layer in layers]
    parameters, batch = tuple(map(partitioner.tree_shardings, names)), partitioner.sharding("batch")
    gradients = [(each, batch) for each in parameters]
    with partitioner.active():
        return (
            jax.jit(step, in_shardings=(parameters, batch, batch), out_shardings=(None, gradients))
            .lower(*args)
            .compile()
        )


def sharded_arguments() -> tuple[tuple[Params, ...], Array, Tokens]:
    x, ids = make_inputs(batch=16, length=4)
    return tuple(map(make_params, SHARDED.values())), x, Tokens(ids, ids > 10)


@functools.cache
def on_one_device() -> tuple:
    one = Partitioner(make_mesh(data=1, devices=jax.devices()[:1]))
    return jax.device_get(compiled(one, tuple(SHARDED.values()), *sharded_arguments())(*sharded_arguments()))


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_changes_no_output_and_no_gradient(mesh: str) -> None:
    args = sharded_arguments()
    step = compiled(Partitioner(make_mesh(**MESHES[mesh])), tuple(SHARDED.values()), *args)
    found = step(*jax.device_put(args, step.input_shardings[0]))
    for (path, value), expected in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(on_one_device()), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_experts_cost_four_all_to_alls_and_nothing_else_but_sums() -> None:
    (params, *_), x, tokens = sharded_arguments()
    text = compiled(Partitioner(make_mesh(data=1, expert=8)), (SHARDED["top 1"],), (params,), x, tokens).as_text()
    count = {
        name: len(re.findall(rf" {name}(-start)?\(", text))
        for name in ("all-to-all", "all-gather", "collective-permute", "reduce-scatter", "all-reduce")
    }
    assert count.pop("all-reduce") > 0  # the router's gradient: the pattern does find what there is
    assert count == {"all-to-all": 4, "all-gather": 0, "collective-permute": 0, "reduce-scatter": 0}


@pytest.mark.parametrize("experts", [8, 64, 256])
def test_routing_takes_a_twentieth_of_the_arithmetic_at_most(experts: int) -> None:
    batch, length, embed, mlp = 8, 512, 512, 2048
    layer = SparseMlp(Experts(experts, mlp), Router(), CapacityFactor(1.0, 1.0, 1))
    x = jax.ShapeDtypeStruct((batch, length, embed), jnp.float32)
    tokens = Tokens(*(jax.ShapeDtypeStruct((batch, length), dtype) for dtype in (jnp.int32, jnp.bool_)))
    params = jax.eval_shape(lambda x, tokens: nn.unbox(layer.init(KEY, x, tokens))["params"], x, tokens)

    def loss(params: Params, x: Array, tokens: Tokens) -> Array:
        y, report = apply(layer, params, x, tokens)
        return y.sum() + report.loss / report.tokens

    cost = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, x, tokens).compile().cost_analysis()
    slots = batch * length  # as many as tokens
    arithmetic = 3 * 4 * slots * embed * mlp + 3 * 2 * slots * embed * experts
    assert arithmetic <= cost["flops"] * 1.01
    assert cost["flops"] <= 1.05 * arithmetic
