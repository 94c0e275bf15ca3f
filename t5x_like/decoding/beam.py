"""Beam search with the length penalty of Wu et al. 2016."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_like.decoding.contract import Cache, Decoded, Stepper
from t5x_like.decoding.loop import DecodeState, best, force, forced_tokens, running, start
from t5x_like.errors import UserError
from t5x_like.typing import Array, Float, Int, PRNGKey


class BeamState(NamedTuple):
    """What a step of beam search changes.

    Attributes:
      live: hypotheses that go on, `num_beams` rows per example; score -inf marks an empty place.
      finished: the best that ended, best first, scores divided by the length penalty; -inf and zeros in an
        empty place.
    """

    live: DecodeState
    finished: Decoded


@dataclass(frozen=True)
class BeamSearch:
    """Keeps the `num_beams` likeliest beginnings per example, and apart from them the best that ended.

    A score is the log-probability divided by `((5 + length) / 6) ** length_penalty` (Wu et al. 2016, eq. 14,
    without the coverage term); length counts the chosen tokens, the end token too, but no forced ones. What
    `max_length` cuts off competes like what ended. Where an example has fewer than `num_beams` possible
    hypotheses, the rest of its samples are zeros with score -inf.

    Attributes:
      num_beams: hypotheses kept per example, and samples returned.
      length_penalty: the exponent; 0 ranks by log-probability alone, more favours longer hypotheses.
    """

    num_beams: int = 4
    length_penalty: float = 0.6

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise UserError(f"BeamSearch.num_beams is {self.num_beams}: set it to 1 or more")
        if not 0 <= self.length_penalty < math.inf:  # the early stop is exact only where penalties grow
            raise UserError(f"BeamSearch.length_penalty is {self.length_penalty}: set it to 0 or more")

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
        batch, beams = prompt.shape[0], self.num_beams
        example = jnp.arange(batch)[:, None]
        example_of_row = jnp.repeat(jnp.arange(batch), beams)
        forced = forced_tokens(prompt, max_length)
        penalties = self._penalty(jnp.cumsum(forced == 0, axis=1))

        def extend(state: BeamState) -> BeamState:
            live, finished = state
            logits, cache = stepper.step(live.cache, live.last, live.position)
            forced_now = forced[:, live.position]
            log_probs = jax.nn.log_softmax(force(logits, forced_now[example_of_row]))
            vocab = log_probs.shape[1]

            # At most one candidate per beam ends, so of the 2 * beams best at least `beams` can go on.
            totals = (live.scores[:, None] + log_probs).reshape(batch, beams * vocab)
            scores, flat = jax.lax.top_k(totals, 2 * beams)
            parents, last = example * beams + flat // vocab, (flat % vocab).astype(prompt.dtype)
            tokens = live.tokens[parents].at[:, :, live.position].set(last)
            ends = ((last == eos_id) & (forced_now == 0)[:, None]) | (live.position + 1 == max_length)

            penalised = jnp.where(ends, scores / penalties[:, live.position, None], -jnp.inf)
            finished = Decoded(*map(_beside, finished, Decoded(tokens, penalised)))
            finished = best(finished, beams)

            scores, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, scores), beams)
            # Log-probabilities only fall and penalties only grow, so no live hypothesis can end above this.
            bound = scores[:, 0] / penalties[:, -1]
            live = DecodeState(
                position=live.position + 1,
                last=last[example, kept].reshape(-1),
                tokens=tokens[example, kept].reshape(-1, max_length),
                scores=scores.reshape(-1),
                ended=(bound <= finished.scores[:, -1])[example_of_row],
                cache=stepper.reorder(cache, parents[example, kept].reshape(-1)),
            )
            return BeamState(live, finished)

        live = start(stepper.reorder(cache, example_of_row), prompt[example_of_row], max_length)
        # All beams of an example would start, and stay, the same: only its first one is a hypothesis.
        live = live._replace(scores=jnp.tile(jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf), batch))
        finished = Decoded(jnp.zeros((batch, beams, max_length), prompt.dtype), jnp.full((batch, beams), -jnp.inf))
        state = jax.lax.while_loop(lambda state: running(state.live), extend, BeamState(live, finished))
        return state.finished

    def _penalty(self, length: Int[Array, "batch length"]) -> Float[Array, "batch length"]:
        return ((5.0 + length.astype(jnp.float32)) / 6.0) ** self.length_penalty


def _beside(left: Array, right: Array) -> Array:
    return jnp.concatenate((left, right), axis=1)
