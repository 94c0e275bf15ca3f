"""All that training carries from step to step, made sharded and never in one piece on one host."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from t5x_like.architectures.variables import named_axes, named_leaves, parameter_name
from t5x_like.models.contract import Model
from t5x_like.sharding import LogicalAxes, Partitioner, check_divisible, divides
from t5x_like.training.drawing import drawn
from t5x_like.typing import Batch, Params, PyTree


class TrainState(NamedTuple):
    """Nothing else is carried: every random key is `fold_in(seed, step)`.

    Attributes:
      step: steps done, an int32 scalar.
      params: float32 parameters.
      opt_state: the optimiser's.
    """

    step: PyTree  # like its neighbours an array, or what stands for one: a shape, a sharding
    params: Params
    opt_state: PyTree


def create(model: Model, optimizer: optax.GradientTransformation, batch: Batch, seed: int) -> TrainState:
    """The state before the first step (under jit or `jax.eval_shape`)."""
    params = model.init(jax.random.key(seed), batch)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def state_shardings(
    model: Model, optimizer: optax.GradientTransformation, batch: Batch, partitioner: Partitioner
) -> TrainState:
    """A `NamedSharding` for every leaf; what an optimiser keeps per parameter is split as that parameter is.

    Raises:
      UserError: the mesh does not divide all parameters and the batch; lists what it does not.
    """
    shapes = jax.eval_shape(lambda: create(model, optimizer, batch, 0))
    axes = model.logical_axes(batch)
    parameter_shapes = {name: leaf.shape for name, leaf in named_leaves(shapes.params)}
    parameter_axes = dict(named_axes(axes))
    arrays = {name: (shape, parameter_axes[name]) for name, shape in parameter_shapes.items()}
    arrays |= {name: (x.shape, ("batch",)) for name, x in batch.items()}
    check_divisible(arrays, partitioner)

    def like_its_parameter(path: tuple[jax.tree_util.KeyEntry, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = parameter_name(path)
        owner = max((n for n in parameter_shapes if f"/{name}".endswith(f"/{n}")), key=len, default=None)
        names = _inherited_axes(leaf.shape, parameter_shapes[owner], parameter_axes[owner]) if owner else ()
        sharding = partitioner.sharding(*names)
        return sharding if divides(sharding, leaf.shape) else partitioner.sharding()

    opt_state = jax.tree_util.tree_map_with_path(like_its_parameter, shapes.opt_state)
    return TrainState(partitioner.sharding(), partitioner.tree_shardings(axes), opt_state)


def abstract(model: Model, optimizer: optax.GradientTransformation, batch: Batch, shardings: TrainState) -> TrainState:
    """Shapes, dtypes and shardings: what a checkpoint is restored to."""
    shapes = jax.eval_shape(lambda: create(model, optimizer, batch, 0))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def create_sharded(
    model: Model, optimizer: optax.GradientTransformation, batch: Batch, seed: int, partitioner: Partitioner
) -> TrainState:
    """`create`, every device making its own part of it."""
    shardings = state_shardings(model, optimizer, batch, partitioner)
    with partitioner.active():
        params = drawn(lambda: model.init(jax.random.key(seed), batch))
        params = jax.device_put(params, shardings.params)  # a parameter that no layer has split by itself
        opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
        return TrainState(jax.device_put(np.int32(0), shardings.step), params, opt_state)


def count_parameters(params: Params) -> int:
    """How many numbers a parameter tree (or a tree of shapes) holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _inherited_axes(shape: tuple[int, ...], owner_shape: tuple[int, ...], owner_axes: LogicalAxes) -> LogicalAxes:
    """Axes of a statistic from its parameter's: those of the dimensions that it still has, in order."""
    remaining = list(zip(owner_shape, owner_axes, strict=True))
    names: list[str | None] = []
    for size in shape:
        while remaining and remaining[0][0] != size:
            remaining.pop(0)
        names.append(remaining.pop(0)[1] if remaining else None)
    return tuple(names)
