"""Adafactor against Hugging Face's, naive NumPy and numbers by hand; the rest against torch and by hand."""

import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import torch
from transformers.optimization import Adafactor as HuggingFaceAdafactor

from t5x_like.architectures.variables import named_leaves
from t5x_like.errors import UserError
from t5x_like.training import optimizers, schedules
from t5x_like.typing import Params, PyTree

Shapes = dict[str, tuple[int, ...]]
Tree = dict[str, np.ndarray]


def random_tree(shapes: Shapes, seed: int = 0, scale: float = 1.0) -> Tree:
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


def gradients_of(shapes: Shapes, steps: int) -> Iterator[Tree]:
    """Gradients whose rows, columns and steps differ in size, so that no statistic passes for another."""
    for step in range(steps):
        tree = random_tree(shapes, seed=100 + step, scale=np.exp(np.sin(step)))
        for grad in tree.values():
            for axis, size in enumerate(grad.shape):
                ramp = np.linspace(0.1, 2.0, size, dtype=np.float32)
                grad *= ramp.reshape([-1 if a == axis else 1 for a in range(grad.ndim)])
        yield tree


def train(
    optimizer: optax.GradientTransformation, params: PyTree, gradients: Iterable[PyTree]
) -> tuple[PyTree, PyTree]:
    """Parameters after a jitted step on each gradient, and the optimiser's state."""

    @jax.jit
    def step(params: Params, state: PyTree, grads: Params) -> tuple[Params, PyTree]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params)
    for grads in gradients:
        params, state = step(params, state, jax.tree.map(jnp.asarray, grads))
    return params, state


# ---- Adafactor ----


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        (
            {"learning_rate": 0.01, "beta1": 0.9, "clipping_threshold": 0.5},
            {"lr": 0.01, "relative_step": False, "beta1": 0.9, "clip_threshold": 0.5},
        ),
        (
            {"learning_rate": 0.03, "multiply_by_parameter_scale": False, "decay_rate": 0.6},
            {"lr": 0.03, "relative_step": False, "scale_parameter": False, "decay_rate": -0.6},
        ),
        ({"multiply_by_parameter_scale": False}, {"scale_parameter": False}),
    ],
)
def test_adafactor_agrees_with_hugging_face(ours: dict[str, float], theirs: dict[str, float]) -> None:
    """Theirs factors every matrix however small, hence min_dim_size_to_factor=1."""
    shapes = {"matrix": (12, 20), "tall": (150, 130), "vector": (9,), "scalar": ()}
    params = random_tree(shapes, scale=0.5)
    steps = list(gradients_of(shapes, steps=12))
    trained, _ = train(optimizers.adafactor(min_dim_size_to_factor=1, **ours), params, steps)

    tensors = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in params.items()}
    reference = HuggingFaceAdafactor(tensors.values(), **theirs)
    for grads in steps:
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(grads[name])
        reference.step()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(trained[name], tensor.detach().numpy(), rtol=1e-6, atol=1e-6, err_msg=name)


def naive_adafactor(
    param: np.ndarray,
    gradients: list[np.ndarray],
    rate: float,
    factored: bool,
    weight_decay: float,
    beta1: float,
) -> np.ndarray:
    """The paper's algorithms 4 and 5 in float64 on one matrix, with T5X's weight decay and momentum."""
    param, v, row, col, m = param.astype(np.float64), 0.0, 0.0, 0.0, 0.0
    for t, grad in enumerate(gradients, start=1):
        grad, decay = grad.astype(np.float64), 1 - t**-0.8
        square = grad**2 + 1e-30
        v = decay * v + (1 - decay) * square
        if factored:
            row = decay * row + (1 - decay) * square.mean(1, keepdims=True)
            col = decay * col + (1 - decay) * square.mean(0, keepdims=True)
            v = row * col / row.mean()
        update = grad / np.sqrt(v)
        update /= max(1.0, np.sqrt((update**2).mean()))
        m = beta1 * m + (1 - beta1) * rate * max(1e-3, np.sqrt((param**2).mean())) * update
        param = (1 - weight_decay) * param - m
    return param


