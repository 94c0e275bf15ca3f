"""Attention in blocks: never more than one block of logits in memory, forward or backward.

An online softmax over blocks of keys (Rabe & Staats 2021, "Self-attention does not need O(n^2) memory", section 2),
which the backward pass recomputes (Dao et al. 2022, "FlashAttention", appendix B).

Sequences `[batch, length, heads, head_dim]` become blocks `[blocks, batch, heads, size, head_dim]`; `i` and `j` count
blocks of queries and of keys, and `size` says how many queries and keys a block has. Neither batch nor heads are ever
mixed, so that a mesh may split them.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from t5x_like.layers.attention import MASKED, Bias, DotProduct
from t5x_like.layers.masks import Mask
from t5x_like.layers.positions import BucketBias
from t5x_like.layers.products import kept, product
from t5x_like.typing import Array, Bool, Float, Int, PyTree

Query: TypeAlias = Float[Array, "batch q_len heads head_dim"]
Key: TypeAlias = Float[Array, "batch k_len heads head_dim"]
Queries: TypeAlias = Float[Array, "rows batch heads q_size head_dim"]
Keys: TypeAlias = Float[Array, "columns batch heads k_size head_dim"]
PerQuery: TypeAlias = Float[Array, "rows batch heads q_size"]
Logits: TypeAlias = Float[Array, "#batch #heads q_size k_size"]
Index: TypeAlias = Int[Array, ""]
Size: TypeAlias = tuple[int, int]
Sums = TypeVar("Sums")

LOWEST = MASKED / 2
"""Where maxima start: a masked logit lies so far below that its weight is 0, even before anything else is seen."""


@dataclasses.dataclass(frozen=True)
class Chunked:
    """What `DotProduct` computes, up to rounding, in memory linear in length.

    Blocks that positions hide altogether (behind a causal mask, beyond a radius) are not computed.

    Attributes:
      query_block: at most so many queries at a time; blocks are made as equal as can be.
      key_block: at most so many keys at a time.
    """

    query_block: int = 512
    key_block: int = 512

    def __call__(self, query: Query, key: Key, value: Key, bias: Bias | None, mask: Mask | None) -> Query:
        """See `Attend`; the positions of a `BucketBias` have to be consecutive, or all is NaN."""
        (batch, q_len), k_len = query.shape[:2], key.shape[1]
        if q_len == 1:  # a step of cached decoding
            return DotProduct()(query, key, value, bias, mask)
        rows, columns = math.ceil(q_len / self.query_block), math.ceil(k_len / self.key_block)
        queries, keys, values = _split(query, rows), _split(key, columns), _split(value, columns)
        more = rows * queries.shape[3] - q_len, columns * keys.shape[3] - k_len
        mask = _padded(mask, (batch, q_len, k_len), more)
        mixed, normalizer = _attend(queries, keys, values, _block_bias(bias, batch, more), mask)
        mixed, seeing = _join(mixed, q_len), _join(normalizer[..., None] > LOWEST, q_len)
        return mixed if mask is None else mean_unless(seeing, mixed, value)


def mean_unless(seeing: Bool[Array, "batch q_len #heads 1"], mixed: Query, value: Key) -> Query:
    """A query that sees nothing has equal logits in the plain form: it gets the mean of all values."""
    mean = value.astype(jnp.float32).mean(1, keepdims=True).astype(value.dtype)
    return jnp.where(jnp.broadcast_to(seeing, mixed.shape), mixed, jnp.broadcast_to(mean, mixed.shape))


def _split(x: Float[Array, "batch length heads head_dim"], blocks: int) -> Array:
    """Equal blocks; the last one may end in zeros."""
    size = math.ceil(x.shape[1] / blocks)
    x = jnp.pad(x, ((0, 0), (0, blocks * size - x.shape[1]), (0, 0), (0, 0)))
    return x.reshape(x.shape[0], blocks, size, *x.shape[2:]).transpose(1, 0, 3, 2, 4)


def _join(x: Array, length: int) -> Array:
    x = x.transpose(1, 0, 3, 2, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _padded(mask: Mask | None, shape: tuple[int, int, int], more: Size) -> Mask | None:
    """The mask of `shape` (batch, queries, keys) for more queries and keys at the end, which nobody sees."""
    if not more[1] and mask is None:
        return None
    mask = mask or Mask(jnp.arange(shape[1]), jnp.arange(shape[2]))
    if more[1] and mask.key_segments is None:
        real = jnp.ones((shape[0], shape[2]), jnp.int32)
        mask = dataclasses.replace(mask, query_segments=None, key_segments=real)

    def pad(x: Array | None, more: int, mode: str = "constant") -> Array | None:
        return None if x is None else jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, more),), mode)

    return dataclasses.replace(
        mask,
        query_positions=pad(mask.query_positions, more[0], "edge"),
        key_positions=pad(mask.key_positions, more[1], "edge"),
        query_segments=pad(mask.query_segments, more[0]),
        key_segments=pad(mask.key_segments, more[1]),
        seen_by_all=pad(mask.seen_by_all, more[1]),
    )


@dataclasses.dataclass(frozen=True)
class _BlockBias(abc.ABC):
    """A bias by blocks. One is made of a window of `array`, and its gradient goes to the same window."""

    array: PyTree

    def block(self, i: Index, j: Index, size: Size) -> Logits:
        start, shape = self._window(i, j, size)
        return self._written_out(jax.lax.dynamic_slice(self.array, start, shape), size)

    def add(self, gradient: Logits, i: Index, j: Index) -> "_BlockBias":
        """A sum of gradients, and one more."""
        size = gradient.shape[2], gradient.shape[3]
        start, shape = self._window(i, j, size)
        window = jax.lax.dynamic_slice(self.array, start, shape)
        _, pull = jax.vjp(lambda part: jnp.broadcast_to(self._written_out(part, size), gradient.shape), window)
        window += pull(gradient)[0]
        return dataclasses.replace(self, array=jax.lax.dynamic_update_slice(self.array, window, start))

    @abc.abstractmethod
    def _window(self, i: Index, j: Index, size: Size) -> tuple[tuple[Index | int, ...], tuple[int, ...]]:
        """Where the window starts, and its shape."""

    @abc.abstractmethod
    def _written_out(self, window: Array, size: Size) -> Logits:
        """The block that a window stands for: linear in it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Dense(_BlockBias):
    """A bias that is written out, `[#batch, #heads, queries, keys]`."""

    def _window(self, i: Index, j: Index, size: Size) -> tuple[tuple[Index | int, ...], tuple[int, ...]]:
        return (0, 0, i * size[0], j * size[1]), (*self.array.shape[:2], *size)

    def _written_out(self, window: Array, size: Size) -> Logits:
        return window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Diagonal(_BlockBias):
    """One number per diagonal, the lower left corner's first, `[batch, heads, queries + keys]` (the last is unused)."""

    queries: int = dataclasses.field(metadata={"static": True})

    def _window(self, i: Index, j: Index, size: Size) -> tuple[tuple[Index | int, ...], tuple[int, ...]]:
        return (0, 0, self.queries - (i + 1) * size[0] + j * size[1]), (*self.array.shape[:2], sum(size))

    def _written_out(self, window: Array, size: Size) -> Logits:
        """Each row sees the window from one step further left than the row above.

        First a few rows are slid past each other, then copies of those by as many: few slices, fast to transpose.
        """
        few = next(n for n in range(math.isqrt(size[0]), 0, -1) if size[0] % n == 0)
        return _slid(_slid(window[:, :, None], few, sum(size) - few), size[0] // few, size[1])


def _slid(x: Float[Array, "b h rows _"], count: int, width: int) -> Float[Array, "b h more_rows width"]:
    """`count` slices on top of each other, each from `rows` columns left of the one above; the last from column 0."""
    starts = x.shape[2] * jnp.arange(count - 1, -1, -1)
    slices = jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(x, start, width, axis=3), out_axes=2)(starts)
    return slices.reshape(*x.shape[:2], -1, width)


