"""Losses of tokens, and their sums over a batch."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_like.errors import UserError
from t5x_like.layers.logits import LazyLogits
from t5x_like.models.contract import LossAndMetrics, WeightedSum
from t5x_like.sharding import constrain, ways
from t5x_like.typing import Array, Float, Int, Scalar, Shaped


class TokenLoss(NamedTuple):
    """Loss of each token, in nats; `loss` includes `z_loss`, which is kept apart to be logged."""

    loss: Float[Array, "*batch"]
    z_loss: Float[Array, "*batch"]


def cross_entropy(
    logits: Float[Array, "*batch vocab"],
    targets: Int[Array, "*batch"],
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> TokenLoss:
    """Cross entropy from soft targets, plus T5's z-loss; all float32, whatever the logits are.

    The soft target q is 1 - s on the target and s / (vocab - 1) elsewhere, where s is the label smoothing
    (Szegedy et al. 2016, section 7, who give the target a share of s too). The entropy of q is subtracted, as
    T5X does, so that the best prediction costs 0. The z-loss, z * log(Z)^2 with Z the softmax normaliser,
    keeps logits from drifting (Mesh TensorFlow; Chowdhery et al. 2022, section 5: z = 1e-4).

    Args:
        logits: any float dtype; -inf takes an entry out of the vocabulary (without label smoothing).
        targets: token ids in [0, vocab); an id of vocab or more costs NaN.
        label_smoothing: s, in [0, 1).
        z_loss: z.

    Returns:
        The loss of every token, z-loss included, and the z-loss apart.

    Raises:
        UserError: `label_smoothing` lies outside [0, 1).
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise UserError(f"label_smoothing is {label_smoothing}; as a share of probability it must lie in [0, 1)")
    logits = logits.astype(jnp.float32)
    # Relative to the largest logit: at logits of 1e4 the plain form loses four digits.
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    shifted = logits - largest
    log_normalizer = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
    # Taken from `logits` though `shifted` holds it too: what is gathered from must lie in memory.
    target = (jnp.take_along_axis(logits, targets[..., None], axis=-1) - largest)[..., 0]

    loss = log_normalizer - target
    if label_smoothing:
        # -sum_i q_i log p_i without q in memory: low everywhere, and confidence - low more on the target.
        others = logits.shape[-1] - 1
        confidence, low = 1.0 - label_smoothing, label_smoothing / others
        entropy = -confidence * math.log(confidence) - label_smoothing * math.log(low)
        loss = log_normalizer - (confidence - low) * target - low * jnp.sum(shifted, axis=-1) - entropy
    z_losses = z_loss * jnp.square(log_normalizer + largest[..., 0])
    return TokenLoss(loss + z_losses, z_losses)


class _Sums(NamedTuple):
    """Over weighted targets."""

    loss: Scalar
    z_loss: Scalar
    correct: Scalar


