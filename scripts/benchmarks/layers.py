"""One layer by itself, beside its rivals: the sparse layer, and attention in linear memory."""

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.stages import Compiled

from t5x_like.architectures.variables import router_reports, unbox
from t5x_like.layers.attention import Attend, DotProduct
from t5x_like.layers.chunked_attention import Chunked
from t5x_like.layers.masks import Mask, within
from t5x_like.layers.mlp import MlpBlock
from t5x_like.layers.moe import REPORTS, Experts, SparseMlp
from t5x_like.layers.positions import BucketBias
from t5x_like.layers.products import product
from t5x_like.layers.routing import CapacityFactor, Router, TokenChoices, Tokens
from t5x_like.layers.sparse_attention import SlidingWindow
from t5x_like.training.flops import matmul_peak
from t5x_like.typing import PyTree

Program = tuple[Compiled, tuple[PyTree, ...]]
"""A compiled function and its arguments."""


def medians_in_turns(programs: Mapping[str, Program], steps: int) -> dict[str, float]:
    """The median seconds of each of several programs, which take turns, so that a noisy machine is so for all."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(steps + 1):  # the first turn warms up
        for name, (run, arguments) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


# The sparse layer is measured at 8 sequences of 512 tokens, width 512 and 2,048, beside the dense layer it replaces.
LAYER_BATCH, LAYER_LENGTH, EMBED_DIM, MLP_DIM = 8, 512, 512, 2048


def layer_gradient(layer: nn.Module, dtype: str) -> Program:
    """Value and gradient (of parameters and input) of one feed-forward layer, compiled; and its arguments."""
    shape = (LAYER_BATCH, LAYER_LENGTH, EMBED_DIM)
    x, target = (jax.random.normal(jax.random.key(seed), shape, dtype) for seed in (0, 1))
    tokens = Tokens(jnp.ones(shape[:2], jnp.int32), jnp.ones(shape[:2], bool))
    params = unbox(jax.jit(layer.init)(jax.random.key(2), x, tokens)["params"])

    def loss(params: PyTree, x: jax.Array) -> jax.Array:
        y, variables = layer.apply({"params": params}, x, tokens, mutable=[REPORTS])
        auxiliary = sum(report.loss / report.tokens for report in router_reports(variables, params).values())
        return jnp.vdot(y, target).astype(jnp.float32) + auxiliary

    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(params, x).compile(), (params, x)


def switch(experts: int, factor: float, dtype: str, minimum: int = 4) -> SparseMlp:
    """A Switch layer of `experts` experts, routing within each sequence."""
    return SparseMlp(Experts(experts, MLP_DIM, dtype=dtype), Router(), CapacityFactor(factor, factor, minimum))


class OneHotSwitch(SparseMlp):
    """The dispatch that this library does not use: tokens times a one-hot [S, E, C], as in Flaxformer."""

    def _within_capacity(self, x: jax.Array, choices: TokenChoices, capacity: int) -> tuple[jax.Array, ...]:
        slots = choices.slots(self.expert.num_experts, capacity)
        places = jax.nn.one_hot(slots.slot[:, 0], self.expert.num_experts * capacity, dtype=x.dtype)
        places = places.reshape(*places.shape[:2], -1, capacity)
        sent = jnp.einsum("gsec,gsm->egcm", places, x)

        def multiply(rows: jax.Array, kernel: jax.Array) -> jax.Array:
            return product("egci,eio->egco", rows, kernel).astype(rows.dtype)

        y = self.expert(sent, multiply, (None, None, None, None))
        returned = jnp.einsum("gsec,egcm->gsm", places * slots.gates[:, 0, :, None, None].astype(x.dtype), y)
        return returned, slots.kept, slots.dropped


class FlaxDense(nn.Module):
    """`MlpBlock` as plain Flax code has it: its products are over [batch, length] instead of one long batch."""

    mlp_dim: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, tokens: Tokens) -> jax.Array:
        """Maps every position by itself, as `MlpBlock` with relu does."""
        hidden = nn.relu(nn.Dense(self.mlp_dim, use_bias=False, dtype=self.dtype, name="wi")(x))
        return nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name="wo")(hidden)


def switch_layer(dtype: str, steps: int, experts: int) -> dict[str, object]:
    """Seconds of a Switch layer (top-1, capacity factor 1.25) and of its rivals, in turns.

    They are the dense layer, ours and plain Flax, and one-hot dispatch. `ratio_flax_dense` is sparse over Flax's dense
    layer; the other ratios are over ours.
    """
    layers: dict[str, nn.Module] = {
        "sparse": switch(experts, 1.25, dtype),
        "dense": MlpBlock(MLP_DIM, dtype=dtype),
        "flax_dense": FlaxDense(MLP_DIM, dtype),
        "one_hot": OneHotSwitch(Experts(experts, MLP_DIM, dtype=dtype), Router(), CapacityFactor(1.25, 1.25)),
    }
    medians = medians_in_turns({name: layer_gradient(layer, dtype) for name, layer in layers.items()}, steps)
    return {
        "experts": experts,
        **{f"seconds_{name}": round(value, 4) for name, value in medians.items()},
        "ratio": round(medians["sparse"] / medians["dense"], 3),
        "ratio_flax_dense": round(medians["sparse"] / medians["flax_dense"], 3),
        "ratio_one_hot": round(medians["one_hot"] / medians["dense"], 3),
        "matmul_peak_gflops": round(matmul_peak(dtype) / 1e9, 1),
    }


def switch_flops(dtype: str, steps: int, experts: int) -> dict[str, object]:
    """FLOPs that the compiler counts in a Switch layer at capacity factor 1, forward and backward; and by hand."""
    compiled, _ = layer_gradient(switch(experts, 1.0, dtype, minimum=1), dtype)
    slots = LAYER_BATCH * experts * math.ceil(LAYER_LENGTH / experts)
    router = LAYER_BATCH * LAYER_LENGTH * EMBED_DIM * experts
    arithmetic = 3 * 2 * (2 * slots * EMBED_DIM * MLP_DIM + router)
    counted = compiled.cost_analysis()["flops"]
    return {
        "experts": experts,
        "flops_counted": counted,
        "flops_arithmetic": arithmetic,
        "ratio": round(counted / arithmetic, 4),
    }


# Attention is measured as one layer of T5 small has it: one sequence, 8 heads of 64, 32 buckets.
HEADS, HEAD_DIM, BUCKETS, MAX_DISTANCE = 8, 64, 32, 128
RADIUS, LONGEST_PLAIN = 256, 8192


def attention_gradient(attend: Attend, dtype: str, length: int, mask: Mask | None, biased: bool) -> Program:
    """Value and gradient (of query, key, value and the bias table), compiled; and its arguments."""
    keys = jax.random.split(jax.random.key(0), 5)
    shape, positions = (1, length, HEADS, HEAD_DIM), jnp.arange(length)
    query, key, value, target = (jax.random.normal(key, shape, dtype) for key in keys[:4])
    table = jax.random.normal(keys[4], (HEADS, BUCKETS))

    def loss(query: jax.Array, key: jax.Array, value: jax.Array, table: jax.Array) -> jax.Array:
        bias = BucketBias(table, positions, positions, True, BUCKETS, MAX_DISTANCE) if biased else None
        return jnp.vdot(attend(query, key, value, bias, mask), target).astype(jnp.float32)

    arguments = query * HEAD_DIM**-0.5, key, value, table
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3))).lower(*arguments).compile(), arguments


def attention(dtype: str, steps: int, length: int, sliding: bool = False) -> dict[str, object]:
    """Seconds and temporary memory of attention in linear memory and of the plain form, unless that is too long.

    Chunked, with T5's bias; or `sliding`: a causal window of 256 without a bias.
    """
    mask = within(length, causal=True) if sliding else None
    forms: dict[str, tuple[Attend, Mask | None]] = {"linear": (SlidingWindow(RADIUS) if sliding else Chunked(), mask)}
    if length <= LONGEST_PLAIN:
        plain_mask = None if mask is None else dataclasses.replace(mask, radius=RADIUS)
        forms["plain"] = (DotProduct(), plain_mask)
    programs = {
        name: attention_gradient(form, dtype, length, seen, not sliding) for name, (form, seen) in forms.items()
    }
    medians = medians_in_turns(programs, steps)
    memory = {name: run.memory_analysis().temp_size_in_bytes / 2**20 for name, (run, _) in programs.items()}
    result: dict[str, object] = {"length": length}
    result |= {f"seconds_{name}": round(value, 4) for name, value in medians.items()}
    result |= {f"temporary_mib_{name}": round(value, 1) for name, value in memory.items()}
    if "plain" in forms:
        result["ratio"] = round(medians["linear"] / medians["plain"], 3)
        result["ratio_memory"] = round(memory["linear"] / memory["plain"], 4)
    return result | {"matmul_peak_gflops": round(matmul_peak(dtype) / 1e9, 1)}
