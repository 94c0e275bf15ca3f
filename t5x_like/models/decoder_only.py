"""Models that go on writing: GPT and everything shaped like it, prefix LMs too."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from t5x_like.architectures.stack import reorder_cache
from t5x_like.data.features import DecoderFeatures
from t5x_like.decoding.contract import Cache, Decoded, DecodeFn, Stepper
from t5x_like.models.network import NetworkModel
from t5x_like.typing import Array, Batch, Bool, Float, Int, Params, PRNGKey


@dataclasses.dataclass(frozen=True)
class DecoderOnlyModel(NetworkModel):
    """A decoder network with its loss and its decoding.

    Attributes:
      network: `Gpt` or another with its methods.
      z_loss: weight of logsumexp(logits)**2; decoder-only T5 uses 1e-4.
      label_smoothing: probability given away evenly to the wrong tokens.
      eos_id: ends an output.
      converter: lays out `inputs` and `targets`; also says whether inputs are to be predicted.
    """

    network_inputs: ClassVar[tuple[str, ...]] = (
        *("decoder_input_tokens", "decoder_segment_ids", "decoder_positions", "decoder_causal_attention"),
    )
    target_names: ClassVar[tuple[str, str]] = ("decoder_target_tokens", "decoder_loss_weights")

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    eos_id: int = 1
    converter: DecoderFeatures = DecoderFeatures()

    def regularisers(self) -> tuple[float, float]:
        """See `NetworkModel`."""
        return self.label_smoothing, self.z_loss

    def generate(
        self, params: Params, batch: Batch, decoder: DecodeFn, max_length: int, key: PRNGKey | None = None
    ) -> Decoded:
        """Continuations of at most `max_length` tokens of what `decoder_causal_attention` marks: the inputs.

        All inputs are moved to end at one column and are read at once; then the search writes column by column.
        """
        prompt, real = _end_together(
            jnp.asarray(batch["decoder_input_tokens"]), jnp.asarray(batch["decoder_causal_attention"]) > 0
        )
        rows, length = prompt.shape
        written = jnp.ones((rows, max_length - 1), jnp.bool_)  # the last token is never read
        cache = {"real": jnp.concatenate((real, written), 1), "prefix": jnp.concatenate((real, ~written), 1)}
        room = jnp.zeros(cache["real"].shape, jnp.int32)
        _, made = self.network.apply({"params": params}, room, method="make_cache", mutable=["cache"])

        def read(
            cache: Cache, tokens: Int[Array, "rows step_length"], column: Int[Array, ""]
        ) -> tuple[Float[Array, "rows vocab"], Cache]:
            logits, updated = self.network.apply(
                {"params": params, "cache": cache["network"]},
                tokens,
                column,
                cache["real"],
                cache["prefix"],
                method="decode_step",
                mutable=["cache"],
            )
            return logits[:, -1], cache | {"network": updated["cache"]}

        def step(
            cache: Cache, tokens: Int[Array, " rows"], position: Int[Array, ""]
        ) -> tuple[Float[Array, "rows vocab"], Cache]:
            return read(cache, tokens[:, None], length - 1 + position)

        # The last token is read here too, since a prefix LM's others see it; the search reads it once more.
        _, cache = read(cache | {"network": made["cache"]}, prompt, jnp.zeros((), jnp.int32))
        return decoder(Stepper(step, reorder_cache), cache, prompt[:, -1:], max_length, self.eos_id, key)


def _end_together(
    tokens: Int[Array, "rows length"], prefix: Bool[Array, "rows length"]
) -> tuple[Int[Array, "rows length"], Bool[Array, "rows length"]]:
    """The first tokens of each row, those of the prefix, moved to its end; and where there now are some."""
    length = tokens.shape[1]
    source = jnp.arange(length)[None] - (length - prefix.sum(axis=1, keepdims=True, dtype=jnp.int32))
    real = source >= 0
    return jnp.where(real, jnp.take_along_axis(tokens, jnp.maximum(source, 0), axis=1), 0), real