def loss_and_metrics(
    logits: LazyLogits | Float[Array, "*batch vocab"],
    targets: Int[Array, "*batch"],
    weights: Shaped[Array, "*batch"],
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> LossAndMetrics:
    """`cross_entropy` and accuracy, summed over the targets that have a weight.

    The loss is differentiable; the metrics are not, where logits are not multiplied out.
    """
    weights = jnp.asarray(weights, jnp.float32)
    regularisers = label_smoothing, z_loss
    if isinstance(logits, LazyLogits):
        logits = dataclasses.replace(logits, hidden=_context_as_rows(logits.hidden))
        loss, *others = _sums_by_parts(logits, _context_as_rows(targets), _context_as_rows(weights), regularisers)
    else:
        loss, *others = _sums(logits, targets, weights, regularisers)
    weight = weights.sum()
    metrics = {"z_loss": others[0], "accuracy": others[1]}
    return LossAndMetrics(WeightedSum(loss, weight), {name: WeightedSum(x, weight) for name, x in metrics.items()})


def _sums(logits: Array, targets: Array, weights: Array, regularisers: tuple[float, float]) -> _Sums:
    tokens = cross_entropy(logits, targets, *regularisers)
    return _Sums(*((each * weights).sum() for each in (*tokens, _is_likeliest(logits, targets))))


def _is_likeliest(logits: Array, targets: Array) -> Array:
    """1 where the target is `argmax` of the logits, the first of equals; its reduction vectorises, argmax does not."""
    of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    later = jnp.arange(logits.shape[-1]).reshape((1,) * targets.ndim + (-1,)) >= targets[..., None]
    return ((logits < of_target) | ((logits == of_target) & later)).all(axis=-1).astype(jnp.float32)


# ---- The same by parts: logits and their gradient never exist as a whole ----

PART_BYTES = 2**26
"""The logits of a part, in float32, take about so much of each device."""


class _Part(NamedTuple):
    """Rows of every shard of the batch, `[shards, rows, ...]`."""

    hidden: Array
    targets: Array
    weights: Array

    def sums(self, matrix: LazyLogits, regularisers: tuple[float, float]) -> _Sums:
        logits = dataclasses.replace(matrix, hidden=self.hidden).values()
        return _sums(logits, self.targets, self.weights, regularisers)


def _context_as_rows(x: Array) -> Array:
    """`[batch, length, ...]` with the part of a sequence that a device has, under context parallelism, as a row."""
    batch, length = x.shape[:2]
    parts = ways("rows") // ways("batch")
    if parts == 1 or length % parts:
        return x
    x = x.reshape(batch, parts, length // parts, *x.shape[2:]).swapaxes(0, 1)
    return constrain(x.reshape(batch * parts, *x.shape[2:]), "rows", *(None,) * (x.ndim - 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sums_by_parts(logits: LazyLogits, targets: Array, weights: Array, regularisers: tuple[float, float]) -> _Sums:
    matrix, parts = _split(logits, targets, weights)
    sums = jax.lax.map(lambda part: part.sums(matrix, regularisers), parts)
    return _Sums(*(each.sum() for each in sums))


def _with_gradient(
    logits: LazyLogits, targets: Array, weights: Array, regularisers: tuple[float, float]
) -> tuple[_Sums, LazyLogits]:
    """The gradient of the loss is made right away, while a part's logits are there; all that is left is to scale it."""
    matrix, parts = _split(logits, targets, weights)

    def step(by_matrix: LazyLogits, part: _Part) -> tuple[LazyLogits, tuple[_Sums, Array]]:
        def loss(hidden: Array, matrix: LazyLogits) -> tuple[Scalar, _Sums]:
            sums = part._replace(hidden=hidden).sums(matrix, regularisers)
            return sums.loss, sums

        (_, sums), (by_hidden, more) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(part.hidden, matrix)
        return jax.tree.map(jnp.add, by_matrix, more), (sums, by_hidden)

    zero = _of_shards(jax.tree.map(jnp.zeros_like, matrix), _shards(len(targets))[0])
    by_matrix, (sums, by_hidden) = jax.lax.scan(step, zero, parts)
    by_matrix = jax.tree.map(lambda x: x.sum(axis=0), by_matrix)
    rows = by_hidden.reshape(len(by_hidden), len(targets), -1, by_hidden.shape[-1]).swapaxes(0, 1)
    by_hidden = rows.reshape(len(targets), -1, rows.shape[-1])[:, : targets.shape[1]]
    return _Sums(*(each.sum() for each in sums)), dataclasses.replace(by_matrix, hidden=by_hidden)


def _gradient(
    regularisers: tuple[float, float], by_logits: LazyLogits, by_sums: _Sums
) -> tuple[LazyLogits, None, None]:
    return jax.tree.map(lambda x: (by_sums.loss * x).astype(x.dtype), by_logits), None, None


_sums_by_parts.defvjp(_with_gradient, _gradient)


def _split(logits: LazyLogits, targets: Array, weights: Array) -> tuple[LazyLogits, _Part]:
    """The matrix, and all parts `[parts, shards, rows, ...]`.

    The matrix is there once for each shard of the batch, so that each sums up a gradient of its own: they are added up
    behind the loop, instead of after every part.
    """
    batch, length = targets.shape
    rows, shards = _shards(batch)
    logit_bytes = 4 * batch // shards * length * logits.vocab_size // ways("vocab")
    size = -(-length // min(length, -(-logit_bytes // PART_BYTES)))

    def parts(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, -length % size), *[(0, 0)] * (x.ndim - 2)])
        x = x.reshape(batch, -1, size, *x.shape[2:]).swapaxes(0, 1)
        x = x.reshape(len(x), shards, -1, *x.shape[3:])
        return constrain(x, None, rows, *(None,) * (x.ndim - 2))

    whole = dataclasses.replace(logits, hidden=None)
    matrix = _of_shards(jax.tree.map(lambda x: jnp.broadcast_to(x, (shards, *x.shape)), whole), rows)
    return matrix, _Part(parts(logits.hidden), parts(targets), parts(weights))


def _shards(batch: int) -> tuple[str, int]:
    """What splits so many rows, and into how many parts."""
    rows = "rows" if batch % ways("rows") == 0 else "batch"
    return rows, ways(rows) if batch % ways(rows) == 0 else 1


def _of_shards(matrix: LazyLogits, rows: str) -> LazyLogits:
    """Each where its rows are."""
    axes = (None, "vocab") if matrix.transposed else ("vocab", None)
    bias = None if matrix.bias is None else constrain(matrix.bias, rows, "vocab")
    return dataclasses.replace(matrix, table=constrain(matrix.table, rows, *axes), bias=bias)


def log_likelihood(
    logits: Float[Array, "batch length vocab"],
    targets: Int[Array, "batch length"],
    weights: Shaped[Array, "batch length"],
) -> Float[Array, " batch"]:
    """The log-probability of each row's weighted targets together, in nats."""
    return -(cross_entropy(logits, targets).loss * jnp.asarray(weights, jnp.float32)).sum(axis=-1)
