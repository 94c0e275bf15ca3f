import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_t5 import quick_jit

from t5x_like.layers.attention import MultiHeadAttention, attention_weights
from t5x_like.layers.linear import Normal
from t5x_like.layers.masks import Mask

BATCH, QUERIES, KEYS, HEADS, HEAD_DIM, EMBED = 2, 3, 5, 2, 4, 7  # heads * head_dim is not embed
RNG = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def jax_arrays(*arrays: np.ndarray | None) -> list[jax.Array | None]:
    return [None if array is None else jnp.asarray(array) for array in arrays]


def naive_weights(
    query: np.ndarray, key: np.ndarray, bias: np.ndarray | None = None, mask: np.ndarray | None = None
) -> np.ndarray:
    weights = np.zeros((BATCH, HEADS, query.shape[1], key.shape[1]))
    for b, h, q in np.ndindex(weights.shape[:3]):
        logits = [float(query[b, q, h].astype(np.float64) @ k) for k in key[b, :, h]]
        if bias is not None:
            logits = [logit + float(added) for logit, added in zip(logits, bias[b % len(bias), h, q], strict=True)]
        seen = [True] * len(logits) if mask is None else list(mask[b, 0, q])
        top = max(logit for logit, see in zip(logits, seen, strict=True) if see)
        exp = [np.exp(logit - top) if see else 0.0 for logit, see in zip(logits, seen, strict=True)]
        weights[b, h, q] = np.asarray(exp) / sum(exp)
    return weights


QUERY, KEY = random(BATCH, QUERIES, HEADS, HEAD_DIM), random(BATCH, KEYS, HEADS, HEAD_DIM)
BIAS = random(1, HEADS, QUERIES, KEYS)
MASK = RNG.uniform(size=(BATCH, 1, QUERIES, KEYS)) < 0.6
MASK[..., 0] = True


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("mask", [None, MASK])
def test_weights(bias: np.ndarray | None, mask: np.ndarray | None) -> None:
    found = attention_weights(*jax_arrays(QUERY, KEY, bias, mask))
    np.testing.assert_allclose(found, naive_weights(QUERY, KEY, bias, mask), atol=1e-6)
    if mask is not None:
        assert (found[~np.broadcast_to(mask, found.shape)] == 0).all()


