"""Attention at a cost linear in length: a window around each query, and a few tokens that see all and that all see."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer

from t5x_like.errors import UserError
from t5x_like.layers.attention import Bias, DotProduct
from t5x_like.layers.dropout import Dropout
from t5x_like.layers.linear import Linear
from t5x_like.layers.masks import Mask, within
from t5x_like.layers.positions import BucketBias
from t5x_like.sharding import constrain
from t5x_like.typing import Array, Bool, Float, Int, Shaped

SMALLEST_BLOCK = 128
"""Queries per block; more where the radius is larger. Smaller products would leave the hardware idle."""


@dataclasses.dataclass(frozen=True)
class SlidingWindow:
    """An `Attend` in which a query sees the keys at most `radius` away, in O(length x radius) time.

    With a causal mask this is GPT-3's banded attention (Child et al. 2019, Brown et al. 2020, section 2.1), without one
    Longformer's local attention (Beltagy et al. 2020, section 3.1). Same result as the plain form with `Mask.radius`,
    except for queries that see nothing at all.

    Blocks of queries, each with the keys around it, go through the plain form one after the other, and once more in the
    backward pass. So memory holds the weights of one block only, which on a CPU also takes less time than holding all.

    Attributes:
      radius: distance in positions to the farthest key seen, at least 1.
      max_global: room for keys beyond the window, those which `Mask.seen_by_all` marks. A row of the batch that marks
        more comes out as NaN: compiled code cannot raise, and must not be wrong in silence.
    """

    radius: int
    max_global: int = 0

    def __post_init__(self) -> None:
        if self.radius < 1 or self.max_global < 0:
            raise UserError(
                f"SlidingWindow: radius must be at least 1 and max_global at least 0, not {self.radius} and "
                f"{self.max_global}"
            )

    def __call__(
        self,
        query: Float[Array, "batch q_len heads head_dim"],
        key: Float[Array, "batch k_len heads head_dim"],
        value: Float[Array, "batch k_len heads head_dim"],
        bias: Bias | None,
        mask: Mask | None,
    ) -> Float[Array, "batch q_len heads head_dim"]:
        """See `Attend`. As many queries as keys share their positions; otherwise this is the plain form.

        Raises:
          UserError: the bias is written out, or there are tokens seen by all and either a bias or no room for them, or
            there is no mask and lengths differ.
        """
        length = query.shape[1]
        if mask is None and key.shape[1] == length:
            mask = within(length)
        if mask is None:
            raise UserError("SlidingWindow: needs a mask, to know where queries stand among keys of another number")
        if not (bias is None or isinstance(bias, BucketBias)):
            raise UserError(
                "SlidingWindow: a bias that is written out costs length x length; use none, or T5's "
                "(RelativePositionBias)"
            )
        if mask.seen_by_all is not None and (bias is not None or not self.max_global):
            raise UserError("SlidingWindow: for tokens that are seen by all, set max_global and use no bias")
        if key.shape[1] != length:  # a step of cached decoding
            return DotProduct()(query, key, value, bias, dataclasses.replace(mask, radius=self.radius))
        mixed = self._windowed(query, key, value, bias, mask)
        if mask.seen_by_all is None:
            return mixed
        too_many = mask.seen_by_all.sum(axis=1) > self.max_global
        return jnp.where(too_many[:, None, None, None], jnp.nan, mixed)

    def _windowed(self, query: Array, key: Array, value: Array, bias: BucketBias | None, mask: Mask) -> Array:
        """The plain form for one block of queries after the other, over the keys within reach and the global ones."""
        batch, length = query.shape[:2]
        size = min(max(self.radius, SMALLEST_BLOCK), length)
        before = self.radius if size < length else 0  # a single block has no neighbours
        after = 0 if mask.causal else before
        span = before + size + after
        if bias is not None:  # the same for every block
            bias = dataclasses.replace(bias, query_positions=jnp.arange(size), key_positions=jnp.arange(span) - before)

        is_global = jnp.zeros((batch, length), jnp.bool_) if mask.seen_by_all is None else mask.seen_by_all
        columns = _global_columns(is_global, 0 if mask.seen_by_all is None else self.max_global)
        segments = jnp.ones((batch, length), jnp.int32) if mask.key_segments is None else mask.key_segments
        global_key, global_value, global_segments = (_take(x, columns) for x in (key, value, segments))
        local_segments = jnp.where(is_global, 0, segments)  # lest a global key in the window count twice
        seen_by_all = jnp.broadcast_to(jnp.arange(span + columns.shape[1]) >= span, (batch, span + columns.shape[1]))

        @functools.partial(jax.checkpoint, prevent_cse=False)  # lax.map is a loop: nothing is merged across it
        def attend(block: tuple[Array, Array, Array, Array | None, Array]) -> Array:
            query, key, value, query_segments, key_segments = block
            block_mask = Mask(
                jnp.arange(size),
                jnp.arange(span + columns.shape[1]) - before,
                query_segments,
                jnp.concatenate([key_segments, global_segments], axis=1),
                seen_by_all,
                mask.causal,
                self.radius,
            )
            key, value = jnp.concatenate([key, global_key], axis=1), jnp.concatenate([value, global_value], axis=1)
            return DotProduct()(query, key, value, bias, block_mask)

        split_queries = mask.query_segments is not None and mask.key_segments is not None
        blocks = (
            _blocks(query, size),
            _around(key, size, before, after),
            _around(value, size, before, after),
            _blocks(mask.query_segments, size) if split_queries else None,
            _around(local_segments, size, before, after),
        )
        mixed = jax.lax.map(attend, blocks)
        return jnp.moveaxis(mixed, 0, 1).reshape(batch, -1, *query.shape[2:])[:, :length]


class LongformerAttention(nn.Module):
    """Self-attention of Longformer (Beltagy et al. 2020, section 3.1): a sliding window, and global tokens.

    Global tokens, which `Mask.seen_by_all` marks, look at all real tokens, and do so through projections of their own.
    The other tokens look at those in their window and at the global ones, in one softmax. Cost is linear in length.

    Attributes:
      num_heads: heads.
      head_dim: size of each; logits are divided by its square root.
      radius: half of what the paper calls the window.
      max_global: room for global tokens; a row of the batch with more comes out as NaN.
      dropout_rate: on the attention weights, one mask for all queries.
      dtype: of the products.
      kernel_init: draws the kernels; None means `FanInNormal`.
    """

    num_heads: int
    head_dim: int
    radius: int
    max_global: int = 64
    dropout_rate: float = 0.0
    dtype: str = "float32"
    kernel_init: Initializer | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length embed"], bias: Bias | None = None, mask: Mask | None = None
    ) -> Float[Array, "batch length embed"]:
        """Attends from `x` to itself; what comes out at padding means nothing.

        Args:
          x: queries, keys and values.
          bias: must be None.
          mask: with segments and `seen_by_all`; None: no padding and no global tokens.

        Raises:
          UserError: there is a bias, or a causal mask, under which global tokens would see what is to come.
        """
        mask = within(x.shape[1]) if mask is None else mask
        if mask.causal:
            raise UserError("LongformerAttention: global tokens see both ways; use SlidingWindow in a causal decoder")
        if self.is_initializing() and mask.seen_by_all is None:  # the global projections are made in any case
            mask = dataclasses.replace(mask, seen_by_all=jnp.zeros(x.shape[:2], jnp.bool_))
        heads = self._heads(x, x, "")
        mixed = SlidingWindow(self.radius, self.max_global)(*heads, bias, mask)
        if mask.seen_by_all is not None:
            columns = _global_columns(mask.seen_by_all, self.max_global)
            mixed = _put(mixed, columns, self._global_rows(x, columns, mask))
        mixed = constrain(mixed, "batch", "length", "heads", "head_dim")
        axes = ("heads", "head_dim", "embed")
        return Linear((x.shape[-1],), axes, 2, self.kernel_init, self.dtype, use_bias=True, name="out")(mixed)

    def _global_rows(self, x: Array, columns: Array, mask: Mask) -> Array:
        """What the global tokens see: everything real, of their segment."""
        segments = None if mask.query_segments is None else _take(mask.query_segments, columns)
        everything = Mask(jnp.arange(columns.shape[1]), mask.key_positions, segments, mask.key_segments)
        return DotProduct()(*self._heads(_take(x, columns), x, "_global"), None, everything)

    def _heads(self, queries: Array, keys: Array, suffix: str) -> tuple[Array, Array, Array]:
        query = self._project(f"query{suffix}", queries) * self.head_dim**-0.5
        key, value = self._project(f"key{suffix}", keys), self._project(f"value{suffix}", keys)
        return query, key, Dropout(self.dropout_rate, broadcast_dims=(-1,))(value)

    def _project(self, name: str, x: Array) -> Array:
        features, axes = (self.num_heads, self.head_dim), ("embed", "heads", "head_dim")
        projected = Linear(features, axes, 1, self.kernel_init, self.dtype, use_bias=True, name=name)(x)
        return constrain(projected, "batch", "length", "heads", "head_dim")


def _blocks(x: Shaped[Array, "batch length ..."], size: int) -> Shaped[Array, "blocks batch {size} ..."]:
    """Cut along the length; the last block is filled up with zeros, which as a segment is padding."""
    padded = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(padded.reshape(len(x), -1, size, *x.shape[2:]), 1, 0)


def _around(
    x: Shaped[Array, "batch length ..."], size: int, before: int, after: int
) -> Shaped[Array, "blocks batch {before+size+after} ..."]:
    """Every block with the end of the one before it and the beginning of the one after it."""
    blocks = _blocks(x, size)
    outside = jnp.zeros_like(blocks[:1])
    left = jnp.concatenate([outside, blocks[:-1]])[:, :, size - before :]
    right = jnp.concatenate([blocks[1:], outside])[:, :, :after]
    return jnp.concatenate([left, blocks, right], axis=2)


def _global_columns(is_global: Bool[Array, "batch length"], room: int) -> Int[Array, "batch room"]:
    """Where the global tokens of each row are; `length`, which is out of range, where it has fewer."""
    length = is_global.shape[1]
    return jnp.sort(jnp.where(is_global, jnp.arange(length)[None], length))[:, :room]


def _take(x: Shaped[Array, "batch length ..."], columns: Int[Array, "batch room"]) -> Shaped[Array, "batch room ..."]:
    """`x` at `columns` of each row; zeros for those out of range."""
    return jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(x, columns)


def _put(
    x: Shaped[Array, "batch length ..."], columns: Int[Array, "batch room"], new: Shaped[Array, "batch room ..."]
) -> Shaped[Array, "batch length ..."]:
    """`x` with `new` at `columns` of each row; those out of range are dropped."""
    return jax.vmap(lambda row, at, values: row.at[at].set(values, mode="drop"))(x, columns, new)
