"""Parameters out of checkpoints: a run's own for evaluation, another run's for fine-tuning."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from t5x_like.architectures.variables import named_leaves, parameter_name
from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.errors import UserError
from t5x_like.models.contract import Model
from t5x_like.sharding import Partitioner
from t5x_like.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class RestoreFrom:
    """Takes parameters from a run's folder; the optimiser starts afresh.

    Attributes:
      path: the other run's `MODEL_DIR`.
      step: which checkpoint; None takes the newest.
      include: parameters whose whole name matches this regex are taken, the others keep their initial values.
      renames: `(regex, replacement)` pairs applied in turn to our names to get the other run's (`re.sub`).
    """

    path: str
    step: int | None = None
    include: str = ".*"
    renames: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for pattern in (self.include, *(pattern for pattern, _ in self.renames)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"RestoreFrom: {pattern!r} is no regular expression: {error}") from error

    def __call__(self, params: Params) -> Params:
        """`params` with what matches replaced, on the same devices.

        Raises:
          UserError: nothing matches, or something that matches is missing over there or has another shape.
        """
        leaves = dict(named_leaves(params))
        wanted = {name: self._their_name(name) for name in leaves if re.fullmatch(self.include, name)}
        if not wanted:
            raise UserError(f"RestoreFrom.include {self.include!r} matches no parameter, such as {next(iter(leaves))}")
        like = {theirs: abstract_like(leaves[name]) for name, theirs in wanted.items()}
        restored = read_parameters("RestoreFrom", self.path, self.step, lambda theirs: like)
        first = {theirs: name for name, theirs in reversed(wanted.items())}
        taken = {
            # A second taker gets a copy: the training step reuses the memory of every parameter.
            name: restored[theirs] if first[theirs] == name else jnp.copy(restored[theirs])
            for name, theirs in wanted.items()
        }
        return replace_leaves(params, taken)

    def _their_name(self, name: str) -> str:
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


@runtime_checkable
class Restore(Protocol):
    """Where a run's first parameters come from, instead of from chance alone."""

    def __call__(self, params: Params) -> Params:
        """Freshly initialised parameters with some or all of them replaced, on the same devices."""
        ...


def read_parameters(
    owner: str,
    path: str | Path,
    step: int | None,
    like: Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, jax.ShapeDtypeStruct]],
) -> dict[str, jax.Array]:
    """Parameters of a run's checkpoint by name.

    Args:
      owner: what messages call the object that asks.
      path: the run's `MODEL_DIR`.
      step: which checkpoint; None takes the newest.
      like: from the shapes that the checkpoint holds to what is wanted of them: shapes, dtypes and shardings by name.

    Raises:
      UserError: there is no such checkpoint, or it does not hold what is wanted.
    """
    with Checkpoints(Path(path) / "checkpoints") as checkpoints:
        steps = checkpoints.steps()
        step = step if step is not None else max(steps, default=None)
        if step not in steps:
            raise UserError(f"{owner}: {path} has no checkpoint of step {step}; it has {steps or 'none'}")
        theirs = checkpoints.parameter_shapes(step)
        wanted = like(theirs)
        wrong = [
            f"{name}: {leaf.shape} is wanted, over there is {theirs.get(name, 'nothing')}"
            for name, leaf in wanted.items()
            if theirs.get(name) != leaf.shape
        ]
        if wrong:
            hint = "; use include and renames" if owner == "RestoreFrom" else ""
            raise UserError(f"{owner}: {path} does not fit{hint}:\n  " + "\n  ".join(wrong[:10]))
        return checkpoints.restore_params(step, wanted)


def abstract_like(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of an array."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def replace_leaves(params: Params, leaves: Mapping[str, jax.Array]) -> Params:
    """`params` with the leaves that are named replaced."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(parameter_name(path), leaf), params)


def restore_parameters(
    checkpoints: Checkpoints, step: int, model: Model, batch: Batch, partitioner: Partitioner
) -> Params:
    """A model's parameters from one of its own checkpoints, on any mesh; their moving average where the run kept one.

    Raises:
      UserError: the checkpoint holds other parameters than the model has.
    """
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))
    shardings = partitioner.tree_shardings(model.logical_axes(batch))
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    checkpoints.check_shapes(step, like)
    leaves = checkpoints.restore_params(step, dict(named_leaves(like)))
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[parameter_name(path)], like)
