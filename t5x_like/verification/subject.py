"""What is verified: a small model with random parameters and a batch, and the programs that several checks share."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from t5x_like.architectures.stack import LayerStack
from t5x_like.architectures.variables import named_leaves
from t5x_like.data.loader import host_to_devices
from t5x_like.layers.routing import FixedCapacity
from t5x_like.models.contract import Model
from t5x_like.sharding import Partitioner, ShardingRules
from t5x_like.training import train_state
from t5x_like.training.drawing import drawn
from t5x_like.training.step import StepReport, TrainStep
from t5x_like.training.train_state import TrainState
from t5x_like.typing import Array, Batch, Params, PyTree
from t5x_like.verification.batches import Source
from t5x_like.verification.changes import Field, changed, with_values
from t5x_like.verification.layouts import laid_out, looped

QUICKLY: dict[str, bool | str] = {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": False}
"""Small programs compile for longer than they compute."""

DROPOUT = 0.1
MOST_DEVICES = 8

Named = Mapping[str, np.ndarray]
"""Arrays by name."""


class NotApplicable(Exception):
    """Raised by a check that says nothing about a model; the message says why."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A small model, and what it is trained with.

    Attributes:
      model: small, in float32.
      lengths: of its features.
      optimizer: the config's.
      rules: the config's, from logical to mesh axes.
      packed: whether the config packs rows.
      seed: of parameters, batches and dropout.
    """

    model: Model
    lengths: Mapping[str, int]
    optimizer: optax.GradientTransformation
    rules: ShardingRules = ShardingRules()
    packed: bool = False
    seed: int = 0

    # ---- The model in other forms

    @functools.cached_property
    def noisy(self) -> Model:
        """With dropout wherever there can be some."""
        return with_values(self.model, {"dropout_rate": DROPOUT})

    @functools.cached_property
    def quiet(self) -> Model:
        """With nothing drawn in training."""
        return with_values(self.model, {"dropout_rate": 0.0, "jitter_noise": 0.0, "second_threshold": None})

    @functools.cached_property
    def roomy(self) -> Model:
        """`quiet`, with room for every token in every expert: no token's fate depends on its neighbours."""
        return with_room(self.quiet)

    # ---- What goes in

    @functools.cached_property
    def source(self) -> Source:
        """Draws examples."""
        return Source(self.model, self.lengths)

    @functools.cached_property
    def batch(self) -> Batch:
        """Packed where the config packs."""
        return self.draw(0)

    def draw(self, number: int) -> Batch:
        """The batch of this number, laid out as the config does."""
        packed = self.packed and self.source.packs
        return self.source.batch(self.source.rows(packed, self.seed + number), packed)

    @functools.cached_property
    def params(self) -> Named:
        """Parameters that all matter, unlike fresh ones, under the names that layers have in a loop."""
        loop = in_stacks(self.model, "scan", False)
        with Partitioner.single_device().active():
            fresh = drawn(lambda: loop.init(jax.random.key(self.seed), self.batch))
        rng = np.random.default_rng(self.seed)
        noise = {name: rng.normal(0.0, 0.1, leaf.shape).astype(np.float32) for name, leaf in named_leaves(fresh)}
        return {name: np.asarray(leaf) + noise[name] for name, leaf in named_leaves(fresh)}

    def params_of(self, model: Model, batch: Batch | None = None) -> Params:
        """`params` in a model's layout."""
        batch = self.batch if batch is None else batch
        return laid_out(self.params, jax.eval_shape(lambda: model.init(jax.random.key(0), batch)))

    # ---- What comes out

    def gradients(
        self, model: Model, partitioner: Partitioner | None = None, microbatches: int = 1, batch: Batch | None = None
    ) -> Named:
        """`loss`, and the gradient by every parameter under its name in a loop, as the training step takes them."""
        step = TrainStep(model, _GRADIENTS_AS_STATE, self.seed, microbatches)
        run = self.run(step, partitioner or Partitioner.single_device())
        state, report = run(run.start(self.params_of(model)), self.batch if batch is None else batch)
        return {"loss": np.asarray(report.scalars["loss"]), **looped(jax.device_get(state.opt_state))}

    def run(self, step: TrainStep, partitioner: Partitioner) -> "Run":
        """The step on a mesh; what has been compiled before is not compiled again."""
        return self._runs.setdefault((step, partitioner), Run(step, partitioner, self.batch))

    @functools.cached_property
    def _runs(self) -> "dict[tuple[TrainStep, Partitioner], Run]":
        return {}

    @functools.cached_property
    def gradients_noisy(self) -> Named:
        """Those of `noisy` on one device."""
        return self.gradients(self.noisy)

    @functools.cached_property
    def gradients_quiet(self) -> Named:
        """Those of `quiet` on one device."""
        return self.gradients(self.quiet)

    def log_probs(self, model: Model, batch: Batch) -> np.ndarray:
        """Of every target token, given the true ones before it: `[batch, length]`, 0 where none counts."""
        return self.call(_log_probs, model, self.params_of(model, batch), dict(batch))

    def call(self, function: Callable[..., PyTree], model: Model, *arguments: PyTree) -> PyTree:
        """`function(model, *arguments)` on one device, as NumPy arrays; compiled once for equal models."""
        if function not in self._programs:
            own = functools.partial(function)  # JAX would share its traces with other subjects
            self._programs[function] = jax.jit(own, static_argnums=0, compiler_options=QUICKLY)
        with Partitioner.single_device().active():
            return jax.device_get(self._programs[function](model, *arguments))

    @functools.cached_property
    def _programs(self) -> dict[Callable[..., PyTree], Callable[..., PyTree]]:
        return {}


