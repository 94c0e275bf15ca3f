"""Models that predict tokens in a random order, each from those before it: XLNet."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from t5x_like.data.features import PermutationFeatures
from t5x_like.decoding.contract import Decoded, DecodeFn
from t5x_like.models.network import NetworkModel
from t5x_like.typing import Array, Batch, Bool, Int, Params, PRNGKey


@dataclasses.dataclass(frozen=True)
class PermutationLMModel(NetworkModel):
    """A two-stream network with the objective of Yang et al. 2019, equation 5.

    A batch has `input_tokens`; the order in which they are read, as `order` (see `hidden_by`) or as `perm_mask`; and
    what is to be predicted, as `target_positions` or as a `target_mapping` `[batch, targets, length]` with a single 1
    in each row. `perm_mask` and `target_mapping` mean what they do in Hugging Face's transformers.

    Attributes:
      network: `XLNet`.
      converter: lays out inputs, their order, and the true tokens at the target positions.
    """

    network_inputs: ClassVar[tuple[str, ...]] = ("input_tokens", "perm_mask", "target_positions", "segment_ids")

    converter: PermutationFeatures = PermutationFeatures()

    def generate(
        self, params: Params, batch: Batch, decoder: DecodeFn, max_length: int, key: PRNGKey | None = None
    ) -> Decoded:
        """What was left out, filled in: for every target the token that is most likely in the batch's order."""
        return self.likeliest(params, batch)

    def _arguments(self, batch: Batch) -> dict[str, Array]:
        arguments = super()._arguments(batch)
        if "order" in batch:
            arguments["perm_mask"] = hidden_by(jnp.asarray(batch["order"]))
        if "target_mapping" in batch:
            arguments["target_positions"] = jnp.argmax(jnp.asarray(batch["target_mapping"]), axis=-1)
        return arguments


def hidden_by(order: Int[Array, "batch length"]) -> Bool[Array, "batch length length"]:
    """The `perm_mask` of an order of factorisation: True where a token (row) may not see another (column).

    Args:
      order: each token's rank. All see those of rank 0, which are given; one to be predicted has a rank of its own,
        from 1, and is seen by higher ranks alone.
    """
    return (order[:, None, :] >= order[:, :, None]) & (order > 0)[:, None, :]
