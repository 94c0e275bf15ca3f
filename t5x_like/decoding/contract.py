"""The one contract between networks and searches: a cached step, a way to reorder rows, and what comes out."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from t5x_like.typing import Array, Float, Int, PRNGKey, PyTree, Shaped

Cache: TypeAlias = PyTree[Shaped[Array, "..."]]
"""Keys and values already computed; opaque to a search, which only steps it and reorders its rows."""


class Stepper(NamedTuple):
    """What a search needs of a network.

    Attributes:
      step: `(cache, tokens [rows], position []) -> (logits [rows, vocab], cache)`: feeds the token at `position`
        (0 is the start token) of every row and returns the logits of the token at `position + 1`.
      reorder: `(cache, rows [new_rows]) -> cache` whose row `i` is the old row `rows[i]`; may grow or shrink the batch,
        if every example has equally many rows, side by side in the order of examples, before and after.
    """

    step: Callable[[Cache, Int[Array, " rows"], Int[Array, ""]], tuple[Float[Array, "rows vocab"], Cache]]
    reorder: Callable[[Cache, Int[Array, " new_rows"]], Cache]


class Decoded(NamedTuple):
    """Sequences found, best first.

    Attributes:
      tokens: what follows the start token, forced prompt tokens and the end token included, 0 after the end token.
      scores: log-probability of the tokens chosen (prompt tokens cost nothing); beam search divides by its penalty.
    """

    tokens: Int[Array, "batch samples length"]
    scores: Float[Array, "batch samples"]


@runtime_checkable
class DecodeFn(Protocol):
    """A search: greedy, sampling, beam. Objects, not flags; jit-compatible (all loops are `jax.lax`)."""

    def __call__(
        self,
        stepper: Stepper,
        cache: Cache,
        prompt: Int[Array, "batch prompt_length"],
        max_length: int,
        eos_id: int,
        key: PRNGKey | None = None,
    ) -> Decoded:
        """Searches from `prompt`, whose first column is the start token and whose further non-zero entries are forced.

        Args:
          stepper: the network.
          cache: its state before the first token, one row per example.
          prompt: start token, then tokens to be forced (0: free), so `prompt_length` is 1 where nothing is forced.
          max_length: tokens to produce at most (static), forced ones and the end token included.
          eos_id: ends a sequence.
          key: randomness; greedy and beam search need none.

        Returns:
          `Decoded` with `length == max_length`.
        """
        ...