@pytest.mark.parametrize("factored", [True, False])
def test_adafactor_agrees_with_the_paper(factored: bool) -> None:
    shape = (128, 200) if factored else (127, 200)  # T5's threshold: both dimensions at least 128
    params = random_tree({"w": shape})
    steps = list(gradients_of({"w": shape}, steps=12))
    optimizer = optimizers.adafactor(learning_rate=0.02, weight_decay_rate=0.01, beta1=0.8)
    trained, state = train(optimizer, params, steps)
    expected = naive_adafactor(params["w"], [g["w"] for g in steps], 0.02, factored, 0.01, 0.8)
    np.testing.assert_allclose(trained["w"], expected, rtol=1e-6, atol=2e-6)
    assert state[0].v["w"].shape == ((1,) if factored else shape)


def test_adafactor_by_hand() -> None:
    # First step: the gradient over its own size is its sign, of RMS 1; the rate is min(0.01, 1/sqrt(1)) times
    # RMS(3, -4) = 3.5355339 here, and times 0.001 where the parameter is 0.
    params = {"w": jnp.array([3.0, -4.0]), "zero": jnp.array([0.0])}
    updates, state = optimizers.adafactor().update(
        {"w": jnp.array([0.1, -20.0]), "zero": jnp.array([5.0])}, optimizers.adafactor().init(params), params
    )
    np.testing.assert_allclose(updates["w"], [-0.035355339, 0.035355339], rtol=1e-6)
    np.testing.assert_allclose(updates["zero"], [-1e-5], rtol=1e-6)
    np.testing.assert_allclose(state[0].v["w"], [0.01, 400.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "matrix_shape"),
    [((144, 4, 36), (144, 144)), ((4, 36, 130), (144, 130)), ((5, 130, 7, 3, 10), (650, 210))],
)
def test_many_dimensional_kernels_are_matrices(shape: tuple[int, ...], matrix_shape: tuple[int, int]) -> None:
    """Moments and steps are those of T5X's two-dimensional query, out and so on."""
    params, steps = random_tree({"w": shape}), list(gradients_of({"w": shape}, steps=4))
    flat = lambda tree: {"w": tree["w"].reshape(matrix_shape)}  # noqa: E731
    trained, state = train(optimizers.adafactor(), params, steps)
    expected, expected_state = train(optimizers.adafactor(), flat(params), map(flat, steps))
    np.testing.assert_allclose(flat(trained)["w"], expected["w"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(state[0].v_row["w"].ravel(), expected_state[0].v_row["w"], rtol=1e-6)
    np.testing.assert_allclose(state[0].v_col["w"].ravel(), expected_state[0].v_col["w"], rtol=1e-6)


def stacked(trees: list[Tree]) -> PyTree:
    """Layer trees as a scanned stack holds them: `layers`, axis 1."""
    return {"encoder": {"layers": jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *trees)}}


def test_scanned_layers_train_as_unscanned_ones() -> None:
    shapes = {"query": (130, 4, 36), "out": (4, 36, 130), "wi": (130, 200), "small": (8, 12), "scale": (130,)}
    optimizer = optimizers.adafactor(beta1=0.9, weight_decay_rate=1e-3)
    layers = [random_tree(shapes, seed=i, scale=10.0**-i) for i in range(3)]
    steps = [  # layers differ a thousandfold, so statistics over the whole stack would show
        [{name: 10.0 ** (i - 1) * np.roll(g, i) for name, g in grads.items()} for i in range(3)]
        for grads in gradients_of(shapes, steps=5)
    ]
    name_layers = lambda trees: {"encoder": {f"layers_{i}": tree for i, tree in enumerate(trees)}}  # noqa: E731
    scanned, _ = train(optimizer, stacked(layers), map(stacked, steps))
    unscanned, _ = train(optimizer, name_layers(layers), map(name_layers, steps))
    for name in shapes:
        for i in range(3):
            theirs = unscanned["encoder"][f"layers_{i}"][name]
            largest = np.abs(theirs).max()
            np.testing.assert_allclose(
                scanned["encoder"]["layers"][name][:, i], theirs, rtol=1e-6, atol=1e-6 * largest, err_msg=name
            )


def test_stack_of_experts_within_a_stack_of_layers() -> None:
    optimizer = optimizers.adafactor(min_dim_size_to_factor=4, stacked_axes={"layers": 1, "experts": 0})
    shape = (2, 3, 6, 5)  # experts, layers, embed, mlp
    whole = lambda array: {"layers": {"experts": {"wi": array}}}  # noqa: E731
    params = random_tree({"w": shape})["w"] * np.logspace(-2, 2, 6).reshape(2, 3, 1, 1).astype(np.float32)
    steps = [grads["w"] for grads in gradients_of({"w": shape}, steps=5)]
    trained, state = train(optimizer, whole(params), map(whole, steps))
    assert state[0].v_row["layers"]["experts"]["wi"].shape == (2, 3, 6)
    assert state[0].v_col["layers"]["experts"]["wi"].shape == (2, 3, 5)
    for at in np.ndindex(2, 3):
        alone, _ = train(optimizer, {"wi": params[at]}, ({"wi": grad[at]} for grad in steps))
        largest = np.abs(alone["wi"]).max()
        ours = trained["layers"]["experts"]["wi"][at]
        np.testing.assert_allclose(ours, alone["wi"], rtol=1e-6, atol=1e-6 * largest)


def test_stack_without_its_axis_is_named() -> None:
    with pytest.raises(
        UserError, match=r"\{'layers': 1, 'expert': 0\}, but parameter encoder/layers/bias has shape \[3\]"
    ):
        optimizers.adafactor().init({"encoder": {"layers": {"bias": jnp.zeros(3)}}})


@pytest.mark.parametrize("optimizer", [optimizers.adafactor(beta1=0.9), optimizers.adamw(1e-2)])
def test_bfloat16_parameters_keep_their_type_and_float32_their_maths(
    optimizer: optax.GradientTransformation,
) -> None:
    shapes = {"w": (130, 140)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_tree(shapes))
    grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), next(gradients_of(shapes, steps=1)))
    trained, state = train(optimizer, params, [grads])
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
    updates, expected_state = optimizer.update(wide(grads), optimizer.init(wide(params)), wide(params))
    assert trained["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(trained["w"], params["w"] + updates["w"].astype(jnp.bfloat16))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, expected_state)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_state_from_shapes_alone_and_through_orbax(tmp_path: Path) -> None:
    params = stacked([random_tree({"wi": (130, 200), "scale": (130,)}, seed=i) for i in range(2)])
    optimizer = optimizers.with_parameter_ema(
        optimizers.partition((("encoder/.*/scale", optimizers.freeze()),), optimizers.adafactor()), 0.9
    )
    _, state = train(optimizer, params, [params, params])
    abstract = jax.eval_shape(optimizer.init, jax.tree.map(jnp.asarray, params))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), state)

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


