import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from naive_attention import Sees, naive_attention, naive_gradients
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from t5x_like.errors import UserError
from t5x_like.layers import sparse_attention
from t5x_like.layers.attention import DotProduct
from t5x_like.layers.masks import Mask, within
from t5x_like.layers.positions import BucketBias
from t5x_like.layers.sparse_attention import LongformerAttention, SlidingWindow
from t5x_like.sharding import Partitioner, make_mesh

BATCH, HEADS, HEAD_DIM = 2, 3, 4
RNG = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def heads(length: int, count: int = 3) -> list[np.ndarray]:
    return [random(BATCH, length, HEADS, HEAD_DIM) for _ in range(count)]


def attend(
    window: SlidingWindow | DotProduct,
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    mask: Mask | None,
    bias: BucketBias | None = None,
) -> jax.Array:
    return jax.jit(window)(*map(jnp.asarray, (query, key, value)), bias, mask)


def segments_of(*rows: str) -> np.ndarray:
    return np.asarray([[int(digit) for digit in row] for row in rows], np.int32)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_attention, "SMALLEST_BLOCK", 2)


def assert_attends(mask: Mask, window: SlidingWindow, sees: Sees, real: np.ndarray) -> None:
    """Compares values and gradients of the queries that are real with the naive version's."""
    query, key, value, cotangent = heads(real.shape[1], 4)
    cotangent *= real[:, :, None, None]
    arrays = [jnp.asarray(array) for array in (query, key, value)]
    found, backward = jax.vjp(jax.jit(lambda *arrays: window(*arrays, None, mask)), *arrays)
    expected = naive_attention(query, key, value, sees)
    np.testing.assert_allclose(np.asarray(found)[real], expected[real], rtol=1e-5, atol=1e-6)
    for gradient, naive in zip(
        backward(jnp.asarray(cotangent)), naive_gradients(query, key, value, cotangent, sees), strict=True
    ):
        np.testing.assert_allclose(gradient, naive, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("length", "radius"), [(1, 3), (5, 9), (6, 3), (12, 3), (13, 1), (13, 3), (17, 4)], ids=lambda n: str(n)
)
@pytest.mark.usefixtures("small_blocks")
def test_window(length: int, radius: int, causal: bool) -> None:
    def sees(b: int, q: int, k: int) -> bool:
        return abs(q - k) <= radius and (k <= q or not causal)

    mask = within(length, causal=causal)
    assert_attends(mask, SlidingWindow(radius), sees, np.ones((BATCH, length), bool))


@pytest.mark.parametrize("causal", [False, True])
def test_window_smaller_than_the_smallest_block(causal: bool) -> None:
    def sees(b: int, q: int, k: int) -> bool:
        return abs(q - k) <= 3 and (k <= q or not causal)

    assert_attends(within(150, causal=causal), SlidingWindow(3), sees, np.ones((BATCH, 150), bool))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.usefixtures("small_blocks")
def test_window_stays_within_segments(causal: bool) -> None:
    segments = segments_of("11111222220003", "00111111111122")

    def sees(b: int, q: int, k: int) -> bool:
        return abs(q - k) <= 3 and (k <= q or not causal) and segments[b, q] == segments[b, k] > 0

    assert_attends(within(14, jnp.asarray(segments), causal), SlidingWindow(3), sees, segments > 0)


SEGMENTS, IS_GLOBAL = segments_of("1111112222223330", "0111111111111111"), np.zeros((BATCH, 16), bool)
IS_GLOBAL[0, [0, 5, 6, 12]] = IS_GLOBAL[1, 9] = True
GLOBAL_MASK = dataclasses.replace(within(16, jnp.asarray(SEGMENTS)), seen_by_all=jnp.asarray(IS_GLOBAL))


def sees_window_and_global(b: int, q: int, k: int) -> bool:
    return bool((abs(q - k) <= 3 or IS_GLOBAL[b, k]) and SEGMENTS[b, q] == SEGMENTS[b, k] > 0)


