import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.layers.positions import (
    BucketBias,
    RelativePositionBias,
    relative_position_bucket,
)


def buckets(distances: list[int], bidirectional: bool, num_buckets: int, max_distance: int) -> list[int]:
    relative = jnp.asarray([distances], jnp.int32)
    return relative_position_bucket(relative, bidirectional, num_buckets, max_distance)[0].tolist()


def test_bidirectional_table() -> None:
    # 4 buckets a side: 0, 1, then two for 2 * sqrt(6)**k = 2, 4.9, 12.
    left = buckets([0, -1, -2, -3, -4, -5, -11, -12, -99], True, 8, 12)
    right = buckets([1, 2, 3, 4, 5, 11, 12, 99], True, 8, 12)
    assert left == [0, 1, 2, 2, 2, 3, 3, 3, 3]
    assert right == [5, 6, 6, 6, 7, 7, 7, 7]


def test_causal_table() -> None:
    # 0 to 3, then four for 4 * 3**(k / 4) = 4, 5.3, 6.9, 9.1, 12.
    assert buckets([0, -1, -2, -3, -4, -5, -6, -7, -8, -9, -10, -11, -12, -99], False, 8, 12) == [
        *(0, 1, 2, 3, 4, 4, 5, 6, 6, 6, 7, 7, 7, 7)
    ]
    assert buckets([1, 2, 99], False, 8, 12) == [0, 0, 0]


def naive_bucket(relative: int, bidirectional: bool, num_buckets: int, max_distance: int) -> int:
    """In whole numbers: logarithmic bucket k starts at the distance with (d / exact)**rest = (max / exact)**k."""
    first, distance = 0, max(-relative, 0)
    if bidirectional:
        num_buckets //= 2
        first, distance = (num_buckets if relative > 0 else 0), abs(relative)
    exact = num_buckets // 2
    if distance < exact:
        return first + distance
    rest = num_buckets - exact
    later = [k for k in range(1, rest) if distance**rest * exact**k >= max_distance**k * exact**rest]
    return first + exact + len(later)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 12), (10, 33), (64, 1000)])
def test_all_distances(bidirectional: bool, num_buckets: int, max_distance: int) -> None:
    distances = list(range(-1100, 1101))
    expected = [naive_bucket(d, bidirectional, num_buckets, max_distance) for d in distances]
    assert buckets(distances, bidirectional, num_buckets, max_distance) == expected


def test_bias_is_looked_up_by_distance_and_head() -> None:
    module = RelativePositionBias(num_heads=2, num_buckets=8, max_distance=12, bidirectional=False)
    table = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    queries, keys = jnp.asarray([3, 4]), jnp.arange(6)
    bias = module.apply({"params": {"rel_embedding": jnp.asarray(table)}}, queries, keys).values()
    assert bias.shape == (1, 2, 2, 6)
    for head in range(2):
        for i, query in enumerate([3, 4]):
            for key in range(6):
                bucket = naive_bucket(key - query, False, 8, 12)
                assert bias[0, head, i, key] == table[head, bucket]


def test_fresh_tables_are_bounded_by_glorot() -> None:
    table = RelativePositionBias(12, 32).init(jax.random.key(0), jnp.arange(2), jnp.arange(2))["params"][
        "rel_embedding"
    ]
    limit = (6 / (12 + 32)) ** 0.5
    assert 0.9 * limit < np.abs(table.value).max() <= limit


def naive_bias(table: np.ndarray, queries: list[int], keys: list[int]) -> np.ndarray:
    """Causal, with 8 buckets up to a distance of 12, `[1, heads, queries, keys]`."""
    return np.asarray(
        [[[[row[naive_bucket(key - query, False, 8, 12)] for key in keys] for query in queries] for row in table]]
    )


def test_blocks_of_a_bias() -> None:
    table = np.random.default_rng(1).normal(size=(2, 8)).astype(np.float32)
    bias = BucketBias(jnp.asarray(table), jnp.arange(3, 8), jnp.arange(20), False, 8, 12)
    np.testing.assert_array_equal(bias.values(), naive_bias(table, [3, 4, 5, 6, 7], [*range(20)]))
    block = jax.jit(lambda bias, start: bias.queries(start, 2).keys(start + 1, 4))(bias, 2)
    np.testing.assert_array_equal(block.values(), naive_bias(table, [5, 6], [3, 4, 5, 6]))


def test_diagonals_of_a_bias() -> None:
    table = np.random.default_rng(2).normal(size=(2, 8)).astype(np.float32)
    bias = BucketBias(jnp.asarray(table), jnp.arange(14, 17), jnp.arange(2, 18), False, 8, 12)
    written_out, diagonals = bias.values()[0], bias.diagonals()
    assert diagonals.shape == (2, 3 + 16 - 1)
    for row in range(3):
        for column in range(16):
            np.testing.assert_array_equal(diagonals[:, 2 + column - row], written_out[:, row, column])


@pytest.mark.parametrize(("queries", "keys"), [([0, 1, 2], [0, 2, 3]), ([0, 1, 0], [0, 1, 2]), ([2, 1, 0], [0, 1, 2])])
def test_no_diagonals_without_consecutive_positions(queries: list[int], keys: list[int]) -> None:
    bias = BucketBias(jnp.ones((2, 8)), jnp.asarray(queries), jnp.asarray(keys), False, 8, 12)
    assert np.isnan(bias.diagonals()).all()
