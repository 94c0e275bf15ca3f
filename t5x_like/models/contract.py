"""The one contract between networks and whoever trains, evaluates or exports them."""

from typing import NamedTuple, Protocol, runtime_checkable

from t5x_like.data.packing import FeatureConverter
from t5x_like.decoding.contract import Decoded, DecodeFn
from t5x_like.typing import Array, Batch, Float, Params, PRNGKey, PyTree, Scalar


class WeightedSum(NamedTuple):
    """A mean that is not yet divided, so that shards, microbatches and steps add up exactly."""

    total: Float[Array, "*shape"]
    weight: Scalar

    def mean(self) -> Float[Array, "*shape"]:
        """`total / weight`, and 0 where there is no weight."""
        return self.total / self.weight.clip(1e-9)


class LossAndMetrics(NamedTuple):
    """What one batch says.

    Attributes:
      loss: what training minimises, summed over target tokens, and how many there were.
      metrics: what is logged beside it; most are scalars.
    """

    loss: WeightedSum
    metrics: dict[str, WeightedSum]


@runtime_checkable
class Model(Protocol):
    """All that trainer, evaluator and exporter know of a network: pure functions of parameters and a batch."""

    def init(self, key: PRNGKey, batch: Batch) -> Params:
        """Fresh parameters; also under `jax.eval_shape`."""
        ...

    def logical_axes(self, batch: Batch) -> PyTree:
        """The names of every parameter's dimensions, in a tree like `init`'s."""
        ...

    def logits(self, params: Params, batch: Batch, key: PRNGKey | None = None) -> Float[Array, "batch length vocab"]:
        """Float32 logits under teacher forcing; `key` turns dropout on."""
        ...

    def loss(self, params: Params, batch: Batch, key: PRNGKey | None = None) -> LossAndMetrics:
        """Sums and weights over the batch, never means; `key` turns dropout on."""
        ...

    def score(self, params: Params, batch: Batch) -> Float[Array, " batch"]:
        """Log-likelihood of each example's targets, in nats, summed over tokens."""
        ...

    def generate(
        self, params: Params, batch: Batch, decoder: DecodeFn, max_length: int, key: PRNGKey | None = None
    ) -> Decoded:
        """Outputs for each example, best first."""
        ...

    @property
    def converter(self) -> FeatureConverter:
        """What turns examples into this model's batches."""
        ...
