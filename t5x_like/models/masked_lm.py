"""Models that fill in what was masked: BERT, RoBERTa, Longformer."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from t5x_like.architectures.heads import MaskedLogits
from t5x_like.data.features import MaskedLMFeatures
from t5x_like.decoding.contract import Decoded, DecodeFn
from t5x_like.errors import UserError
from t5x_like.layers.moe import RouterReport
from t5x_like.models.contract import LossAndMetrics
from t5x_like.models.losses import log_likelihood, loss_and_metrics
from t5x_like.models.network import NetworkModel
from t5x_like.typing import Array, Batch, Float, Int, Params, PRNGKey


@dataclasses.dataclass(frozen=True)
class MaskedLMModel(NetworkModel):
    """An encoder with a language model's head.

    Attributes:
      network: `Bert` with a `MaskedLanguageModelHead`.
      mask_id: stands for a token that is to be guessed, when texts are scored; None where that is not known.
      converter: lays out corrupted inputs, and the true tokens at the target positions.
    """

    network_inputs: ClassVar[tuple[str, ...]] = (
        *("encoder_input_tokens", "segment_ids", "global_attention_mask", "target_positions"),
    )

    mask_id: int | None
    converter: MaskedLMFeatures = MaskedLMFeatures()

    def logits(self, params: Params, batch: Batch, key: PRNGKey | None = None) -> Float[Array, "batch targets vocab"]:
        """Float32 logits of the token at every target position; everywhere, if the batch has no `target_positions`."""
        return self.forward(params, batch, key)[0].tokens

    def loss_of(self, outputs: MaskedLogits, reports: Mapping[str, RouterReport], batch: Batch) -> LossAndMetrics:
        """Cross entropy of the masked tokens; with next sentences, the sum of both means (Devlin et al. 2019, A.2)."""
        sums = super().loss_of(outputs.tokens, reports, batch)
        if outputs.next_sentence is None or "next_sentence_labels" not in batch:
            return sums
        labels, real = jnp.asarray(batch["next_sentence_labels"]), self.targets(batch)[1].any(axis=1, keepdims=True)
        follows = loss_and_metrics(outputs.next_sentence, labels, real)
        metrics = {"next_sentence_loss": follows.loss, "next_sentence_accuracy": follows.metrics["accuracy"]}
        total = sums.loss.total + sums.loss.weight * follows.loss.mean()
        return LossAndMetrics(sums.loss._replace(total=total), sums.metrics | {"masked_lm_loss": sums.loss} | metrics)

    def score(self, params: Params, batch: Batch) -> Float[Array, " batch"]:
        """Pseudo-log-likelihood of the targets (Salazar et al. 2020), in nats: each is masked alone, in the true text.

        One pass of the network per target, so a text of which all tokens are targets costs its length in passes.

        Raises:
          UserError: `mask_id` is not known.
        """
        if self.mask_id is None:
            raise UserError("MaskedLMModel.mask_id is None: tokens are scored masked; set it to the id that masks them")
        mask_id = self.mask_id
        text, positions = jnp.asarray(batch["encoder_input_tokens"]), jnp.asarray(batch["target_positions"])
        targets, weights = self.targets(batch)
        columns = jnp.arange(text.shape[1])[None]
        rows = jnp.arange(len(text))[:, None]
        places = jnp.where(weights > 0, positions, text.shape[1])  # none of the text, where there is no target
        text = text.at[rows, places].set(targets, mode="drop")

        def one(target: tuple[Int[Array, " batch"], ...]) -> Float[Array, " batch"]:
            position, token, weight = target
            masked = jnp.where(columns == position[:, None], mask_id, text)
            inputs = {**batch, "encoder_input_tokens": masked, "target_positions": position[:, None]}
            return log_likelihood(self.logits(params, inputs), token[:, None], weight[:, None])

        return jax.lax.map(one, (positions.T, targets.T, weights.T)).sum(axis=0)

    def generate(
        self, params: Params, batch: Batch, decoder: DecodeFn, max_length: int, key: PRNGKey | None = None
    ) -> Decoded:
        """What was masked, filled in: for every target the token that is most likely; nothing is searched."""
        return self.likeliest(params, batch)
