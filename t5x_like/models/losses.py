"""Losses of tokens, and their sums over a batch."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_like.errors import UserError
from t5x_like.models.contract import LossAndMetrics, WeightedSum
from t5x_like.typing import Array, Float, Int, Shaped


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


def loss_and_metrics(
    logits: Float[Array, "*batch vocab"],
    targets: Int[Array, "*batch"],
    weights: Shaped[Array, "*batch"],
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> LossAndMetrics:
    """`cross_entropy` and accuracy, summed over the targets that have a weight."""
    weights = jnp.asarray(weights, jnp.float32)
    tokens = cross_entropy(logits, targets, label_smoothing, z_loss)
    correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    values = {"loss": tokens.loss, "accuracy": correct, "z_loss": tokens.z_loss}
    sums = {name: WeightedSum((each * weights).sum(), weights.sum()) for name, each in values.items()}
    return LossAndMetrics(sums.pop("loss"), sums)


def log_likelihood(
    logits: Float[Array, "batch length vocab"],
    targets: Int[Array, "batch length"],
    weights: Shaped[Array, "batch length"],
) -> Float[Array, " batch"]:
    """The log-probability of each row's weighted targets together, in nats."""
    return -(cross_entropy(logits, targets).loss * jnp.asarray(weights, jnp.float32)).sum(axis=-1)