@dataclasses.dataclass(frozen=True)
class Run:
    """The training step of a model on a mesh, compiled once.

    Attributes:
      step: what is compiled.
      partitioner: where it runs.
      like: a batch with the shapes of all.
    """

    step: TrainStep
    partitioner: Partitioner
    like: Batch

    @functools.cached_property
    def abstract(self) -> TrainState:
        """Shapes and shardings of the state."""
        model, optimizer = self.step.model, self.step.optimizer
        shardings = train_state.state_shardings(model, optimizer, self.like, self.partitioner)
        return train_state.abstract(model, optimizer, self.like, shardings)

    @functools.cached_property
    def program(self) -> Callable[..., tuple[TrainState, StepReport]]:
        """The step."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        return self.step.lowered(self.partitioner, shardings, self.abstract, self.like).compile(QUICKLY)

    def start(self, params: Params) -> TrainState:
        """The state before the first step, on the mesh."""
        return self.place(TrainState(np.int32(0), params, self._fresh(params)))

    def place(self, state: TrainState) -> TrainState:
        """A state on the mesh."""
        return jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), state, self.abstract)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
        """One step; takes the memory of `state`."""
        arrays = {name: np.asarray(x) for name, x in batch.items()}
        return self.program(state, host_to_devices(arrays, self.partitioner.sharding("batch")))

    def _fresh(self, params: Params) -> PyTree:
        with Partitioner.single_device().active():
            return jax.device_get(jax.jit(self.step.optimizer.init, compiler_options=QUICKLY)(params))


def devices() -> list[jax.Device]:
    """Those that meshes are made of: a power of two."""
    return jax.devices()[: 2 ** (min(len(jax.devices()), MOST_DEVICES).bit_length() - 1)]


def _log_probs(model: Model, params: Params, batch: Batch) -> Array:
    logits, targets = jax.nn.log_softmax(model.logits(params, batch)), batch["decoder_target_tokens"]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.where(batch["decoder_loss_weights"] > 0, chosen, 0.0)


def in_stacks(model: Model, name: str, value: bool | int | str | None) -> Model:
    """A model with a field of all its stacks set: `scan`, `remat` or `repeats`."""
    return changed(model, lambda f: value if f.name == name and isinstance(f.owner, LayerStack) else f.value)


def with_room(model: Model) -> Model:
    """A model whose experts have room for every token."""

    def room(field: Field) -> object:
        return FixedCapacity(2**20) if field.name == "capacity" and field.value is not None else field.value

    return changed(model, room)


def _keep_gradients(gradients: Params, state: Params, params: Params | None = None) -> tuple[Params, Params]:
    return jax.tree.map(jnp.zeros_like, gradients), gradients


_GRADIENTS_AS_STATE = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), _keep_gradients)
"""Changes nothing, and leaves the gradients that it is given in its state."""
