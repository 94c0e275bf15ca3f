"""Sampling with temperature, top-k and top-p."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from t5x_like.decoding.contract import Cache, Decoded, Stepper
from t5x_like.decoding.loop import best, decode_rows
from t5x_like.errors import UserError
from t5x_like.typing import Array, Float, Int, PRNGKey


@dataclass(frozen=True)
class Sampling:
    """Draws every token from the network's distribution, sharpened and cut off by `warp`.

    A sample's score is the log-probability of its tokens under the network's own distribution (temperature 1,
    nothing cut off), so samples drawn with different settings compare. Every step folds its position into the
    key, so it can be replayed alone, and what a row draws does not depend on the rows beside it.

    Attributes:
      temperature: divides the logits; below 1 sharpens, above 1 flattens.
      top_k: keeps the k most likely tokens; 0 keeps all.
      top_p: keeps the nucleus, the fewest tokens whose probabilities reach p (Holtzman et al. 2019, eq. 2); 1
        keeps all.
      num_samples: independent samples per example, returned best score first.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_samples: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise UserError(
                f"Sampling.temperature is {self.temperature}: set it above 0, "
                "or use Greedy() for the most likely token at every step (temperature 0)"
            )
        if self.top_k < 0:
            raise UserError(f"Sampling.top_k is {self.top_k}: set it to 1 or more, or to 0 to keep all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"Sampling.top_p is {self.top_p}: set it above 0, and to 1 to keep all")
        if self.num_samples < 1:
            raise UserError(f"Sampling.num_samples is {self.num_samples}: set it to 1 or more")

    def warp(self, logits: Float[Array, "rows vocab"]) -> Float[Array, "rows vocab"]:
        """The logits drawn from: temperature, then top-k, then top-p on what top-k left; -inf where cut off.

        Tokens tied with the last one kept are kept too, so equal tokens have equal chances.
        """
        logits = logits / self.temperature
        if self.top_k:
            largest, _ = jax.lax.top_k(logits, min(self.top_k, logits.shape[1]))
            logits = _cut_below(largest[:, -1:], logits)
        if self.top_p < 1:
            descending = jnp.sort(logits, axis=1, descending=True)
            probs = jax.nn.softmax(descending)
            before = jnp.cumsum(probs, axis=1) - probs  # 0 for the first: one token is always kept
            size = jnp.sum(before < self.top_p, axis=1, keepdims=True)
            logits = _cut_below(jnp.take_along_axis(descending, size - 1, axis=1), logits)
        return logits

    def __call__(
        self,
        stepper: Stepper,
        cache: Cache,
        prompt: Int[Array, "batch prompt_length"],
        max_length: int,
        eos_id: int,
        key: PRNGKey | None = None,
    ) -> Decoded:
        """See `DecodeFn`.

        Raises:
          UserError: `key` is missing.
        """
        if key is None:
            raise UserError("Sampling needs a random key: pass key=jax.random.key(seed)")

        def draw(logits: Float[Array, "rows vocab"], position: Int[Array, ""]) -> Int[Array, " rows"]:
            return jax.random.categorical(jax.random.fold_in(key, position), self.warp(logits))

        batch = prompt.shape[0]
        rows = jnp.repeat(jnp.arange(batch), self.num_samples)
        state = decode_rows(stepper, stepper.reorder(cache, rows), prompt[rows], max_length, eos_id, draw)
        samples = Decoded(state.tokens.reshape(batch, self.num_samples, -1), state.scores.reshape(batch, -1))
        return best(samples, self.num_samples)


def _cut_below(least: Float[Array, "rows 1"], logits: Float[Array, "rows vocab"]) -> Float[Array, "rows vocab"]:
    return jnp.where(logits < least, -jnp.inf, logits)
