"""T5, Switch and GPT on meshes of 8 virtual devices: losses and gradients of one device, in float32 to 1e-5."""

import functools

import jax
import numpy as np
import pytest

from t5x_like import gin_config
from t5x_like.architectures.variables import named_leaves
from t5x_like.models.contract import Model
from t5x_like.planning import hlo
from t5x_like.sharding import Partitioner, ShardingRules, fsdp_rules, make_mesh
from t5x_like.training import train_state
from t5x_like.training.optimizers import adamw
from t5x_like.typing import Batch, Params

BINDINGS = {
    "t5_1_1_tiny": ("NUM_ENCODER_LAYERS=1", "NUM_DECODER_LAYERS=2", "REMAT='save_projections'"),
    "switch_tiny": (
        "NUM_ENCODER_BLOCKS=1",
        "NUM_DECODER_BLOCKS=1",
        "NUM_EXPERTS=4",
        "TRAIN_EXPERT_CAPACITY_FACTOR=1.0",
    ),
    "gpt2_tiny": ("NUM_LAYERS=2", "MAX_LENGTH=32"),
}
BERT = (
    *("NUM_LAYERS=2", "MAX_LENGTH=32", "features.MaskedLMFeatures.next_sentence=False"),
    "heads.MaskedLanguageModelHead.next_sentence=None",
)
SIZES = ("EMBED_DIM=16", "NUM_HEADS=4", "HEAD_DIM=4", "MLP_DIM=32", "VOCAB_SIZE=64", "SCAN_LAYERS=True")
CONTEXT = ShardingRules(batch=("replica", "expert"), embed="data", length=("data", "model"))
GRID = {
    "data 8": ({"data": 8}, ShardingRules()),
    "data 8, FSDP": ({"data": 8}, fsdp_rules()),
    "data 2 x model 4, FSDP": ({"data": 2, "model": 4}, fsdp_rules()),
    "data 4 x model 2": ({"data": 4, "model": 2}, ShardingRules(length=None)),
    "replica 2 x data 2 x model 2, FSDP": ({"replica": 2, "data": 2, "model": 2}, fsdp_rules()),
    "data 2 x expert 4, FSDP": ({"data": 2, "expert": 4}, fsdp_rules()),
    "data 2 x expert 2 x model 2, FSDP": ({"data": 2, "expert": 2, "model": 2}, fsdp_rules()),
    "context 4 x model 2": ({"data": 4, "model": 2}, CONTEXT),
    "expert 2 x context 4": ({"expert": 2, "data": 4}, CONTEXT),
}


@functools.cache
def model_and_batch(name: str, dtype: str = "float32") -> tuple[Model, Batch]:
    """Packed rows with padding; lengths 16 and 8, so that every mesh of the grid divides them."""
    bindings = ["MODEL_DIR=none", f"DTYPE={dtype}", "DROPOUT_RATE=0.0", *SIZES, *BINDINGS.get(name, BERT)]
    config = gin_config.load("t5x_like.commands.train.train", [f"models/{name}.gin", "runs/pretrain.gin"], bindings)
    model = gin_config.run(config, instead=lambda model: model)
    rng = np.random.default_rng(0)
    lengths = {"inputs": 16, "targets": 8}

    def example() -> dict[str, np.ndarray]:
        return {feature: rng.integers(2, 64, rng.integers(2, size // 2 + 1)) for feature, size in lengths.items()}

    if name == "bert_tiny":
        masked = {"targets": np.arange(2, 8), "target_positions": np.arange(6)}
        return model, model.converter.convert([[masked | {"inputs": np.arange(2, 18)}]] * 8, lengths, packed=False)
    return model, model.converter.convert([[example(), example()] for _ in range(8)], lengths, packed=True)


def loss_and_gradients(name: str, partitioner: Partitioner, dtype: str = "float32") -> tuple[dict, Params, float]:
    """And the floating point operations of a device."""
    model, batch = model_and_batch(name, dtype)
    shardings = train_state.state_shardings(model, adamw(1e-3), batch, partitioner)

    def total(params: Params) -> tuple[jax.Array, dict]:
        sums = model.loss(params, batch)
        return sums.loss.total, {"loss": sums.loss.mean(), **{n: m.mean() for n, m in sums.metrics.items()}}

    with partitioner.active():
        placed = jax.device_put(parameters(name), shardings.params)
        program = jax.jit(jax.grad(total, has_aux=True), in_shardings=(shardings.params,)).lower(placed).compile()
        gradients, losses = program(placed)
    return losses, gradients, hlo.flops(hlo.parse(program.as_text()))


@functools.cache
def parameters(name: str) -> Params:
    """Not fresh ones, whose norms have scales of 1 and whose biases are 0."""
    model, batch = model_and_batch(name)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), shapes)


@functools.cache
def expected(name: str) -> tuple[dict, Params, float]:
    return loss_and_gradients(name, Partitioner.single_device())


SOON = {
    "t5_1_1_tiny": (
        "data 8, FSDP",
        "data 2 x model 4, FSDP",
        "replica 2 x data 2 x model 2, FSDP",
        "context 4 x model 2",
    ),
    "switch_tiny": ("data 4 x model 2", "data 2 x expert 4, FSDP", "data 2 x expert 2 x model 2, FSDP"),
    "gpt2_tiny": ("context 4 x model 2", "expert 2 x context 4"),
}
"""What every run of the tests tries; the others are long drills."""


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(name, mesh, marks=[] if mesh in SOON[name] else [pytest.mark.full])
        for name in BINDINGS
        for mesh in GRID
    ],
)
def test_a_mesh_gives_the_losses_and_gradients_of_one_device(name: str, mesh: str) -> None:
    """Every device does its share, and hardly more: lengths that do not divide are padded, routers are everywhere."""
    sizes, rules = GRID[mesh]
    losses, gradients, flops = loss_and_gradients(name, Partitioner(make_mesh(**sizes), rules))
    wanted_losses, wanted, all_flops = expected(name)
    assert all_flops / 8 * 0.999 <= flops <= all_flops / 8 * 1.03
    for metric, value in wanted_losses.items():
        np.testing.assert_allclose(losses[metric], value, rtol=1e-5, atol=1e-5, err_msg=metric)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    for (path, found), (_, leaf) in zip(named_leaves(gradients), named_leaves(wanted), strict=True):
        # A key's bias shifts all logits of a query alike: its gradient is rounding.
        scale = largest if path.endswith("key/bias") else np.abs(leaf).max()
        assert scale > 0, path
        np.testing.assert_allclose(found / scale, leaf / scale, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("name", ["gpt2_tiny", "bert_tiny"])
def test_biases_and_segments_are_split_in_bfloat16_too(name: str) -> None:
    """Sums over devices are rounded once more there: no more than that may differ."""
    partitioner = Partitioner(make_mesh(data=2, model=4), fsdp_rules())
    losses, gradients, _ = loss_and_gradients(name, partitioner, "bfloat16")
    wanted_losses, wanted, _ = loss_and_gradients(name, Partitioner.single_device(), "bfloat16")
    np.testing.assert_allclose(losses["loss"], wanted_losses["loss"], rtol=0.01)
    gap, length = (
        sum(float(np.square(leaf, dtype=np.float64).sum()) for leaf in jax.tree.leaves(tree)) ** 0.5
        for tree in (jax.tree.map(np.subtract, gradients, wanted), wanted)
    )
    assert gap < 0.05 * length
