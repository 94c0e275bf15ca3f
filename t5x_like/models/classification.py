"""Models that say what a text is, rather than write one: classes of texts or tokens, spans, choices."""

import dataclasses
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from t5x_like.data.features import ClassificationFeatures
from t5x_like.data.packing import FeatureConverter
from t5x_like.decoding.contract import Decoded, DecodeFn
from t5x_like.layers.moe import RouterReport
from t5x_like.models.network import NetworkModel
from t5x_like.typing import Array, Batch, Float, Int, Params, PRNGKey


class Decision(NamedTuple):
    """What was chosen for each example, and the log-probability of all of it."""

    labels: Int[Array, "batch targets"]
    score: Float[Array, " batch"]


@runtime_checkable
class Decide(Protocol):
    """From the log-probabilities of classes to one class for every target."""

    def __call__(self, log_probs: Float[Array, "batch targets classes"]) -> Decision:
        """Chooses."""
        ...


@dataclasses.dataclass(frozen=True)
class Likeliest:
    """For every target by itself the class that is most likely."""

    def __call__(self, log_probs: Float[Array, "batch targets classes"]) -> Decision:
        """See `Decide`."""
        return Decision(jnp.argmax(log_probs, axis=-1), log_probs.max(axis=-1).sum(axis=-1))


@dataclasses.dataclass(frozen=True)
class LikeliestSpan:
    """Of two targets, a span's start and end, the pair that is most likely with the end not before the start."""

    def __call__(self, log_probs: Float[Array, "batch targets classes"]) -> Decision:
        """See `Decide`."""
        pairs = log_probs[:, 0, :, None] + log_probs[:, 1, None, :]
        pairs = jnp.where(jnp.triu(jnp.ones(pairs.shape[1:], jnp.bool_))[None], pairs, -jnp.inf)
        flat = pairs.reshape(len(pairs), -1)
        start, end = jnp.divmod(jnp.argmax(flat, axis=-1), pairs.shape[1])
        return Decision(jnp.stack((start, end), axis=1), flat.max(axis=-1))


@dataclasses.dataclass(frozen=True)
class ClassificationModel(NetworkModel):
    """An encoder with a classifier's head; it generates labels where others generate tokens.

    Attributes:
      network: `Bert` with a `ClassificationHead`, a `TokenClassificationHead`, or a `SpanHead`.
      converter: lays out texts and labels; with `MultipleChoiceFeatures` texts are `[batch, choices, length]`, and each
        is read by itself by a `ClassificationHead` of one class.
      decide: how labels are chosen.
    """

    network_inputs: ClassVar[tuple[str, ...]] = ("encoder_input_tokens", "segment_ids", "global_attention_mask")

    converter: FeatureConverter = ClassificationFeatures()
    decide: Decide = Likeliest()

    def generate(
        self, params: Params, batch: Batch, decoder: DecodeFn, max_length: int, key: PRNGKey | None = None
    ) -> Decoded:
        """The labels that are chosen, one for every target or token; nothing is searched, and nothing is cut."""
        labels, score = self.decide(jax.nn.log_softmax(self.logits(params, batch)))
        return Decoded(labels[:, None], score[:, None])

    def outputs(
        self, params: Params, batch: Batch, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "batch targets classes"], dict[str, RouterReport]]:
        """See `NetworkModel`; choices, which are read one by one, are the classes."""
        tokens = batch["encoder_input_tokens"]
        logits, reports = super().outputs(params, batch, key)
        return logits.reshape(len(tokens), 1, tokens.shape[1]) if tokens.ndim == 3 else logits, reports

    def _arguments(self, batch: Batch) -> dict[str, Array]:
        arguments = super()._arguments(batch)
        return {name: array.reshape(-1, array.shape[-1]) for name, array in arguments.items()}
