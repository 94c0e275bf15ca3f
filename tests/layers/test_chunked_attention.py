import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental.pallas import tpu as pltpu

from t5x_like.layers.attention import Attend, DotProduct
from t5x_like.layers.chunked_attention import Chunked
from t5x_like.layers.fused_attention import Fused, gpu_kernel, tpu_kernel
from t5x_like.layers.masks import Mask, within
from t5x_like.layers.positions import BucketBias, relative_position_bucket
from t5x_like.sharding import Partitioner, make_mesh

HEADS, HEAD_DIM, BUCKETS, MAX_DISTANCE = 3, 16, 8, 12
Arrays = dict[str, np.ndarray]


def draw(seed: int, q_len: int, k_len: int, heads: int = HEADS) -> Arrays:
    rng = np.random.default_rng(seed)
    shapes = {
        "query": (2, q_len, heads, HEAD_DIM),
        "key": (2, k_len, heads, HEAD_DIM),
        "value": (2, k_len, heads, HEAD_DIM),
        "table": (heads, BUCKETS),
        "array": (1, heads, q_len, k_len),
        "target": (2, q_len, heads, HEAD_DIM),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def bucket_bias(table: jax.Array, q_len: int, k_len: int) -> BucketBias:
    return BucketBias(table, jnp.arange(q_len), jnp.arange(k_len), True, BUCKETS, MAX_DISTANCE)


def buckets(q_len: int, k_len: int) -> np.ndarray:
    distance = np.arange(k_len)[None] - np.arange(q_len)[:, None]
    return np.asarray(relative_position_bucket(jnp.asarray(distance), True, BUCKETS, MAX_DISTANCE))


def in_torch(arrays: Arrays, bias: str | None, allowed: np.ndarray | None) -> Arrays:
    """Mixed values and all gradients in float64; a masked logit is -1e10."""
    tensors = {name: torch.tensor(x, dtype=torch.float64, requires_grad=True) for name, x in arrays.items()}
    logits = torch.einsum("bqhd,bkhd->bhqk", tensors["query"], tensors["key"])
    if bias == "array":
        logits = logits + tensors["array"]
    if bias == "table":
        logits = logits + tensors["table"][:, torch.tensor(buckets(*logits.shape[2:]))]
    if allowed is not None:
        logits = torch.where(torch.tensor(allowed), logits, -1e10)
    mixed = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), tensors["value"])
    (mixed * tensors["target"]).sum().backward()
    gradients = {name: x.grad.numpy() for name, x in tensors.items() if x.grad is not None and name != "target"}
    return {"mixed": mixed.detach().numpy()} | gradients