def test_a_query_that_sees_nothing_is_uniform_and_has_finite_gradients() -> None:
    mask = MASK.copy()
    mask[1, 0, 2] = False

    def total(query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = attention_weights(query, key, allowed=jnp.asarray(mask))
        return (weights**2).sum(), weights

    gradients, weights = jax.grad(total, argnums=(0, 1), has_aux=True)(*jax_arrays(QUERY, KEY))
    np.testing.assert_array_equal(weights[1, :, 2], np.full((HEADS, KEYS), np.float32(1 / KEYS)))
    np.testing.assert_allclose(weights[0], naive_weights(QUERY, KEY, None, MASK)[0], atol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_softmax_of_bfloat16_is_float32() -> None:
    weights = attention_weights(jnp.asarray(QUERY, jnp.bfloat16), jnp.asarray(KEY, jnp.bfloat16))
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


KERNELS = {
    "query": random(EMBED, HEADS, HEAD_DIM),
    "key": random(EMBED, HEADS, HEAD_DIM),
    "value": random(EMBED, HEADS, HEAD_DIM),
    "out": random(HEADS, HEAD_DIM, EMBED),
}
PARAMS = {name: {"kernel": jnp.asarray(kernel)} for name, kernel in KERNELS.items()}
X, CONTEXT = random(BATCH, QUERIES, EMBED), random(BATCH, KEYS, EMBED)
ATTENTION = MultiHeadAttention(HEADS, HEAD_DIM)


def naive_attention(
    x: np.ndarray, context: np.ndarray, bias: np.ndarray | None = None, mask: np.ndarray | None = None
) -> np.ndarray:
    inputs = {"query": x, "key": context, "value": context}
    query, key, value = (np.einsum("ble,ehd->blhd", y, PARAMS[name]["kernel"]) for name, y in inputs.items())
    mixed = np.einsum("bhqk,bkhd->bqhd", naive_weights(query, key, bias, mask), value)
    return np.einsum("bqhd,hde->bqe", mixed, KERNELS["out"])


def test_attends_to_itself_or_to_a_context() -> None:
    key_segments = np.array([[1, 1, 0, 1, 0], [1, 0, 1, 1, 1]])
    mask = Mask(jnp.arange(QUERIES), jnp.arange(KEYS), key_segments=jnp.asarray(key_segments))
    found = ATTENTION.apply({"params": PARAMS}, *jax_arrays(X, CONTEXT, BIAS), mask)
    allowed = np.broadcast_to(key_segments[:, None, None] > 0, (BATCH, 1, QUERIES, KEYS))
    np.testing.assert_allclose(found, naive_attention(X, CONTEXT, BIAS, allowed), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        ATTENTION.apply({"params": PARAMS}, jnp.asarray(X)), naive_attention(X, X), rtol=1e-4, atol=1e-5
    )


def test_rows_share_the_context_of_their_example() -> None:
    x, context, mask = random(3 * BATCH, 1, EMBED), random(BATCH, 5, EMBED), np.ones((BATCH, 5), np.int32)
    mask[0, 3:] = 0
    variables = {"params": PARAMS}
    _, made = ATTENTION.apply(variables, jnp.zeros((BATCH, 1, EMBED)), jnp.asarray(context), mutable=["cache"])
    out = ATTENTION.apply(
        variables | made,
        jnp.asarray(x),
        mask=Mask(jnp.asarray([7]), jnp.arange(5), key_segments=jnp.asarray(mask)),
        position=jnp.asarray(7),
    )
    for row in range(3):
        expected = naive_attention(x[row::3], context, None, mask[:, None, None] > 0)
        np.testing.assert_allclose(out[row::3], expected, rtol=1e-4, atol=1e-5)


def test_cache_of_its_own_keys_fills_from_a_position_on() -> None:
    variables = {"params": PARAMS}
    long = random(BATCH, 4, EMBED)
    _, made = ATTENTION.apply(variables, jnp.zeros_like(long), mutable=["cache"])
    assert {name: entry.shape for name, entry in made["cache"].items()} == {
        "cached_key": (BATCH, HEADS, HEAD_DIM, 4),
        "cached_value": (BATCH, HEADS, 4, HEAD_DIM),
    }
    assert not any(np.asarray(entry).any() for entry in made["cache"].values())
    cache, found = made["cache"], []
    for position, step in ((0, 1), (1, 2), (3, 1)):
        out, updated = ATTENTION.apply(
            variables | {"cache": cache},
            jnp.asarray(long[:, position : position + step]),
            mask=Mask(position + jnp.arange(step), jnp.arange(4), causal=True),
            position=jnp.asarray(position),
            mutable=["cache"],
        )
        cache, found = updated["cache"], [*found, out]
    causal = np.broadcast_to(np.tril(np.ones((4, 4), bool)), (BATCH, 1, 4, 4))
    expected = naive_attention(long, long, None, causal)
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=1e-4, atol=1e-5)


def test_cache_of_a_context_is_read_without_it() -> None:
    out, made = ATTENTION.apply({"params": PARAMS}, *jax_arrays(X, CONTEXT), mutable=["cache"])
    again, kept = ATTENTION.apply(
        {"params": PARAMS, "cache": made["cache"]}, jnp.asarray(X[:, 1:2]), position=jnp.asarray(1), mutable=["cache"]
    )
    np.testing.assert_allclose(again, out[:, 1:2], rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, kept["cache"], made["cache"])


def test_fresh_query_kernels_make_up_for_the_missing_square_root() -> None:
    params = quick_jit(MultiHeadAttention(20, 30).init)(jax.random.key(0), jnp.zeros((1, 2, 50)))["params"]
    stddevs = {name: float(kernel["kernel"].value.std()) for name, kernel in params.items()}
    expected = {"query": (50 * 30) ** -0.5, "key": 50**-0.5, "value": 50**-0.5, "out": (20 * 30) ** -0.5}
    assert stddevs == pytest.approx(expected, rel=0.02)


def test_dropout_of_weights_is_one_mask_for_all_queries() -> None:
    attention = MultiHeadAttention(HEADS, HEAD_DIM, dropout_rate=0.5)
    x = np.repeat(X[:, :1], QUERIES, axis=1)  # equal queries
    out = attention.apply({"params": PARAMS}, *jax_arrays(x, CONTEXT), rngs={"dropout": jax.random.key(1)})
    np.testing.assert_allclose(out[:, 1:], np.repeat(out[:, :1], QUERIES - 1, axis=1), rtol=1e-5, atol=1e-6)
    assert (np.abs(out - naive_attention(x, CONTEXT)) > 1e-3).any()


def test_scaled_queries_and_biases() -> None:
    attention = MultiHeadAttention(HEADS, HEAD_DIM, scaled=True, use_bias=True)
    heads = (HEADS, HEAD_DIM)
    biases = {name: random(*shape) for name, shape in zip(KERNELS, (heads, heads, heads, (EMBED,)), strict=True)}
    params = {name: {"kernel": jnp.asarray(KERNELS[name]), "bias": jnp.asarray(biases[name])} for name in KERNELS}
    query, key, value = (
        np.einsum("ble,ehd->blhd", X, KERNELS[name]) + biases[name] for name in ("query", "key", "value")
    )
    mixed = np.einsum("bhqk,bkhd->bqhd", naive_weights(query / HEAD_DIM**0.5, key), value)
    expected = np.einsum("bqhd,hde->bqe", mixed, KERNELS["out"]) + biases["out"]
    np.testing.assert_allclose(attention.apply({"params": params}, jnp.asarray(X)), expected, rtol=1e-4, atol=1e-5)


def test_kernels_drawn_otherwise() -> None:
    attention = MultiHeadAttention(20, 30, scaled=True, kernel_init=Normal(0.02), out_init=Normal(0.02, layers=8))
    params = quick_jit(attention.init)(jax.random.key(0), jnp.zeros((1, 2, 50)))["params"]
    stddevs = {name: float(kernel["kernel"].value.std()) for name, kernel in params.items()}
    assert stddevs == pytest.approx({"query": 0.02, "key": 0.02, "value": 0.02, "out": 0.02 / 4}, rel=0.02)