def _block_bias(bias: Bias | None, batch: int, more: Size) -> _BlockBias | None:
    """The bias by blocks, with `more` queries and keys than it has."""
    if bias is None:
        return None
    if isinstance(bias, BucketBias):
        diagonals = jnp.pad(bias.diagonals().astype(jnp.float32), ((0, 0), (more[0], more[1] + 1)))
        # For each row of the batch, so that a mesh which splits the batch sums gradients once, not block by block.
        diagonals = jnp.broadcast_to(diagonals, (batch, *diagonals.shape))
        return _Diagonal(diagonals, len(bias.query_positions) + more[0])
    return _Dense(jnp.pad(bias.astype(jnp.float32), ((0, 0), (0, 0), (0, more[0]), (0, more[1]))))


def _block_mask(mask: Mask, i: Index, j: Index, size: Size) -> Mask:
    return mask.queries(i * size[0], size[0]).keys(j * size[1], size[1])


def _logits(query: Array, key: Array, bias: _BlockBias | None, mask: Mask | None, i: Index, j: Index) -> Logits:
    """Block `i, j`, of these queries and keys `[batch, heads, size, head_dim]`."""
    logits = product("bhqd,bhkd->bhqk", query, key)
    size = logits.shape[2], logits.shape[3]
    if bias is not None:
        logits += jnp.broadcast_to(bias.block(i, j, size), logits.shape)
    return logits if mask is None else jnp.where(_block_mask(mask, i, j, size).allowed(), logits, MASKED)