def in_jax(attend: Callable[..., jax.Array], arrays: Arrays, bias: str | None, mask: Mask | None) -> Arrays:
    """The same of `attend`."""

    def loss(x: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q_len, k_len = x["query"].shape[1], x["key"].shape[1]
        known = {None: None, "array": x["array"], "table": bucket_bias(x["table"], q_len, k_len)}
        mixed = attend(x["query"], x["key"], x["value"], known[bias], mask)
        return (mixed.astype(jnp.float32) * arrays["target"]).sum(), mixed

    x = {name: jnp.asarray(x) for name, x in arrays.items() if name != "target"}
    (_, mixed), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
    return {"mixed": mixed} | gradients


def assert_equal(actual: Arrays, expected: Arrays, error: float = 3e-6) -> None:
    """Up to `error` of an array's largest number."""
    for name, wanted in expected.items():
        atol = error * np.abs(wanted).max()
        np.testing.assert_allclose(np.asarray(actual[name], np.float64), wanted, rtol=0, atol=atol, err_msg=name)


def mixed_values(attend: Attend, arrays: Arrays, bias: BucketBias | None, mask: Mask | None) -> np.ndarray:
    return np.asarray(jax.jit(attend)(arrays["query"], arrays["key"], arrays["value"], bias, mask))


def segments(length: int) -> jax.Array:
    """A row of two documents and padding, and a row of padding around one."""
    first = [1] * 3 + [2] * (length - 5) + [0] * 2
    second = [0] * 2 + [1] * (length - 3) + [0]
    return jnp.asarray([first, second])


MASKS: dict[str, Callable[[int, int], Mask | None]] = {
    "none": lambda q, k: None,
    "causal": lambda q, k: Mask(jnp.arange(q), jnp.arange(k), causal=True),
    "segments": lambda q, k: Mask(jnp.arange(q), jnp.arange(k), segments(q), segments(k)),
    "causal segments": lambda q, k: Mask(jnp.arange(q), jnp.arange(k), segments(q), segments(k), causal=True),
    "padding": lambda q, k: Mask(jnp.arange(q), jnp.arange(k), key_segments=segments(k)),
    "window": lambda q, k: Mask(jnp.arange(q), jnp.arange(k), radius=3),
    "prefix": lambda q, k: Mask(jnp.arange(q), jnp.arange(k), seen_by_all=segments(k) == 1, causal=True),
    "ahead": lambda q, k: Mask(jnp.arange(q), jnp.arange(k) + 5, causal=True),  # the first five see nothing
}


@pytest.mark.parametrize(
    ("kind", "bias", "q_len", "k_len", "chunked"),
    [
        ("none", "array", 13, 13, Chunked(5, 4)),
        ("none", "table", 7, 19, Chunked(3, 5)),
        ("causal", "table", 16, 16, Chunked(4, 8)),
        ("segments", None, 7, 19, Chunked()),
        ("causal segments", "table", 13, 13, Chunked(5, 4)),
        ("padding", "table", 19, 7, Chunked(7, 3)),
        ("window", "array", 16, 16, Chunked(4, 2)),
        ("prefix", "table", 13, 13, Chunked(5, 4)),
        ("ahead", None, 16, 13, Chunked(4, 8)),
    ],
)
def test_values_and_gradients(kind: str, bias: str | None, q_len: int, k_len: int, chunked: Chunked) -> None:
    arrays, mask = draw(0, q_len, k_len), MASKS[kind](q_len, k_len)
    allowed = None if mask is None else np.asarray(mask.allowed())
    assert_equal(in_jax(chunked, arrays, bias, mask), in_torch(arrays, bias, allowed))


def test_large_logits_overflow_nothing() -> None:
    arrays = draw(1, 12, 12)
    arrays["query"] *= 70
    arrays["key"][:, 8:] *= 10
    logits = np.einsum("bqhd,bkhd->bhqk", arrays["query"], arrays["key"])
    assert logits.max() > 1000 and logits.min() < -1000
    # The logits' own float32 error, some 1e-4 of a thousand, is that of the weights.
    expected = in_torch(arrays, None, None)["mixed"]
    np.testing.assert_allclose(mixed_values(Chunked(4, 4), arrays, None, None), expected, rtol=0, atol=2e-3)


def test_bfloat16() -> None:
    arrays, mask = draw(2, 16, 16), MASKS["causal segments"](16, 16)
    rounded = {name: jnp.asarray(x, jnp.bfloat16) for name, x in arrays.items() if name in ("query", "key", "value")}
    exact = arrays | {name: np.asarray(x, np.float32) for name, x in rounded.items()}
    actual = in_jax(Chunked(4, 8), arrays | rounded, "table", mask)
    assert {name: str(actual[name].dtype) for name in ("mixed", "query", "key", "value", "table")} == {
        **dict.fromkeys(("mixed", "query", "key", "value"), "bfloat16"),
        "table": "float32",
    }
    # Weights and results are rounded to 8 bits.
    assert_equal(actual, in_torch(exact, "table", np.asarray(mask.allowed())), error=2**-7)


def test_hidden_blocks_are_not_computed() -> None:
    arrays = draw(3, 12, 12)
    for name in ("key", "value"):
        arrays[name][:, 8:] = np.nan
    mixed = mixed_values(Chunked(4, 4), arrays, bucket_bias(arrays["table"], 12, 12), within(12, causal=True))
    assert np.isfinite(mixed[:, :8]).all() and np.isnan(mixed[:, 8:]).all()


def test_positions_that_have_no_diagonals_are_noticed() -> None:
    arrays, positions = draw(4, 6, 6), jnp.asarray([0, 1, 2, 0, 1, 2])
    bias = BucketBias(arrays["table"], positions, positions, True, BUCKETS, MAX_DISTANCE)
    assert np.isnan(mixed_values(Chunked(4, 4), arrays, bias, None)).all()


class Layers(nn.Module):
    """Two scanned, rematerialised layers of nothing but attention; bias and mask are the same for both."""

    attend: Attend

    @nn.compact
    def __call__(self, x: jax.Array, table: jax.Array) -> jax.Array:
        def layer(module: nn.Module, x: jax.Array, bias: BucketBias, mask: Mask) -> tuple[jax.Array, None]:
            return x + self.attend(x * HEAD_DIM**-0.5, x, x, bias, mask), None

        stack = nn.scan(nn.remat(layer), length=2, in_axes=(nn.broadcast, nn.broadcast))
        length = x.shape[1]
        return stack(self, x, bucket_bias(table, length, length), within(length, segments(length), causal=True))[0]


def test_under_scan_and_remat() -> None:
    arrays = draw(5, 16, 16)

    def gradients(attend: Attend) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def loss(x: jax.Array, table: jax.Array) -> jax.Array:
            return (Layers(attend).apply({}, x, table) * arrays["target"]).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(arrays["value"], arrays["table"])

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        gradients(Chunked(4, 4)),
        gradients(DotProduct()),
    )


