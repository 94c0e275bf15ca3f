"""A network whose cache is nothing but what it was fed, and plain Python searches over it as oracles."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.decoding.contract import Decoded, DecodeFn, Stepper

EOS = 1


def _logsumexp(x: np.ndarray) -> float:
    return float(np.max(x) + np.log(np.sum(np.exp(x - np.max(x)))))


@dataclass(frozen=True)
class ToyNetwork:
    """Logits looked up by the example and by all tokens fed so far, as the cache recorded them.

    A cache whose rows are mixed up, or a token fed at the wrong position, gives other logits.
    `table` is `[examples, contexts, vocab]`.
    """

    table: np.ndarray
    max_length: int = 8

    @classmethod
    def random(cls, seed: int, examples: int = 3, vocab: int = 5, max_length: int = 8) -> "ToyNetwork":
        table = 2 * np.random.default_rng(seed).standard_normal((examples, 101, vocab))
        return cls(table.astype(np.float32), max_length)

    @property
    def _weights(self) -> np.ndarray:
        return 1 + 7 * np.arange(1, self.max_length + 1, dtype=np.int32) ** 2

    def _step(
        self, cache: dict[str, jax.Array], tokens: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        fed = cache["fed"].at[:, position].set(tokens + 1)
        context = (fed @ jnp.asarray(self._weights)) % self.table.shape[1]
        return jnp.asarray(self.table)[cache["example"], context], {"fed": fed, "example": cache["example"]}

    @property
    def stepper(self) -> Stepper:
        return Stepper(self._step, lambda cache, rows: jax.tree.map(lambda leaf: leaf[rows], cache))

    def cache(self, examples: list[int] | None = None) -> dict[str, jax.Array]:
        rows = jnp.arange(len(self.table)) if examples is None else jnp.asarray(examples)
        return {"fed": jnp.zeros((rows.size, self.max_length), jnp.int32), "example": rows}

    def decode(
        self,
        search: DecodeFn,
        prompt: list[list[int]],
        key: jax.Array | None = None,
        examples: list[int] | None = None,
    ) -> Decoded:
        return search(self.stepper, self.cache(examples), jnp.asarray(prompt, jnp.int32), self.max_length, EOS, key)

    def counted_stepper(self) -> tuple[Stepper, list[int]]:
        """The stepper, and a list in which it writes down the position of every step it takes."""
        positions: list[int] = []

        def step(
            cache: dict[str, jax.Array], tokens: jax.Array, position: jax.Array
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            jax.debug.callback(lambda at: positions.append(int(at)), position, ordered=True)
            return self._step(cache, tokens, position)

        return self.stepper._replace(step=step), positions

    def logits(self, example: int, fed: list[int]) -> np.ndarray:
        context = sum((token + 1) * weight for token, weight in zip(fed, self._weights.tolist(), strict=False))
        return self.table[example, context % self.table.shape[1]]

    def log_probs(self, example: int, fed: list[int]) -> np.ndarray:
        logits = self.logits(example, fed).astype(np.float64)
        return logits - _logsumexp(logits)

    def score(self, example: int, prompt: list[int], tokens: list[int]) -> float:
        """Log-probability of the tokens chosen; those from the first chosen end token on must be zeros."""
        total, fed = 0.0, prompt[:1]
        for position, token in enumerate(tokens):
            if forced_at(prompt, position):
                assert token == forced_at(prompt, position)
            else:
                total += self.log_probs(example, fed)[token]
                if token == EOS:
                    assert not any(tokens[position + 1 :])
                    break
            fed = [*fed, token]
        return total


def forced_at(prompt: list[int], position: int) -> int:
    return prompt[position + 1] if position + 1 < len(prompt) else 0


def naive_greedy(network: ToyNetwork, example: int, prompt: list[int]) -> list[int]:
    tokens: list[int] = []
    for position in range(network.max_length):
        token = forced_at(prompt, position)
        if not token:
            token = int(np.argmax(network.logits(example, prompt[:1] + tokens)))
            if token == EOS:
                tokens.append(token)
                break
        tokens.append(token)
    return tokens + [0] * (network.max_length - len(tokens))


Hypothesis = tuple[float, list[int]]


def wu_penalty(length: int, alpha: float) -> float:
    return ((5 + length) / 6) ** alpha


def naive_beam(network: ToyNetwork, example: int, prompt: list[int], num_beams: int, alpha: float) -> list[Hypothesis]:
    """Beam search in lists, which never stops before `max_length`: the best ended ones, best first."""
    live: list[Hypothesis] = [(0.0, [])]
    finished: list[Hypothesis] = []
    length = 0  # chosen tokens
    for position in range(network.max_length):
        forced = forced_at(prompt, position)
        candidates: list[Hypothesis] = []
        for total, tokens in live:
            if forced:
                candidates.append((total, [*tokens, forced]))
                continue
            log_probs = network.log_probs(example, prompt[:1] + tokens)
            candidates += [(total + log_prob, [*tokens, token]) for token, log_prob in enumerate(log_probs)]
        length += not forced
        candidates = sorted(candidates, key=lambda found: -found[0])[: 2 * num_beams]
        last_step = position + 1 == network.max_length
        ended = [c for c in candidates if last_step or (not forced and c[1][-1] == EOS)]
        finished += [(total / wu_penalty(length, alpha), tokens) for total, tokens in ended]
        live = [c for c in candidates if c not in ended][:num_beams]
    return sorted(finished, key=lambda found: -found[0])[:num_beams]


def every_hypothesis(network: ToyNetwork, example: int, alpha: float) -> list[Hypothesis]:
    """All token sequences that end, or reach `max_length`, after start token 0; best first."""
    found: list[Hypothesis] = []

    def grow(total: float, tokens: list[int]) -> None:
        if tokens and (tokens[-1] == EOS or len(tokens) == network.max_length):
            found.append((total / wu_penalty(len(tokens), alpha), tokens))
            return
        for token, log_prob in enumerate(network.log_probs(example, [0, *tokens])):
            grow(total + log_prob, [*tokens, token])

    grow(0.0, [])
    return sorted(found, key=lambda hypothesis: -hypothesis[0])
