import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_t5 import quick_jit

from t5x_like.architectures.variables import unbox
from t5x_like.errors import UserError
from t5x_like.layers.linear import Normal
from t5x_like.layers.two_stream_attention import TwoStreamAttention, TwoStreamMask

BATCH, LENGTH, TARGETS, MEMORY, HEADS, HEAD_DIM, EMBED = 2, 5, 3, 4, 2, 3, 8
RNG = np.random.default_rng(0)
LAYER = TwoStreamAttention(HEADS, HEAD_DIM, memory_length=6, kernel_init=Normal(0.7))
X = jnp.asarray(RNG.normal(size=(BATCH, LENGTH + TARGETS, EMBED)), jnp.float32)
REMEMBERED = jnp.asarray(RNG.normal(size=(BATCH, MEMORY, EMBED)), jnp.float32)
CACHE = {"cache": {"memory": REMEMBERED}}


def make_mask(hidden: np.ndarray, targets: list, types: np.ndarray, real: np.ndarray) -> TwoStreamMask:
    columns, types = jnp.arange(hidden.shape[1]), jnp.asarray(types, jnp.int32)
    segments = jnp.asarray(real, jnp.int32)
    return TwoStreamMask(
        columns,
        columns,
        key_segments=segments,
        hidden=jnp.asarray(hidden, bool),
        target_positions=jnp.asarray(targets, jnp.int32),
        query_types=types,
        key_types=types,
    )


HIDDEN = RNG.uniform(size=(BATCH, LENGTH, LENGTH)) < 0.5
POSITIONS = [[4, 0, 0], [2, 3, 1]]
TYPES = np.array([[0, 0, 1, 1, 0], [1, 0, 0, 1, 1]])
REAL = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
MASK = make_mask(HIDDEN, POSITIONS, TYPES, REAL)
PARAMS = {"params": unbox(quick_jit(LAYER.init)(jax.random.key(0), X, MASK)["params"])}


def test_masks_by_hand() -> None:
    """Ranks 0, 1, 2 and padding; targets are the tokens of ranks 1 and 2."""
    hidden = np.array([[[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 1, 1, 0]]])
    mask = make_mask(hidden, [[1, 2]], np.array([[0, 0, 1, 0]]), np.array([[1, 1, 1, 0]])).with_memory(1)
    np.testing.assert_array_equal(mask.row_positions(), [[0, 1, 2, 3, 1, 2]])
    np.testing.assert_array_equal(
        mask.allowed()[0, 0].astype(int),
        [
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],  # its own token, which is hidden from all others but the one of rank 2
            [1, 1, 1, 1, 0],
            [1, 1, 0, 0, 1],
            [1, 1, 0, 0, 0],  # not its own
            [1, 1, 1, 0, 0],
        ],
    )
    types = [[1, 1, 1, 0, 1], [1, 1, 1, 0, 1], [0, 0, 0, 1, 0], [1, 1, 1, 0, 1], [1, 1, 1, 0, 1], [0, 0, 0, 1, 0]]
    np.testing.assert_array_equal(mask.same_type()[0, 0].astype(int), types)


def naive_row(b: int, row: int) -> np.ndarray:
    """What one row takes from memory and content, one key after another (Dai et al. 2019, section 3.3, A^rel)."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), PARAMS["params"])
    x, memory = np.asarray(X, np.float64), np.asarray(REMEMBERED, np.float64)
    is_target = row >= LENGTH
    position = POSITIONS[b][row - LENGTH] if is_target else row
    mixed = np.zeros((HEADS, HEAD_DIM))
    for h in range(HEADS):
        query = x[b, row] @ p["query"]["kernel"][:, h]
        exps, values = [], []
        for j in range(-MEMORY, LENGTH):
            source = memory[b, MEMORY + j] if j < 0 else x[b, j]
            own = not is_target and j == position
            if j >= 0 and not own and (HIDDEN[b, position, j] or not REAL[b, j]):
                continue
            rates = [10_000 ** (-2 * i / EMBED) for i in range(EMBED // 2)]
            distance = [np.sin((position - j) * r) for r in rates] + [np.cos((position - j) * r) for r in rates]
            other = TYPES[b, position] != (0 if j < 0 else TYPES[b, j])
            logit = (query + p["content_bias"][h]) @ (source @ p["key"]["kernel"][:, h])
            logit += (query + p["distance_bias"][h]) @ (np.array(distance) @ p["distance"]["kernel"][:, h])
            logit += (query + p["segment_bias"][h]) @ p["segment_embedding"][int(other), h]
            exps.append(np.exp(logit / HEAD_DIM**0.5))
            values.append(source @ p["value"]["kernel"][:, h])
        mixed[h] = np.array(exps) @ np.array(values) / sum(exps)
    return np.einsum("hd,hde->e", mixed, p["out"]["kernel"])


def test_one_row_after_another() -> None:
    found = quick_jit(LAYER.apply)(PARAMS | CACHE, X, MASK)
    expected = [[naive_row(b, row) for row in range(LENGTH + TARGETS)] for b in range(BATCH)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_last_rows_of_content_are_remembered_and_carry_no_gradient() -> None:
    def second(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, state = LAYER.apply(PARAMS | CACHE, x, MASK, mutable=["cache"])
        return LAYER.apply(PARAMS | state, X, MASK).sum(), state["cache"]["memory"]

    gradient, memory = quick_jit(jax.grad(second, has_aux=True))(X)
    np.testing.assert_array_equal(memory, np.concatenate((REMEMBERED, X[:, :LENGTH]), axis=1)[:, -6:])
    assert not gradient.any()


def test_a_bias_has_no_place() -> None:
    with pytest.raises(UserError, match="relpos_bias"):
        LAYER.apply(PARAMS, X, MASK, jnp.zeros((1, HEADS, LENGTH, LENGTH)))