def gradient_of(attend: Attend, length: int, mask: Callable[[], Mask | None] = lambda: None) -> Callable[..., Any]:
    def loss(query: jax.Array, key: jax.Array, value: jax.Array, table: jax.Array) -> jax.Array:
        bias = BucketBias(table, jnp.arange(length), jnp.arange(length), True, 32, 128)
        return (attend(query, key, value, bias, mask()).astype(jnp.float32) ** 2).sum()

    return jax.value_and_grad(loss, (0, 1, 2, 3))


def test_twice_as_long_in_a_fraction_of_the_memory() -> None:
    def temporary(attend: Attend, length: int) -> int:
        x, table = jax.ShapeDtypeStruct((1, length, 8, 64), "float32"), jax.ShapeDtypeStruct((8, 32), "float32")
        compiled = jax.jit(gradient_of(attend, length)).lower(x, x, x, table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(Chunked(), 16384) <= temporary(DotProduct(), 8192) / 32


def test_a_mesh_gathers_nothing() -> None:
    length, chunked = 32, Chunked(8, 8)
    rng = np.random.default_rng(6)
    x = [jnp.asarray(rng.normal(size=(4, length, 4, 8)), jnp.float32) for _ in range(3)]
    table = jnp.asarray(rng.normal(size=(4, 32)), jnp.float32)
    ids = jnp.asarray([[1] * 20 + [2] * 10 + [0] * 2] * 4)
    gradient = gradient_of(chunked, length, lambda: within(length, ids, causal=True))
    expected = jax.jit(gradient)(*x, table)
    partitioner = Partitioner(make_mesh(data=2, model=4))
    split, heads = partitioner.sharding("batch", "length", "heads"), partitioner.sharding("heads")
    with partitioner.active():
        compiled = (
            jax.jit(gradient, in_shardings=(split, split, split, heads), out_shardings=(None, (split,) * 3 + (heads,)))
            .lower(*x, table)
            .compile()
        )
    text = compiled.as_text()
    assert re.findall(r" (all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text) == []
    # Sums over the mesh, of the loss and of the table's gradient, and none inside a loop over blocks.
    sums = re.findall(r"all-reduce(?:-start)?\(.*op_name=\"([^\"]*)\"", text)
    assert sums and not any("while" in name for name in sums)
    actual = compiled(*(jax.device_put(a, split) for a in x), jax.device_put(table, heads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected)


def with_kernel(platform: str, arrays: Arrays, mask: Mask | None) -> Arrays:
    """The kernel as Pallas interprets it on a CPU."""
    if platform == "gpu":
        return in_jax(lambda q, k, v, bias, mask: gpu_kernel(q, k, v, mask, interpret=True), arrays, None, mask)
    with pltpu.force_tpu_interpret_mode():
        return in_jax(lambda q, k, v, bias, mask: tpu_kernel(q, k, v, mask), arrays, None, mask)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_kernels_of_a_sequence_that_looks_at_itself(platform: str) -> None:
    arrays, mask = draw(7, 256, 256, heads=1), within(256, segments(256), causal=True)
    assert_equal(with_kernel(platform, arrays, mask), in_torch(arrays, None, np.asarray(mask.allowed())))


def test_tpu_kernel_from_one_sequence_to_another() -> None:
    arrays, mask = draw(8, 128, 256, heads=1), Mask(jnp.arange(128), jnp.arange(256), key_segments=segments(256))
    assert_equal(with_kernel("tpu", arrays, mask), in_torch(arrays, None, np.asarray(mask.allowed())))


def test_fused_falls_back_on_a_cpu() -> None:
    arrays, mask = draw(9, 128, 128), within(128, segments(128), causal=True)
    actual = in_jax(Fused(Chunked(32, 64)), arrays, None, mask)
    assert_equal(actual, in_torch(arrays, None, np.asarray(mask.allowed())))


Tpus = Callable[[str], Sequence[jax.Device]]


@pytest.fixture
def tpus() -> Iterator[Tpus]:
    """From the name of a topology to its devices."""
    pytest.importorskip(
        "libtpu", reason="compiling for a TPU topology needs PyPI's libtpu: pip install 't5x_like[tpu]'"
    )
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    from jax.experimental import topologies

    # What is compiled for devices that are not there cannot be read back from the cache: keep it out.
    name, seconds = "jax_persistent_cache_min_compile_time_secs", jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update(name, 1e6)
    yield lambda topology: topologies.get_topology_desc(topology, platform="tpu").devices
    jax.config.update(name, seconds)


MOVED = Mask(jnp.arange(256), jnp.arange(256) + 1, causal=True)


@pytest.mark.parametrize(
    ("calls", "q_len", "head_dim", "bias", "mask"),
    [
        (3, 256, 64, None, lambda: None),
        (3, 256, 128, None, lambda: within(256, segments(256), causal=True)),
        (3, 384, 64, None, lambda: Mask(jnp.arange(384), jnp.arange(256), None, segments(256))),
        (0, 256, 64, "table", lambda: within(256, causal=True)),
        (0, 256, 256, None, lambda: None),
        (0, 250, 64, None, lambda: None),
        (0, 256, 64, None, lambda: MOVED),
        (0, 256, 64, None, lambda: Mask(jnp.arange(256), jnp.arange(256), radius=9)),
    ],
)
def test_compiled_for_a_tpu(
    tpus: Tpus, calls: int, q_len: int, head_dim: int, bias: str | None, mask: Callable[[], Mask | None]
) -> None:
    device = tpus("v5e:2x2")[0]
    on_device = jax.sharding.SingleDeviceSharding(device)

    def on_tpu(query: jax.Array, key: jax.Array, value: jax.Array, table: jax.Array) -> jax.Array:
        known = None if bias is None else bucket_bias(table, q_len, 256)
        return (Fused()(query, key, value, known, mask()).astype(jnp.float32) ** 2).sum()

    x = {length: jax.ShapeDtypeStruct((2, length, HEADS, head_dim), jnp.bfloat16) for length in (q_len, 256)}
    step = jax.jit(jax.value_and_grad(on_tpu, (0, 1, 2)), in_shardings=on_device, out_shardings=on_device)
    table = jax.ShapeDtypeStruct((HEADS, BUCKETS), jnp.float32)
    text = step.lower(x[q_len], x[256], x[256], table).compile().as_text()
    assert len(re.findall(r'custom_call_target="tpu_custom_call"', text)) == calls


def test_compiled_for_a_mesh_of_tpus(tpus: Tpus) -> None:
    partitioner = Partitioner(make_mesh(data=4, model=2, devices=tpus("v5e:2x4")))

    def on_tpu(query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array) -> jax.Array:
        mixed = Fused()(query, key, value, None, within(512, ids, causal=True))
        return (mixed.astype(jnp.float32) ** 2).sum()

    x, ids = jax.ShapeDtypeStruct((8, 512, 4, 64), jnp.bfloat16), jax.ShapeDtypeStruct((8, 512), jnp.int32)
    split, batch = partitioner.sharding("batch", "length", "heads"), partitioner.sharding("batch")
    with partitioner.active():
        step = jax.jit(jax.grad(on_tpu, (0, 1, 2)), in_shardings=(split,) * 3 + (batch,), out_shardings=(split,) * 3)
        text = step.lower(x, x, x, ids).compile().as_text()
    assert len(re.findall(r'custom_call_target="tpu_custom_call"', text)) == 3
    assert re.findall(r" (all-\w+|collective-permute|reduce-scatter)(?:-start)?\(", text) == []