# ---- AdamW ----


def test_adamw_agrees_with_torch() -> None:
    shapes = {"w": (6, 7), "b": (5,)}
    params, steps = random_tree(shapes), list(gradients_of(shapes, steps=12))
    trained, _ = train(optimizers.adamw(0.01, b1=0.8, b2=0.99, eps=1e-6, weight_decay=0.1), params, steps)
    tensors = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in params.items()}
    reference = torch.optim.AdamW(tensors.values(), lr=0.01, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1)
    for grads in steps:
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(grads[name])
        reference.step()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(trained[name], tensor.detach().numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("optimizer", [optimizers.adafactor(), optimizers.adamw(1e-3)])
def test_parameters_are_asked_for(optimizer: optax.GradientTransformation) -> None:
    state = optimizer.init({"w": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"update\(gradients, state, params\)"):
        optimizer.update({"w": jnp.ones(2)}, state)


# ---- Partition and freezing ----

PARAMS = {
    "encoder": {"layers_0": {"kernel": jnp.ones((2, 2))}, "layers_1": {"kernel": jnp.ones((2, 2))}},
    "logits": {"kernel": jnp.ones((2, 3))},
}


def test_partition_takes_the_first_rule_that_matches_a_whole_name() -> None:
    optimizer = optimizers.partition(
        (("encoder/layers_1/.*", optax.sgd(0.1)), ("encoder/.*", optax.sgd(0.2))),
        default=optax.sgd(0.3),
    )
    trained, _ = train(optimizer, PARAMS, [PARAMS])
    np.testing.assert_allclose(trained["encoder"]["layers_1"]["kernel"], 0.9)
    np.testing.assert_allclose(trained["encoder"]["layers_0"]["kernel"], 0.8)
    np.testing.assert_allclose(trained["logits"]["kernel"], 0.7, rtol=1e-6)


def test_partition_may_leave_its_default_nothing() -> None:
    trained, _ = train(optimizers.partition(((".*", optax.sgd(0.5)),), optimizers.adafactor()), PARAMS, [PARAMS])
    np.testing.assert_array_equal(trained["logits"]["kernel"], np.full((2, 3), 0.5))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            ["encoder"],
            r"'encoder' is the first match of no parameter.*nearest names: .*encoder/layers_0/kernel",
        ),
        (["logit/kernel"], "'logit/kernel' is .*nearest names: logits/kernel"),
        ([".*", "logits/kernel"], "'logits/kernel' is the first match of no parameter.*no earlier rule"),
    ],
)
def test_partition_names_a_rule_without_parameters(rules: list[str], message: str) -> None:
    optimizer = optimizers.partition([(rule, optimizers.freeze()) for rule in rules], optax.sgd(0.1))
    with pytest.raises(UserError, match=message):
        optimizer.init(PARAMS)