def _for_keys(
    key: Keys, size: Size, mask: Mask | None, i: Index, step: Callable[[Index, Sums], Sums], sums: Sums
) -> Sums:
    """`step(j, sums)` for each block of keys, but for those that positions hide from all queries of block `i`."""

    def step_if_seen(j: Index, sums: Sums) -> Sums:
        reaches = mask is None or _block_mask(mask, i, j, size).reaches()
        return step(j, sums) if reaches is True else jax.lax.cond(reaches, step, lambda j, sums: sums, j, sums)

    return jax.lax.fori_loop(0, len(key), step_if_seen, sums)


def _forward(
    query: Queries, key: Keys, value: Keys, bias: _BlockBias | None, mask: Mask | None
) -> tuple[Queries, PerQuery]:
    """Values mixed, and the logarithm of what weights were divided by; zeros and `LOWEST` if a query sees nothing."""
    size = query.shape[3], key.shape[3]

    def row(inputs: tuple[Index, Array]) -> tuple[Array, Array]:
        i, query = inputs

        def step(j: Index, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            mixed, highest, total = sums
            logits = _logits(query, key[j], bias, mask, i, j)
            higher = jnp.maximum(highest, logits.max(-1))
            shrink, weights = jnp.exp(highest - higher), jnp.exp(logits - higher[..., None])
            more = product("bhqk,bhkd->bhqd", weights.astype(value.dtype), value[j])
            return mixed * shrink[..., None] + more, higher, total * shrink + weights.sum(-1)

        zeros = jnp.zeros_like(query, jnp.float32)
        sums: tuple[Array, ...] = zeros, jnp.full_like(zeros[..., 0], LOWEST), zeros[..., 0]
        mixed, highest, total = _for_keys(key, size, mask, i, step, sums)
        total = jnp.where(total > 0, total, 1)
        return (mixed / total[..., None]).astype(value.dtype), highest + jnp.log(total)

    return jax.lax.map(row, (jnp.arange(len(query)), query))


def _forward_for_gradient(
    query: Queries, key: Keys, value: Keys, bias: _BlockBias | None, mask: Mask | None
) -> tuple[tuple[Queries, PerQuery], tuple[PyTree, ...]]:
    mixed, normalizer = (kept("mixed", x) for x in _forward(query, key, value, bias, mask))
    return (mixed, normalizer), (query, key, value, bias, mask, mixed, normalizer)


def _backward(
    residuals: tuple[PyTree, ...], gradients: tuple[Queries, PerQuery]
) -> tuple[Queries, Keys, Keys, _BlockBias | None, None]:
    """Computes each block again; `by_x` is the loss's gradient by `x`. Nothing depends on the normalizer given out."""
    query, key, value, bias, mask, mixed, normalizer = residuals
    by_mixed, size = gradients[0], (query.shape[3], key.shape[3])
    by_total = (by_mixed.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(-1)

    def row(sums: tuple[PyTree, ...], inputs: tuple[Array, ...]) -> tuple[tuple[PyTree, ...], Array]:
        i, query, by_mixed, normalizer, by_total = inputs
        query_t, by_mixed_t = query.swapaxes(2, 3), by_mixed.swapaxes(2, 3)

        def step(j: Index, sums: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
            by_query, by_key, by_value, by_bias = sums
            weights = jnp.exp(_logits(query, key[j], bias, mask, i, j) - normalizer[..., None])
            by_logits = weights * (product("bhqd,bhkd->bhqk", by_mixed, value[j]) - by_total[..., None])
            by_bias = by_bias and by_bias.add(by_logits, i, j)
            weights, by_logits = weights.astype(value.dtype), by_logits.astype(key.dtype)
            by_query += product("bhqk,bhkd->bhqd", by_logits, key[j])
            by_key = by_key.at[j].add(product("bhdq,bhqk->bhdk", query_t, by_logits))
            by_value = by_value.at[j].add(product("bhdq,bhqk->bhdk", by_mixed_t, weights))
            return by_query, by_key, by_value, by_bias

        sums = _for_keys(key, size, mask, i, step, (jnp.zeros_like(query, jnp.float32), *sums))
        return sums[1:], sums[0].astype(query.dtype)

    # Those of keys and values transposed: a CPU takes twice as long to contract the rows of both factors.
    zeros = [jnp.zeros_like(x.swapaxes(3, 4), jnp.float32) for x in (key, value)]
    rows = jnp.arange(len(query)), query, by_mixed, normalizer, by_total
    (by_key, by_value, by_bias), by_query = jax.lax.scan(row, (*zeros, jax.tree.map(jnp.zeros_like, bias)), rows)
    by_key, by_value = by_key.swapaxes(3, 4).astype(key.dtype), by_value.swapaxes(3, 4).astype(value.dtype)
    return by_query, by_key, by_value, by_bias, None


_attend = jax.custom_vjp(_forward)
_attend.defvjp(_forward_for_gradient, _backward)
