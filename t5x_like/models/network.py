"""What every model does with its network: parameters, logits, losses and scores out of it and a batch."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from t5x_like.architectures.variables import logical_axes, router_reports, unbox
from t5x_like.decoding.contract import Decoded
from t5x_like.layers.logits import values_of
from t5x_like.layers.moe import REPORTS, RouterReport
from t5x_like.models.contract import LossAndMetrics
from t5x_like.models.losses import log_likelihood, loss_and_metrics
from t5x_like.models.routing_metrics import with_routing
from t5x_like.sharding import Partitioner, active_partitioner
from t5x_like.typing import Array, Batch, Float, Int, Params, PRNGKey, PyTree


@runtime_checkable
class Network(Protocol):
    """A Linen module from `architectures`."""

    @property
    def init(self) -> Callable[..., Mapping[str, PyTree]]:
        """As of any Linen module."""
        ...

    @property
    def apply(self) -> Callable[..., PyTree]:
        """As of any Linen module."""
        ...


@dataclasses.dataclass(frozen=True)
class NetworkModel:
    """The base of models; a network that puts out logits needs no more.

    Attributes:
      network: its `outputs` takes arrays of the batch under their own names, those in `network_inputs`; `__call__` does
        too, and gives the same with logits multiplied out.
    """

    network_inputs: ClassVar[tuple[str, ...]]
    target_names: ClassVar[tuple[str, str]] = ("target_tokens", "target_weights")

    network: Network

    def init(self, key: PRNGKey, batch: Batch) -> Params:
        """Fresh parameters; the values of `batch` do not matter, and nor does its size."""
        return unbox(self._variables(key, batch))

    def logical_axes(self, batch: Batch) -> PyTree:
        """Tuples of axis names in a tree like the parameters'."""
        return logical_axes(jax.eval_shape(lambda: self._variables(jax.random.key(0), batch)))

    def outputs(
        self, params: Params, batch: Batch, key: PRNGKey | None = None
    ) -> tuple[PyTree, dict[str, RouterReport]]:
        """The network's `outputs`, and what its sparse layers report; `key` turns dropout on."""
        outputs, variables = self.network.apply(
            {"params": params},
            **self._arguments(batch),
            rngs=None if key is None else {"dropout": key},
            mutable=[REPORTS],
            method="outputs",
        )
        return outputs, router_reports(variables, params)

    def forward(
        self, params: Params, batch: Batch, key: PRNGKey | None = None
    ) -> tuple[PyTree[Array], dict[str, RouterReport]]:
        """`outputs` with logits multiplied out."""
        outputs, reports = self.outputs(params, batch, key)
        return values_of(outputs), reports

    def logits(self, params: Params, batch: Batch, key: PRNGKey | None = None) -> Float[Array, "batch targets classes"]:
        """Float32 logits, for every target: of tokens, given the true ones before, or of classes."""
        return self.forward(params, batch, key)[0]

    def loss(self, params: Params, batch: Batch, key: PRNGKey | None = None) -> LossAndMetrics:
        """Cross entropy of the targets that have a weight, auxiliary losses, and what is worth watching beside them."""
        return self.loss_of(*self.outputs(params, batch, key), batch)

    def loss_of(self, outputs: PyTree, reports: Mapping[str, RouterReport], batch: Batch) -> LossAndMetrics:
        """`loss` from what `outputs` or `forward` returned."""
        return with_routing(loss_and_metrics(outputs, *self.targets(batch), *self.regularisers()), reports)

    def score(self, params: Params, batch: Batch) -> Float[Array, " batch"]:
        """Log-likelihood of each example's targets, an end token included where there is one, in nats."""
        return log_likelihood(self.logits(params, batch), *self.targets(batch))

    def likeliest(self, params: Params, batch: Batch) -> Decoded:
        """For every target by itself the token that is most likely, and their log-probability together."""
        log_probs, weights = jax.nn.log_softmax(self.logits(params, batch)), self.targets(batch)[1]
        tokens = jnp.where(weights > 0, jnp.argmax(log_probs, axis=-1), 0)
        return Decoded(tokens[:, None], jnp.where(weights > 0, log_probs.max(axis=-1), 0.0).sum(axis=-1)[:, None])

    def targets(self, batch: Batch) -> tuple[Int[Array, "batch targets"], Int[Array, "batch targets"]]:
        """What is to be predicted, and which of it counts."""
        tokens, weights = (jnp.asarray(batch[name]) for name in self.target_names)
        return tokens, weights

    def regularisers(self) -> tuple[float, float]:
        """The shares of label smoothing and z-loss."""
        return 0.0, 0.0

    def _arguments(self, batch: Batch) -> dict[str, Array]:
        return {name: jnp.asarray(batch[name]) for name in self.network_inputs if name in batch}

    def _variables(self, key: PRNGKey, batch: Batch) -> PyTree:
        arguments = {name: jnp.zeros_like(array) for name, array in self._arguments(batch).items()}
        return _initialised(self.network, active_partitioner(), key, arguments)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)  # a big model takes a second to trace: once
def _initialised(network: Network, _: Partitioner | None, key: PRNGKey, arguments: dict[str, Array]) -> PyTree:
    return network.init(key, **arguments)["params"]