def test_partition_names_a_malformed_rule() -> None:
    with pytest.raises(UserError, match=r"'encoder/\(' is not a regular expression"):
        optimizers.partition((("encoder/(", optimizers.freeze()),), optax.sgd(0.1))


def test_frozen_parameters_keep_every_bit_and_cost_no_memory() -> None:
    frozen = jnp.array([-0.0, 0.0, 1e-40, jnp.inf, -3.3])
    params = {"frozen": frozen, "free": jnp.ones((3,))}
    optimizer = optimizers.partition((("frozen", optimizers.freeze()),), optimizers.adamw(0.1))
    grads = {"frozen": jnp.array([1.0, jnp.nan, jnp.inf, 1.0, 1.0]), "free": jnp.ones((3,))}
    trained, state = train(optimizer, params, [grads, grads])
    bits = lambda x: np.asarray(x).view(np.uint32)  # noqa: E731
    np.testing.assert_array_equal(bits(trained["frozen"]), bits(frozen))
    # Under jit XLA would remove a plain + 0.0 too; alone, it would turn -0.0 into 0.0.
    updates, _ = optimizers.freeze().update({"zero": jnp.array(1.0)}, optax.EmptyState())
    assert np.signbit(jnp.array(-0.0) + updates["zero"])
    np.testing.assert_allclose(trained["free"], 0.8, atol=1e-4)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(state)) == [(), (), (), (3,), (3,)]


# ---- Parameter average, learning rate, names ----


def test_parameter_average_by_hand() -> None:
    # Parameter 4 -> 3 -> 2 under steps of -1; average 4 -> 3.75 -> 3.3125 with decay 3/4.
    optimizer = optimizers.with_parameter_ema(optax.sgd(1.0), decay=0.75)
    params = {"w": jnp.array(4.0, jnp.bfloat16)}
    _, state = train(optimizer, params, [{"w": jnp.array(1.0, jnp.bfloat16)}] * 2)
    average = optimizers.ema_params(optax.chain(optax.identity(), optimizer).init(params))
    assert average["w"] == 4.0
    average = optimizers.ema_params(("outer", state))
    assert average["w"] == 3.3125 and average["w"].dtype == jnp.float32


