"""Schedules at steps where the numbers are known by hand."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_like.errors import UserError
from t5x_like.training import schedules


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (schedules.rsqrt(), {0: 0.01, 10_000: 0.01, 40_000: 0.005, 1_000_000: 0.001}),
        (schedules.rsqrt(base=2.0, warmup_steps=4), {0: 1.0, 4: 1.0, 16: 0.5}),
        # 64**-0.5 = 1/8 and 16**-1.5 = 1/64: a 512th at the first step, a 32nd at the 16th.
        (schedules.noam(64, warmup_steps=16), {0: 1 / 512, 3: 1 / 128, 15: 1 / 32, 63: 1 / 64, 255: 1 / 128}),
        (schedules.noam(16, warmup_steps=1, base=2.0), {0: 0.5, 3: 0.25}),
        (schedules.relative_step(), {0: 0.01, 9_999: 0.01, 39_999: 0.005}),
        (schedules.constant(1e-3), {0: 1e-3, 10**6: 1e-3}),
        (schedules.constant(1e-3, warmup_steps=10), {0: 0.0, 5: 5e-4, 10: 1e-3, 11: 1e-3}),
        (schedules.linear(1.0, total_steps=100), {0: 1.0, 25: 0.75, 100: 0.0, 101: 0.0}),
        (
            schedules.linear(1.0, total_steps=110, warmup_steps=10, end=0.2),
            {0: 0.0, 3: 0.3, 10: 1.0, 60: 0.6, 110: 0.2, 500: 0.2},
        ),
        (schedules.cosine(1.0, total_steps=60), {0: 1.0, 20: 0.75, 30: 0.5, 40: 0.25, 60: 0.0}),
        (
            schedules.cosine(0.4, total_steps=70, warmup_steps=10, end=0.2),
            {0: 0.0, 5: 0.2, 10: 0.4, 30: 0.35, 40: 0.3, 50: 0.25, 70: 0.2, 99: 0.2},
        ),
        (
            schedules.product((schedules.constant(1.0, warmup_steps=4), schedules.rsqrt(1.0, 4))),
            {0: 0.0, 1: 0.125, 4: 0.5, 16: 0.25},
        ),
        (schedules.product((optax.constant_schedule(3.0), schedules.constant(2.0))), {7: 6.0}),
    ],
)
def test_by_hand(schedule: schedules.Schedule, values: dict[int, float]) -> None:
    jitted = jax.jit(schedule)
    for step, value in values.items():
        for rate in (schedule(step), jitted(jnp.int32(step))):
            assert rate.dtype == jnp.float32
            np.testing.assert_allclose(rate, value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.rsqrt(warmup_steps=0), "rsqrt.warmup_steps is 0"),
        (lambda: schedules.noam(512, warmup_steps=0), "noam: embed_dim is 512 and warmup_steps is 0"),
        (lambda: schedules.linear(1.0, total_steps=10, warmup_steps=10), "linear: warmup_steps is 10"),
        (lambda: schedules.cosine(1.0, total_steps=5, warmup_steps=-1), "cosine: warmup_steps is -1"),
    ],
)
def test_refuses_impossible_steps(make: Callable[[], schedules.Schedule], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
