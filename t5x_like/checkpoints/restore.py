"""Parameters out of checkpoints: a run's own for evaluation, another run's for fine-tuning."""

import dataclasses
import re
from pathlib import Path

import jax

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
        with Checkpoints(Path(self.path) / "checkpoints") as checkpoints:
            steps = checkpoints.steps()
            step = self.step if self.step is not None else max(steps, default=None)
            if step not in steps:
                raise UserError(f"RestoreFrom: {self.path} has no checkpoint of step {step}; it has {steps or 'none'}")
            theirs = checkpoints.parameter_shapes(step)
            wrong = [
                f"{name}: {leaves[name].shape}, over there {theirs.get(their_name, 'nothing')} as {their_name}"
                for name, their_name in wanted.items()
                if theirs.get(their_name) != leaves[name].shape
            ]
            if wrong:
                raise UserError(
                    f"RestoreFrom: {self.path} does not fit; use include and renames:\n  " + "\n  ".join(wrong[:10])
                )
            like = {
                theirs: jax.ShapeDtypeStruct(leaves[name].shape, leaves[name].dtype, sharding=leaves[name].sharding)
                for name, theirs in wanted.items()
            }
            restored = checkpoints.restore_params(step, like)
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: restored.get(wanted.get(parameter_name(path), ""), leaf), params
        )

    def _their_name(self, name: str) -> str:
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


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