def test_parameter_average_shares_no_buffer_with_the_parameters() -> None:
    params = {"w": jnp.ones(4)}
    optimizer = optimizers.with_parameter_ema(optax.sgd(1.0), decay=0.5)
    state = jax.jit(optimizer.init)(params)
    pointer = lambda x: x.unsafe_buffer_pointer()  # noqa: E731
    assert pointer(state.ema["w"]) != pointer(params["w"])
    assert pointer(optimizer.init(params).ema["w"]) != pointer(params["w"])


def test_no_parameter_average() -> None:
    assert optimizers.ema_params(optimizers.adafactor().init({"w": jnp.ones(4)})) is None
    with pytest.raises(UserError, match=r"with_parameter_ema\.decay is 1\.0"):
        optimizers.with_parameter_ema(optax.sgd(1.0), decay=1.0)


@pytest.mark.parametrize(
    "make",
    [optimizers.adafactor, optimizers.adamw, optax.inject_hyperparams(optax.sgd)],
    ids=["adafactor", "adamw", "injected"],
)
def test_learning_rate_of_the_last_update(
    make: Callable[[schedules.Schedule], optax.GradientTransformation],
) -> None:
    schedule = schedules.rsqrt(base=1.0, warmup_steps=4)  # 1/2 up to step 4, 1/3 at step 9
    frozen = ("logits/.*", optimizers.freeze())
    optimizer = optimizers.chain((optax.clip_by_global_norm(1.0), optimizers.partition((frozen,), make(schedule))))
    assert optimizers.learning_rate_of(optimizer.init(PARAMS)) == 0.5
    _, state = train(optimizer, PARAMS, [PARAMS] * 10)
    np.testing.assert_allclose(optimizers.learning_rate_of(state), 1 / 3, rtol=1e-6)


def test_no_learning_rate() -> None:
    assert optimizers.learning_rate_of(optax.sgd(0.1).init(PARAMS)) is None


def test_names() -> None:
    names = [name for name, _ in named_leaves(PARAMS)]
    assert names == ["encoder/layers_0/kernel", "encoder/layers_1/kernel", "logits/kernel"]
    state = optax.EmaState(jnp.zeros(()), {"a": [jnp.ones(()), jnp.ones(())]})
    assert [name for name, _ in named_leaves(state)] == ["count", "ema/a/0", "ema/a/1"]


# ---- From gin ----


def test_gin_writes_the_module_docstring_s_example() -> None:
    example = textwrap.dedent(optimizers.__doc__.split("embedding:\n")[1])
    imports = """
from __gin__ import dynamic_registration
import optax
from t5x_like.training import optimizers
from t5x_like.training import schedules
"""
    try:
        gin.parse_config(imports + example.replace("Trainer.optimizer = @optimizers.partition()", ""))
        optimizer = gin.get_configurable("optimizers.partition")()
    finally:
        gin.clear_config()
    params = {"token_embedder": {"embedding": jnp.ones(2)}, "kernel": jnp.array([6.0, 8.0])}
    trained, state = train(optimizer, params, [params])
    np.testing.assert_array_equal(trained["token_embedder"]["embedding"], [1.0, 1.0])
    # The default's own gradient norm is 10: clipped to (0.6, 0.8), then a step 0.01 * RMS(6, 8) against it.
    np.testing.assert_allclose(trained["kernel"], [5.9292893, 7.9292893], rtol=1e-6)
    second_moment = state.inner_states["default"].inner_state[1][0].v["kernel"]
    np.testing.assert_allclose(second_moment, [0.36, 0.64], rtol=1e-6)
