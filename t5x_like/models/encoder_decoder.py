"""Models that read one sequence and write another: T5 and everything shaped like it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from t5x_like.architectures.stack import reorder_cache
from t5x_like.architectures.variables import logical_axes, router_reports, unbox
from t5x_like.data.packing import EncoderDecoderFeatures
from t5x_like.decoding.contract import Cache, Decoded, DecodeFn, Stepper
from t5x_like.layers.moe import REPORTS, RouterReport
from t5x_like.models.contract import LossAndMetrics, WeightedSum
from t5x_like.models.losses import cross_entropy
from t5x_like.models.routing_metrics import auxiliary_loss, routing_metrics
from t5x_like.typing import Array, Batch, Float, Int, Params, PRNGKey, PyTree


@runtime_checkable
class EncoderDecoderNetwork(Protocol):
    """What the model calls by name: see `architectures.t5.T5`."""

    @property
    def init(self) -> Callable[..., Mapping[str, PyTree]]:
        """As of any Linen module."""
        ...

    @property
    def apply(self) -> Callable[..., PyTree]:
        """As of any Linen module."""
        ...


@dataclasses.dataclass(frozen=True)
class EncoderDecoderModel:
    """An encoder-decoder network with its loss and its decoding.

    Attributes:
      network: `T5` or another with its methods `encode`, `make_cache` and `decode_step`.
      z_loss: weight of logsumexp(logits)**2, which keeps logits from drifting (T5 uses 1e-4).
      label_smoothing: probability given away evenly to the wrong tokens.
      eos_id: ends an output.
      start_id: is fed before the first token of an output.
    """

    network: EncoderDecoderNetwork
    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    eos_id: int = 1
    start_id: int = 0

    def init(self, key: PRNGKey, batch: Batch) -> Params:
        """Fresh parameters; the values of `batch` do not matter, and nor does its size."""
        return unbox(self._variables(key, batch))

    def logical_axes(self, batch: Batch) -> PyTree:
        """Tuples of axis names in a tree like the parameters'."""
        return logical_axes(jax.eval_shape(lambda: self._variables(jax.random.key(0), batch)))

    def _variables(self, key: PRNGKey, batch: Batch) -> PyTree:
        inputs, outputs = batch["encoder_input_tokens"], batch["decoder_input_tokens"]
        return self.network.init(key, jnp.zeros_like(inputs), jnp.zeros_like(outputs))["params"]

    def logits(self, params: Params, batch: Batch, key: PRNGKey | None = None) -> Float[Array, "batch length vocab"]:
        """Float32 logits of every next token, given the true ones before it."""
        return self.forward(params, batch, key)[0]

    def forward(
        self, params: Params, batch: Batch, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "batch length vocab"], dict[str, RouterReport]]:
        """Logits, and what sparse layers report."""
        logits, variables = self.network.apply(
            {"params": params},
            jnp.asarray(batch["encoder_input_tokens"]),
            jnp.asarray(batch["decoder_input_tokens"]),
            batch.get("encoder_segment_ids"),
            batch.get("decoder_segment_ids"),
            rngs=None if key is None else {"dropout": key},
            mutable=[REPORTS],
        )
        return logits, router_reports(variables, params)

    def loss(self, params: Params, batch: Batch, key: PRNGKey | None = None) -> LossAndMetrics:
        """Cross entropy with z-loss and smoothing, auxiliary losses, and what is worth watching beside them."""
        return self.loss_of(*self.forward(params, batch, key), batch)

    def loss_of(
        self, logits: Float[Array, "batch length vocab"], reports: Mapping[str, RouterReport], batch: Batch
    ) -> LossAndMetrics:
        """`loss` from what `forward` returned."""
        targets = jnp.asarray(batch["decoder_target_tokens"])
        weights = jnp.asarray(batch["decoder_loss_weights"], jnp.float32)
        tokens = cross_entropy(logits, targets, self.label_smoothing, self.z_loss)
        correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
        count = weights.sum()

        def weighted(values: Float[Array, "batch length"]) -> WeightedSum:
            return WeightedSum((values * weights).sum(), count)

        metrics = {"accuracy": weighted(correct), "z_loss": weighted(tokens.z_loss)} | routing_metrics(reports)
        loss = weighted(tokens.loss)
        return LossAndMetrics(loss._replace(total=loss.total + count * auxiliary_loss(reports)), metrics)

    def score(self, params: Params, batch: Batch) -> Float[Array, " batch"]:
        """Log-likelihood of the targets, end token included, in nats."""
        tokens = cross_entropy(self.logits(params, batch), jnp.asarray(batch["decoder_target_tokens"]))
        return -(tokens.loss * jnp.asarray(batch["decoder_loss_weights"], jnp.float32)).sum(axis=-1)

    def generate(
        self, params: Params, batch: Batch, decoder: DecodeFn, max_length: int, key: PRNGKey | None = None
    ) -> Decoded:
        """Outputs of at most `max_length` tokens for `encoder_input_tokens`, with a cache of keys and values."""
        inputs = jnp.asarray(batch["encoder_input_tokens"])
        variables = {"params": params}
        encoded = self.network.apply(variables, inputs, method="encode")
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
                cache["is_real"],
                method="decode_step",
                mutable=["cache"],
            )
            return logits[:, 0], {"network": updated["cache"], "is_real": cache["is_real"]}

        start = jnp.full((inputs.shape[0], 1), self.start_id, jnp.int32)
        cache = {"network": made["cache"], "is_real": is_real}
        return decoder(Stepper(step, reorder_cache), cache, start, max_length, self.eos_id, key)

    @property
    def converter(self) -> EncoderDecoderFeatures:
        """Examples with `inputs` and `targets` -> batches."""
        return EncoderDecoderFeatures()
