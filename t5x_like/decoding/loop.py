"""What the searches share: the state of their loop, prompts that are forced, and keeping the best."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_like.decoding.contract import Cache, Decoded, Stepper
from t5x_like.errors import UserError
from t5x_like.typing import Array, Bool, Float, Int

Choose = Callable[[Float[Array, "rows vocab"], Int[Array, ""]], Int[Array, " rows"]]
"""`(logits, position) -> tokens`: what sets greedy search and sampling apart."""


class DecodeState(NamedTuple):
    """Hypotheses that grow by one token per step, one a row.

    Attributes:
      position: how many tokens every row has.
      last: the token fed next; the start token at position 0.
      tokens: those so far, 0 from `position` on and after an end token.
      scores: sums of log-probabilities.
      ended: rows that nothing can change any more; the loop stops when all have ended.
      cache: the network's.
    """

    position: Int[Array, ""]
    last: Int[Array, " rows"]
    tokens: Int[Array, "rows length"]
    scores: Float[Array, " rows"]
    ended: Bool[Array, " rows"]
    cache: Cache


def start(cache: Cache, prompt: Int[Array, "rows prompt_length"], max_length: int) -> DecodeState:
    """Empty hypotheses, before the start token is fed."""
    rows = prompt.shape[0]
    return DecodeState(
        position=jnp.zeros((), jnp.int32),
        last=prompt[:, 0],
        tokens=jnp.zeros((rows, max_length), prompt.dtype),
        scores=jnp.zeros(rows, jnp.float32),
        ended=jnp.zeros(rows, jnp.bool_),
        cache=cache,
    )


def running(state: DecodeState) -> Bool[Array, ""]:
    """Whether another step is needed."""
    return (state.position < state.tokens.shape[1]) & ~jnp.all(state.ended)


def forced_tokens(prompt: Int[Array, "rows prompt_length"], max_length: int) -> Int[Array, "rows length"]:
    """The token forced at each position, 0 where the search is free.

    Raises:
      UserError: `max_length` leaves no room for a token, or not for the prompt.
    """
    width = prompt.shape[1] - 1
    if max_length < max(width, 1):
        raise UserError(
            f"max_length is {max_length}, but the prompt takes up to {width} tokens after the start token: "
            f"set max_length to {max(width, 1)} or more"
        )
    return jnp.pad(prompt[:, 1:], ((0, 0), (0, max_length - width)))


def force(logits: Float[Array, "rows vocab"], forced: Int[Array, " rows"]) -> Float[Array, "rows vocab"]:
    """Makes a forced token certain (0, all others -inf), so that every search takes it at no cost."""
    certain = jnp.where(jnp.arange(logits.shape[1])[None, :] == forced[:, None], 0.0, -jnp.inf)
    return jnp.where(forced[:, None] == 0, logits, certain)


def best(found: Decoded, count: int) -> Decoded:
    """The `count` highest scores, best first; among equals the first found."""
    scores, order = jax.lax.top_k(found.scores, count)
    return Decoded(jnp.take_along_axis(found.tokens, order[:, :, None], axis=1), scores)


def decode_rows(
    stepper: Stepper,
    cache: Cache,
    prompt: Int[Array, "rows prompt_length"],
    max_length: int,
    eos_id: int,
    choose: Choose,
) -> DecodeState:
    """Extends every row on its own by the token that `choose` picks, until all have ended.

    Only a chosen end token ends a row. A forced one does not: prompts may hold several sentences.
    """
    forced = forced_tokens(prompt, max_length)

    def extend(state: DecodeState) -> DecodeState:
        logits, cache = stepper.step(state.cache, state.last, state.position)
        forced_now = forced[:, state.position]
        logits = force(logits, forced_now)
        token = choose(logits, state.position).astype(prompt.dtype)
        gain = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        token = jnp.where(state.ended, 0, token)
        return DecodeState(
            position=state.position + 1,
            last=token,
            tokens=state.tokens.at[:, state.position].set(token),
            scores=state.scores + jnp.where(state.ended, 0.0, gain),
            ended=state.ended | ((token == eos_id) & (forced_now == 0)),
            cache=cache,
        )

    return jax.lax.while_loop(running, extend, start(cache, prompt, max_length))
