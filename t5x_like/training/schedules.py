"""Learning-rate schedules: functions from the step, counted from 0, to float32; any of optax's will do too.

`base` is the highest rate; `total_steps` counts the warm-up too. Impossible step numbers raise `UserError`.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from optax import Schedule

from t5x_like.errors import UserError
from t5x_like.typing import Scalar

__all__ = ["Schedule", "constant", "cosine", "linear", "noam", "product", "relative_step", "rsqrt"]


def rsqrt(base: float = 1.0, warmup_steps: int = 10_000) -> Schedule:
    """T5's base / sqrt(max(step, warmup_steps)): level, then falling (Raffel et al. 2020, section 3.1.2).

    Here `base` is no rate: the highest rate is base / sqrt(warmup_steps), by default 0.01.
    """
    if warmup_steps < 1:
        raise UserError(
            f"rsqrt.warmup_steps is {warmup_steps}; the rate starts at base / sqrt(warmup_steps): give >= 1"
        )
    return _in_float32(lambda step: base / jnp.sqrt(jnp.maximum(step, warmup_steps)))


def noam(embed_dim: int, warmup_steps: int = 4_000, base: float = 1.0) -> Schedule:
    """A linear rise, then 1/sqrt(step), all the lower the wider the model (Vaswani et al. 2017, eq. 3).

    Here too `base` is no rate: the highest rate is base / sqrt(embed_dim * warmup_steps), at step warmup_steps - 1.
    """
    if embed_dim < 1 or warmup_steps < 1:
        raise UserError(f"noam: embed_dim is {embed_dim} and warmup_steps is {warmup_steps}; give >= 1")
    scale = base * embed_dim**-0.5
    # The paper counts steps from 1.
    return _in_float32(lambda step: scale * jnp.minimum((step + 1) ** -0.5, (step + 1) * warmup_steps**-1.5))


def relative_step() -> Schedule:
    """Adafactor's own min(1e-2, 1 / sqrt(step + 1)) (Shazeer and Stern 2018, algorithm 6)."""
    return _in_float32(lambda step: jnp.minimum(1e-2, 1.0 / jnp.sqrt(step + 1.0)))


def constant(base: float, warmup_steps: int = 0) -> Schedule:
    """`base` at every step, after a linear rise from 0 over `warmup_steps`."""
    return _after_warmup(base, warmup_steps, optax.constant_schedule(base))


def linear(base: float, total_steps: int, warmup_steps: int = 0, end: float = 0.0) -> Schedule:
    """A linear rise from 0 to `base` over `warmup_steps`, then a linear fall to `end` at `total_steps`."""
    decay_steps = _decay_steps("linear", total_steps, warmup_steps)
    return _after_warmup(base, warmup_steps, optax.linear_schedule(base, end, decay_steps))


def cosine(base: float, total_steps: int, warmup_steps: int = 0, end: float = 0.0) -> Schedule:
    """As `linear`, but falling along half a cosine (Loshchilov and Hutter 2017, eq. 5, without restarts)."""
    fall = optax.cosine_decay_schedule(base - end, _decay_steps("cosine", total_steps, warmup_steps))
    return _after_warmup(base, warmup_steps, lambda step: end + fall(step))


def product(factors: Sequence[Schedule]) -> Schedule:
    """The product of schedules.

    T5X's `constant * linear_warmup * rsqrt_decay` is `product((constant(base, warmup), rsqrt(1.0, warmup)))`.
    """
    return _in_float32(lambda step: math.prod(jnp.asarray(factor(step), jnp.float32) for factor in factors))


def _after_warmup(base: float, warmup_steps: int, schedule: Schedule) -> Schedule:
    if warmup_steps == 0:
        return _in_float32(schedule)
    rise = optax.linear_schedule(0.0, base, warmup_steps)
    return _in_float32(optax.join_schedules((rise, schedule), (warmup_steps,)))


def _decay_steps(schedule: str, total_steps: int, warmup_steps: int) -> int:
    if not 0 <= warmup_steps < total_steps:
        raise UserError(
            f"{schedule}: warmup_steps is {warmup_steps} and total_steps is {total_steps},"
            " which counts the warm-up too and must be the larger"
        )
    return total_steps - warmup_steps


def _in_float32(schedule: Schedule) -> Schedule:
    """Float32 in and out: optax's own return whatever the step's type and Python's numbers promote to."""

    def float32_schedule(step: ArrayLike) -> Scalar:
        return jnp.asarray(schedule(jnp.asarray(step, jnp.float32)), jnp.float32)

    return float32_schedule
