"""Checks of what a model says of a text: alone or packed with others, all at once or token by token."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.data.packing import Row
from t5x_like.decoding.contract import Cache, Decoded, Stepper
from t5x_like.models.contract import Model
from t5x_like.typing import Array, Batch, Int, Params, PRNGKey
from t5x_like.verification.compare import compare, said, same_bits
from t5x_like.verification.equivalences import EQUAL, Findings
from t5x_like.verification.subject import Named, NotApplicable, Subject


def packing(subject: Subject) -> Findings:
    """Examples that share rows against the same examples in rows of their own: the log-probability of every target."""
    rows = _packed_rows(subject)
    together = _by_example(subject, rows)
    alone: list[Row] = [[example] for row in rows for example in row]
    batch = subject.source.batch(alone, packed=False)
    log_probs = subject.log_probs(subject.roomy, batch)
    real = np.asarray(batch["decoder_target_tokens"]) > 0
    apart = {name: log_probs[i][real[i]] for i, name in enumerate(together)}
    yield "", compare(together, apart, EQUAL, _largest(apart))


def leak(subject: Subject) -> Findings:
    """Other tokens in the first example of every row: what is said of the others there must not change."""
    rows = _packed_rows(subject)
    rng = np.random.default_rng(subject.seed + 1)

    def other(row: Row) -> Row:
        sizes = {name: len(row[0][name]) for name in subject.lengths}
        return [subject.source.example(rng, sizes), *row[1:]]

    before = _by_example(subject, rows)
    after = _by_example(subject, [other(row) if len(row) > 1 else row for row in rows])
    changed = [name for name in before if name.endswith("example 1") and not np.array_equal(before[name], after[name])]
    if not changed:
        yield "", said(False, "no log-probability depends on the tokens")
        return
    neighbours = [name for name in before if not name.endswith("example 1")]
    expected, found = ({name: tree[name] for name in neighbours} for tree in (before, after))
    yield "", same_bits(found, expected)


def decoding(subject: Subject) -> Findings:
    """The log-probability of every target from a decoding cache, token by token, against all at once."""
    model, source = subject.roomy, subject.source
    batch = {name: np.asarray(x) for name, x in source.batch(source.rows(packed=False), packed=False).items()}
    if "decoder_target_tokens" not in batch:
        raise NotApplicable("nothing is decoded token by token")
    given = np.zeros(len(batch["decoder_target_tokens"]), np.int64)  # tokens of a prompt, which are read at once
    if "decoder_causal_attention" in batch:
        given = np.maximum(batch["decoder_causal_attention"].sum(axis=1) - 1, 0)
    columns = given[:, None] + np.arange(batch["decoder_target_tokens"].shape[1])[None]
    targets = _at(batch["decoder_target_tokens"], columns)
    found = subject.call(_cached_log_probs, model, subject.params_of(model, batch), batch, targets)
    real = (_at(batch["decoder_loss_weights"], columns) > 0) & (targets > 0)
    expected = {"log-probability": np.where(real, _at(subject.log_probs(model, batch), columns), 0.0)}
    yield "", compare({"log-probability": np.where(real, found, 0.0)}, expected, EQUAL)


@dataclasses.dataclass(frozen=True)
class _Dictated:
    """A `DecodeFn` that feeds given tokens and reports the log-probability of each, in place of a score.

    Attributes:
      targets: `[rows, length]`.
    """

    targets: Int[Array, "rows length"]

    def __call__(
        self,
        stepper: Stepper,
        cache: Cache,
        prompt: Int[Array, "rows prompt_length"],
        max_length: int,
        eos_id: int,
        key: PRNGKey | None = None,
    ) -> Decoded:
        """See `DecodeFn`."""

        def step(carry: tuple[Cache, Array], inputs: tuple[Array, Array]) -> tuple[tuple[Cache, Array], Array]:
            (cache, last), (position, token) = carry, inputs
            logits, cache = stepper.step(cache, last, position)
            log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)
            return (cache, token), log_probs[:, 0]

        positions = jnp.arange(max_length)
        _, log_probs = jax.lax.scan(step, (cache, prompt[:, 0]), (positions, self.targets.T))
        return Decoded(self.targets[:, None], log_probs.T)


def _cached_log_probs(model: Model, params: Params, batch: Batch, targets: Array) -> Array:
    return model.generate(params, batch, _Dictated(targets), targets.shape[1]).scores


def _packed_rows(subject: Subject) -> list[Row]:
    if not subject.source.packs:
        raise NotApplicable("a row holds one example")
    return subject.source.rows(packed=True)


def _by_example(subject: Subject, rows: Sequence[Row]) -> Named:
    """The log-probabilities of every example's targets in packed rows."""
    batch = subject.source.batch(rows, packed=True)
    log_probs, segments = subject.log_probs(subject.roomy, batch), np.asarray(batch["decoder_segment_ids"])
    return {
        f"log-probability in row {r} of example {s}": log_probs[r][segments[r] == s]
        for r, row in enumerate(rows)
        for s in range(1, len(row) + 1)
    }


def _at(x: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """`x[row, columns[row]]`, and 0 beyond its end."""
    inside = columns < x.shape[1]
    return np.where(inside, np.take_along_axis(x, np.minimum(columns, x.shape[1] - 1), axis=1), 0).astype(x.dtype)


def _largest(tree: Named) -> float:
    return max(float(np.abs(x).max(initial=0.0)) for x in tree.values())
