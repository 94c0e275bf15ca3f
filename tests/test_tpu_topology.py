"""What XLA makes of our programs for TPUs that are not there: needs PyPI's libtpu (the extra `tpu`), which CI lacks."""

import functools
import importlib
import os
import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from t5x_like.architectures.variables import logical_axes, unbox
from t5x_like.layers.moe import Experts, SparseMlp
from t5x_like.layers.routing import CapacityFactor, Router, Tokens
from t5x_like.planning.choice import Choice
from t5x_like.planning.compiled import Cost
from t5x_like.planning.plan import Plan, measure
from t5x_like.recipe import Recipe
from t5x_like.sharding import Partitioner, make_mesh

pytest.importorskip("libtpu", reason="compiling for a TPU topology needs PyPI's libtpu: pip install 't5x_like[tpu]'")


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2"])
def test_a_sparse_layer_moves_tokens_by_two_all_to_alls_each_way(topology: str) -> None:
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    partitioner = Partitioner(make_mesh(data=1, expert=8, devices=devices))
    layer = SparseMlp(Experts(8, 2048, dtype="bfloat16"), Router(), CapacityFactor())
    x = jax.ShapeDtypeStruct((16, 512, 512), jnp.bfloat16)
    tokens = Tokens(jax.ShapeDtypeStruct((16, 512), jnp.int32), jax.ShapeDtypeStruct((16, 512), bool))
    variables = jax.eval_shape(layer.init, jax.random.key(0), x, tokens)["params"]

    def loss(params: dict, x: jax.Array, tokens: Tokens) -> jax.Array:
        y, reported = layer.apply({"params": params}, x, tokens, mutable=["router"])
        return (y.astype(jnp.float32) ** 2).sum() + reported["router"]["report"].loss

    shardings, batch = partitioner.tree_shardings(logical_axes(variables)), partitioner.sharding("batch")
    with partitioner.active():
        step = jax.jit(
            jax.value_and_grad(loss, (0, 1)),
            in_shardings=(shardings, batch, batch),
            out_shardings=(None, (shardings, batch)),
        )
        compiled = step.lower(unbox(variables), x, tokens).compile()
    collectives = (
        r" (all-to-all|all-gather|all-reduce|collective-permute|reduce-scatter|ragged-all-to-all)(?:-start)?\("
    )
    assert Counter(re.findall(collectives, compiled.as_text())) == {"all-to-all": 4, "all-reduce": 1}


@functools.cache
def planned(size: str, batch: int, topology: str, mesh: tuple[int, ...], remat: str) -> tuple[Plan, Cost]:
    """T5 1.1 on lengths 512 and 114: bfloat16 activations, float32 parameters, Adafactor, scanned layers, FSDP."""
    files = [f"models/t5_1_1_{size}.gin", "runs/pretrain.gin"]
    recipe = Recipe(files, ["SCAN_LAYERS=True", "DTYPE=bfloat16", f"BATCH_SIZE={batch}"])
    plan = measure(recipe, topology, Choice(mesh, remat))
    assert plan.train is not None, plan.compile_error
    return plan, plan.train


@pytest.mark.full
@pytest.mark.parametrize(
    ("size", "batch", "topology", "mesh", "remat", "t5x_gib"),
    [
        ("base", 128, "v5p:2x2x2", (1, 8, 1, 1), "minimal", 4.30),
        ("xl", 512, "v5e:8x8", (1, 16, 1, 4), "full", 6.95),
        ("xxl", 512, "v5p:4x4x4", (1, 16, 1, 4), "full", 12.3),
        ("xxl", 512, "v5p:4x4x4", (1, 16, 1, 4), "minimal", 89.8),
    ],
)
def test_no_chip_needs_as_much_as_under_t5x(
    size: str, batch: int, topology: str, mesh: tuple[int, ...], remat: str, t5x_gib: float
) -> None:
    """T5X's figures: its scalable_t5 network on the same work, by the same compiler (docs/plan.md)."""
    _, train = planned(size, batch, topology, mesh, remat)
    assert train.fits
    assert train.peak_memory_gib <= t5x_gib


@pytest.mark.full
def test_a_policy_between_full_and_minimal_fits_and_recomputes_little() -> None:
    recomputed = {}
    for remat in ("full", "save_projections"):
        plan, train = planned("xxl", 512, "v5p:4x4x4", (1, 16, 1, 4), remat)
        recomputed[remat] = train.flops_per_chip - plan.model_flops / plan.devices
        assert train.peak_memory_gib <= 60
    assert 0 < recomputed["save_projections"] <= recomputed["full"] / 3


@pytest.mark.full
def test_with_more_chips_and_as_many_more_examples_each_takes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As theory says of FLOPs and memory, and of what is sent, but for the factor (n - 1) / n of a ring."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "scripts")
    growth = importlib.import_module("benchmarks.growth")
    few = {chips: name for chips, name in growth.TOPOLOGIES.items() if chips <= 32}
    for way in growth.chips("bfloat16", 1, topologies=few)["ways"]:
        assert max(way["most_over_least"].values()) <= growth.FLAT, way
