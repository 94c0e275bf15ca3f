"""What XLA makes of our programs for TPUs that are not there: needs PyPI's libtpu (the extra `tpu`), which CI lacks."""

import os
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from t5x_like.architectures.variables import logical_axes, unbox
from t5x_like.layers.moe import Experts, SparseMlp
from t5x_like.layers.routing import CapacityFactor, Router, Tokens
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
