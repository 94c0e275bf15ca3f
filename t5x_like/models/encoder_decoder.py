"""Models that read one sequence and write another: T5 and everything shaped like it."""

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp

from t5x_like.architectures.stack import reorder_beams
from t5x_like.data.packing import EncoderDecoderFeatures
from t5x_like.decoding.contract import Cache, Decoded, DecodeFn, Stepper
from t5x_like.models.network import Network, NetworkModel
from t5x_like.typing import Array, Batch, Float, Int, Params, PRNGKey


@runtime_checkable
class EncoderDecoderNetwork(Network, Protocol):
    """`Transformer`, or another with its methods."""

    @property
    def pad_id(self) -> int:
        """What fills rows, and is never attended to."""
        ...


@dataclasses.dataclass(frozen=True)
class EncoderDecoderModel(NetworkModel):
    """An encoder-decoder network with its loss and its decoding.

    Attributes:
      network: `T5` or another with the methods of `Transformer`.
      z_loss: weight of logsumexp(logits)**2, which keeps logits from drifting (T5 uses 1e-4).
      label_smoothing: probability given away evenly to the wrong tokens.
      eos_id: ends an output.
      start_id: is fed before the first token of an output.
    """

    network_inputs: ClassVar[tuple[str, ...]] = (
        *("encoder_input_tokens", "decoder_input_tokens", "encoder_segment_ids", "decoder_segment_ids"),
        *("encoder_positions", "decoder_positions", "global_attention_mask"),
    )
    target_names: ClassVar[tuple[str, str]] = ("decoder_target_tokens", "decoder_loss_weights")

    network: EncoderDecoderNetwork
    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    eos_id: int = 1
    start_id: int = 0

    def regularisers(self) -> tuple[float, float]:
        """See `NetworkModel`."""
        return self.label_smoothing, self.z_loss

    def generate(
        self, params: Params, batch: Batch, decoder: DecodeFn, max_length: int, key: PRNGKey | None = None
    ) -> Decoded:
        """Outputs of at most `max_length` tokens for `encoder_input_tokens`, with a cache of keys and values."""
        inputs = jnp.asarray(batch["encoder_input_tokens"])
        variables = {"params": params}
        seeing = batch.get("global_attention_mask")
        encoded = self.network.apply(variables, inputs, global_attention_mask=seeing, method="encode")
        room = jnp.zeros((inputs.shape[0], max_length), jnp.int32)
        _, made = self.network.apply(variables, encoded, room, method="make_cache", mutable=["cache"])
        is_real = self.network.apply(variables, inputs, method="is_real")

        def step(
            cache: Cache, tokens: Int[Array, " rows"], position: Int[Array, ""]
        ) -> tuple[Float[Array, "rows vocab"], Cache]:
            logits, updated = self.network.apply(
                {"params": params, "cache": cache["network"]},
                tokens[:, None],
                position,
                max_length,
                cache["context_is_real"],
                method="decode_step",
                mutable=["cache"],
            )
            return logits[:, 0], {"network": updated["cache"], "context_is_real": cache["context_is_real"]}

        start = jnp.full((inputs.shape[0], 1), self.start_id, jnp.int32)
        cache = {"network": made["cache"], "context_is_real": is_real}
        return decoder(Stepper(step, reorder_beams), cache, start, max_length, self.eos_id, key)

    @property
    def converter(self) -> EncoderDecoderFeatures:
        """Examples with `inputs` and `targets` -> batches."""
        return EncoderDecoderFeatures(self.network.pad_id, self.start_id)