@pytest.mark.parametrize("max_global", [4, 20])
@pytest.mark.usefixtures("small_blocks")
def test_keys_seen_by_all_are_seen_once(max_global: int) -> None:
    assert_attends(GLOBAL_MASK, SlidingWindow(3, max_global), sees_window_and_global, SEGMENTS > 0)


def test_a_row_with_more_global_tokens_than_there_is_room_for_is_nan() -> None:
    query, key, value = heads(16)
    found = attend(SlidingWindow(3, 3), query, key, value, GLOBAL_MASK)
    assert np.isnan(found[0]).all()
    expected = naive_attention(query, key, value, sees_window_and_global)
    np.testing.assert_allclose(found[1, 1:], expected[1, 1:], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_blocks")
def test_without_a_mask_everything_in_the_window_is_seen() -> None:
    query, key, value = heads(9)
    found = attend(SlidingWindow(2), query, key, value, None)
    expected = naive_attention(query, key, value, lambda b, q, k: abs(q - k) <= 2)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_step_of_cached_decoding_sees_the_last_keys() -> None:
    query, key, value = heads(9)
    expected = naive_attention(query, key, value, lambda b, q, k: q - 3 <= k <= q)
    for position in (0, 5, 8):
        mask = Mask(jnp.asarray([position]), jnp.arange(9), causal=True)
        found = attend(SlidingWindow(3), query[:, position : position + 1], key, value, mask)
        np.testing.assert_allclose(found[:, 0], expected[:, position], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_blocks")
def test_relative_positions_are_added_block_by_block() -> None:
    query, key, value = heads(13)
    columns, plain = jnp.arange(13), dataclasses.replace(within(13), radius=3)

    def bias(table: jax.Array) -> BucketBias:
        return BucketBias(table, columns, columns, bidirectional=True, num_buckets=8, max_distance=6)

    table = jnp.asarray(random(HEADS, 8))
    found, backward = jax.vjp(lambda t: attend(SlidingWindow(3), query, key, value, within(13), bias(t)), table)
    written_out = np.asarray(bias(table).values())[0]
    expected = naive_attention(query, key, value, lambda b, q, k: abs(q - k) <= 3, written_out)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    _, plain_backward = jax.vjp(lambda t: attend(DotProduct(), query, key, value, plain, bias(t)), table)
    np.testing.assert_allclose(backward(found)[0], plain_backward(found)[0], rtol=1e-5, atol=1e-6)


def test_memory_grows_no_faster_than_length() -> None:
    def temporary(length: int) -> int:
        shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)

        def total(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return SlidingWindow(128)(query, key, value, None, within(length, causal=True)).sum()

        compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 2.1 * temporary(2048)


@pytest.mark.parametrize(
    ("window", "bias", "mask", "message"),
    [
        (SlidingWindow(2), jnp.zeros((1, HEADS, 9, 9)), within(9), "written out"),
        (SlidingWindow(2), None, dataclasses.replace(within(9), seen_by_all=jnp.ones((2, 9), bool)), "max_global"),
    ],
)
def test_what_a_window_cannot_do(
    window: SlidingWindow, bias: jax.Array | None, mask: Mask | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        window(*map(jnp.asarray, heads(9)), bias, mask)


def test_a_window_needs_a_mask_where_lengths_differ() -> None:
    query, key, value = map(jnp.asarray, heads(9))
    with pytest.raises(UserError, match="needs a mask"):
        SlidingWindow(2)(query[:, :1], key, value, None, None)


@pytest.mark.parametrize(("radius", "max_global"), [(0, 0), (2, -1)])
def test_sizes_are_checked(radius: int, max_global: int) -> None:
    with pytest.raises(UserError, match="radius must be at least 1"):
        SlidingWindow(radius, max_global)


EMBED, LENGTH, RADIUS = HEADS * HEAD_DIM, 16, 2
LONGFORMER = LongformerAttention(HEADS, HEAD_DIM, RADIUS, max_global=4)
PROJECTIONS = ("query", "key", "value", "query_global", "key_global", "value_global")
PARAMS = {
    name: {"kernel": random(EMBED, HEADS, HEAD_DIM) / 3, "bias": random(HEADS, HEAD_DIM)} for name in PROJECTIONS
} | {"out": {"kernel": random(HEADS, HEAD_DIM, EMBED) / 3, "bias": random(EMBED)}}
X = random(BATCH, LENGTH, EMBED)


def longformer(x: np.ndarray, mask: Mask | None, module: LongformerAttention = LONGFORMER) -> jax.Array:
    return jax.jit(module.apply)({"params": jax.tree.map(jnp.asarray, PARAMS)}, jnp.asarray(x), mask=mask)


def output(mixed: np.ndarray) -> np.ndarray:
    return np.einsum("blhd,hde->ble", mixed, PARAMS["out"]["kernel"]) + PARAMS["out"]["bias"]


def hugging_face(x: torch.Tensor, attention_mask: np.ndarray) -> torch.Tensor:
    """What their layer mixes, `[b, l, h, d]`; their mask is -1 at padding, 1 at global tokens, 0 elsewhere."""
    config = LongformerConfig(
        hidden_size=EMBED,
        num_attention_heads=HEADS,
        attention_window=[2 * RADIUS],
        attention_probs_dropout_prob=0.0,
    )
    layer = LongformerSelfAttention(config, 0)
    state = {f"{name}.weight": PARAMS[name]["kernel"].reshape(EMBED, EMBED).T for name in PROJECTIONS}
    state |= {f"{name}.bias": PARAMS[name]["bias"].reshape(EMBED) for name in PROJECTIONS}
    layer.load_state_dict({name: torch.tensor(weight) for name, weight in state.items()})
    mixed = layer(
        x,
        attention_mask=torch.tensor(10000.0 * attention_mask, dtype=torch.float32),
        is_index_masked=torch.tensor(attention_mask < 0),
        is_index_global_attn=torch.tensor(attention_mask > 0),
        is_global_attn=bool((attention_mask > 0).any()),
    )[0]
    return mixed.reshape(BATCH, LENGTH, HEADS, HEAD_DIM)


HF_MASKS = {
    "local": np.zeros((BATCH, LENGTH), int),
    "padding": np.asarray([[0] * 16, [0] * 9 + [-1] * 7]),
    "global": np.asarray([[1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0], [1] + [0] * 15]),
    "both": np.asarray([[1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, -1, -1], [0] * 12 + [-1] * 4]),
}


@pytest.mark.parametrize("kind", HF_MASKS)
@pytest.mark.usefixtures("small_blocks")
def test_longformer_agrees_with_hugging_face(kind: str) -> None:
    attention_mask = HF_MASKS[kind]
    real, is_global = attention_mask >= 0, attention_mask > 0
    mask = Mask(jnp.arange(LENGTH), jnp.arange(LENGTH), key_segments=jnp.asarray(real.astype(np.int32)))
    if is_global.any():
        mask = dataclasses.replace(mask, seen_by_all=jnp.asarray(is_global))

    x = torch.tensor(X, requires_grad=True)
    mixed = hugging_face(x, attention_mask)
    cotangent = random(*X.shape) * real[:, :, None]
    of_mixed = np.einsum("ble,hde->blhd", cotangent, PARAMS["out"]["kernel"])
    mixed.backward(torch.tensor(of_mixed))

    found, backward = jax.vjp(lambda x: longformer(x, mask), jnp.asarray(X))
    np.testing.assert_allclose(np.asarray(found)[real], output(mixed.detach().numpy())[real], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(backward(jnp.asarray(cotangent))[0], x.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_blocks")
def test_longformer_in_packed_rows_stays_within_segments() -> None:
    def project(name: str) -> np.ndarray:
        return np.einsum("ble,ehd->blhd", X, PARAMS[name]["kernel"]) + PARAMS[name]["bias"]

    def sees(b: int, q: int, k: int) -> bool:
        near = abs(q - k) <= RADIUS or IS_GLOBAL[b, k] or IS_GLOBAL[b, q]
        return bool(near and SEGMENTS[b, q] == SEGMENTS[b, k] > 0)

    local, everywhere = (
        naive_attention(project(f"query{end}") * 0.5, project(f"key{end}"), project(f"value{end}"), sees)
        for end in ("", "_global")
    )
    expected = output(np.where(IS_GLOBAL[:, :, None, None], everywhere, local))
    real = SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(longformer(X, GLOBAL_MASK))[real], expected[real], rtol=1e-5, atol=1e-5)


def test_longformer_has_all_its_parameters_without_global_tokens() -> None:
    made = jax.eval_shape(LONGFORMER.init, jax.random.key(0), jnp.asarray(X))["params"]
    shapes = jax.tree.map(np.shape, jax.tree.map(lambda box: box.value, made, is_leaf=lambda x: hasattr(x, "value")))
    assert shapes == jax.tree.map(np.shape, PARAMS)
    np.testing.assert_allclose(longformer(X, None), longformer(X, within(LENGTH)), rtol=1e-6)


def test_longformer_rows_with_too_many_global_tokens_are_nan() -> None:
    module = dataclasses.replace(LONGFORMER, max_global=3)
    found = longformer(X, GLOBAL_MASK, module)
    assert np.isnan(found[0]).any()
    np.testing.assert_allclose(found[1, 1:], longformer(X, GLOBAL_MASK)[1, 1:], rtol=1e-5)


@pytest.mark.usefixtures("small_blocks")
def test_longformer_on_a_mesh_leaves_every_row_where_it_is() -> None:
    partitioner = Partitioner(make_mesh(data=BATCH, devices=jax.devices()[:BATCH]))
    batch = jax.device_put((X, SEGMENTS, IS_GLOBAL), partitioner.sharding("batch"))

    def apply(x: jax.Array, segments: jax.Array, is_global: jax.Array) -> jax.Array:
        mask = dataclasses.replace(within(LENGTH, segments), seen_by_all=is_global)
        return LONGFORMER.apply({"params": jax.tree.map(jnp.asarray, PARAMS)}, x, mask=mask)

    with partitioner.active():
        compiled = jax.jit(apply).lower(*batch).compile()
        found = compiled(*batch)
    assert not re.search("all-gather|all-to-all|collective-permute|all-reduce", compiled.as_text())
    np.testing.assert_allclose(found, longformer(X, GLOBAL_MASK), rtol=1e-5, atol=1e-5)


def test_longformer_in_bfloat16_keeps_it() -> None:
    module = dataclasses.replace(LONGFORMER, dtype="bfloat16")
    found = longformer(X, GLOBAL_MASK, module)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), longformer(X, GLOBAL_MASK), rtol=0.1, atol=0.1)


def test_longformer_refuses_a_causal_mask() -> None:
    with pytest.raises(UserError, match="both ways"):
        longformer(X, within(LENGTH, causal=True))


def test_longformer_drops_keys_for_all_queries_alike() -> None:
    """Uniform weights over values of 1: every output is the number of keys kept, over 16, twice over."""
    params = jax.tree.map(np.zeros_like, PARAMS)
    params["value"]["bias"] += 1
    params["out"]["kernel"] = np.eye(EMBED, dtype=np.float32).reshape(HEADS, HEAD_DIM, EMBED)
    module = LongformerAttention(HEADS, HEAD_DIM, radius=LENGTH, dropout_rate=0.5)
    found = jax.jit(module.apply)(
        {"params": jax.tree.map(jnp.asarray, params)}, jnp.asarray(X), rngs={"dropout": jax.random.key(0)}
    )
    np.testing.assert_allclose(found, np.repeat(found[:, :1], LENGTH, axis=1), rtol=1e-6)
    np.testing.assert_allclose(found * 8, np.round(found * 8), atol=1e-5)
    assert 0.5 < found.mean() < 1.5 and found.std() > 0
