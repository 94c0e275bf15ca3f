"""One training step as a pure function, and as one compiled program over the mesh."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_like.models.contract import LossAndMetrics, Model
from t5x_like.sharding import Partitioner, constrain
from t5x_like.training.optimizers import learning_rate_of
from t5x_like.training.train_state import TrainState
from t5x_like.typing import Array, Batch, Bool, Float, Params, PRNGKey, PyTree, Scalar


class StepReport(NamedTuple):
    """What a step says of itself, on device.

    Attributes:
      scalars: means over real target tokens, norms, learning rate (float32).
      vectors: metrics with more than one value, such as the load of every expert.
      tokens: target tokens with a weight.
      finite: False where loss or gradient was not; then the update was left out.
    """

    scalars: dict[str, Scalar]
    vectors: dict[str, Float[Array, " _"]]
    tokens: Scalar
    finite: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """`(state, batch) -> (state, report)`.

    The loss is summed over the batch and divided once by the number of real target tokens, so that microbatches, packed
    rows and shards weigh every token alike. A step with a non-finite loss or gradient leaves parameters and optimiser
    bit-identical.

    Attributes:
      model: gives the loss.
      optimizer: gives the update.
      seed: dropout keys are `fold_in(seed, step)`.
      microbatches: parts of the batch, one after another, whose gradients are summed before the update.
    """

    model: Model
    optimizer: optax.GradientTransformation
    seed: int = 0
    microbatches: int = 1

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
        """One update; pure."""
        key = step_key(self.seed, state.step)
        sums, gradients = self._sums(state.params, batch, key)
        weight = sums.loss.weight.clip(1.0)
        gradients = jax.tree.map(lambda g: g / weight, gradients)
        loss, norm = sums.loss.mean(), optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        kept = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        means = {name: metric.mean() for name, metric in sums.metrics.items()}
        vectors = {name: mean for name, mean in means.items() if mean.ndim}
        scalars = {"loss": loss, **{name: mean for name, mean in means.items() if not mean.ndim}}
        scalars |= {"gradient_norm": norm, "parameter_norm": optax.tree.norm(kept[0])}
        rate = learning_rate_of(opt_state)
        if rate is not None:
            scalars["learning_rate"] = rate
        return TrainState(state.step + 1, *kept), StepReport(scalars, vectors, sums.loss.weight, finite)

    def _sums(self, params: Params, batch: Batch, key: PRNGKey) -> tuple[LossAndMetrics, Params]:
        """Loss and metrics summed over the batch, and the gradient of the summed loss."""

        def total(params: Params, part: Batch, key: PRNGKey) -> tuple[Scalar, LossAndMetrics]:
            sums = self.model.loss(params, part, key)
            return sums.loss.total, sums

        def one(part: Batch, key: PRNGKey) -> tuple[LossAndMetrics, Params]:
            (_, sums), gradients = jax.value_and_grad(total, has_aux=True)(params, part, key)
            return sums, gradients

        if self.microbatches == 1:
            return one(batch, key)

        def add(carry: PyTree, part: tuple[Batch, PRNGKey]) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, carry, one(*part)), None

        parts = (jax.tree.map(self._split, dict(batch)), jax.random.split(key, self.microbatches))
        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts[0]), key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(add, zeros, parts)[0]

    def _split(self, x: Array) -> Array:
        """`[batch, ...]` -> `[microbatches, batch / microbatches, ...]`, every device keeping its own rows."""
        parts = x.reshape(x.shape[0] // self.microbatches, self.microbatches, *x.shape[1:]).swapaxes(0, 1)
        return constrain(parts, None, "batch", *(None,) * (x.ndim - 1))

    def compiled(
        self, partitioner: Partitioner, shardings: TrainState
    ) -> Callable[[TrainState, Batch], tuple[TrainState, StepReport]]:
        """The step as one program over the mesh; the old state's memory is donated to the new one."""
        step = self._program(partitioner, shardings)

        def run(state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
            with partitioner.active():
                return step(state, batch)

        return run

    def lowered(
        self, partitioner: Partitioner, shardings: TrainState, state: TrainState, batch: Batch
    ) -> jax.stages.Lowered:
        """The same program before it is compiled, from arrays or shapes: for whoever asks what memory it takes."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)  # of a batch of all processes
        with partitioner.active():
            return self._program(partitioner, shardings).lower(state, shapes)

    def _program(self, partitioner: Partitioner, shardings: TrainState) -> jax.stages.Wrapped:
        return jax.jit(
            self.__call__,
            in_shardings=(shardings, partitioner.sharding("batch")),
            out_shardings=(shardings, partitioner.sharding()),
            donate_argnums=0,
        )


def step_key(seed: int, step: Array | int) -> PRNGKey:
    """The key of a step: with (seed, step) any step can be replayed alone."""
    return jax.random.fold_in(jax.random.key(seed), step)
