"""Greedy search: the most likely token at every step."""

from dataclasses import dataclass

import jax.numpy as jnp

from t5x_like.decoding.contract import Cache, Decoded, Stepper
from t5x_like.decoding.loop import decode_rows
from t5x_like.typing import Array, Float, Int, PRNGKey


@dataclass(frozen=True)
class Greedy:
    """Takes the most likely token at every step, the lowest id among equals; one sample per example."""

    def __call__(
        self,
        stepper: Stepper,
        cache: Cache,
        prompt: Int[Array, "batch prompt_length"],
        max_length: int,
        eos_id: int,
        key: PRNGKey | None = None,
    ) -> Decoded:
        """See `DecodeFn`; `key` is not used."""

        def most_likely(logits: Float[Array, "rows vocab"], position: Int[Array, ""]) -> Int[Array, " rows"]:
            return jnp.argmax(logits, axis=1)

        state = decode_rows(stepper, cache, prompt, max_length, eos_id, most_likely)
        return Decoded(state.tokens[:, None, :], state.scores[:, None])
