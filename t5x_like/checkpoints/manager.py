"""Our own checkpoints: one atomic Orbax step each, with the data position and a digest of every array."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from t5x_like.architectures.variables import named_leaves, parameter_name
from t5x_like.checkpoints import integrity
from t5x_like.data.loader import Position
from t5x_like.distributed import same_everywhere
from t5x_like.errors import RunFailed, UserError
from t5x_like.training.train_state import TrainState
from t5x_like.typing import Params, PyTree

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class CheckpointPolicy:
    """When to save, and which checkpoints stay.

    Attributes:
      save_period: steps from one save to the next; the last step of a run is always saved.
      keep_last: how many of the newest stay.
      keep_every: those at multiples of this many steps stay too; None for none.
      keep_best: how many of the best by `best_metric` stay too.
      best_metric: `TASK/METRIC`, as evaluation reports it.
      best_mode: `max` or `min`.
    """

    save_period: int = 1000
    keep_last: int = 3
    keep_every: int | None = None
    keep_best: int = 0
    best_metric: str | None = None
    best_mode: str = "max"

    def __post_init__(self) -> None:
        if self.save_period < 1 or self.keep_last < 1:
            raise UserError("CheckpointPolicy: save_period and keep_last must be at least 1")
        if self.keep_best and not self.best_metric:
            raise UserError("CheckpointPolicy.keep_best needs best_metric, for example 'bible_en_es/bleu'")
        if self.best_mode not in ("max", "min"):
            raise UserError(f"CheckpointPolicy.best_mode is {self.best_mode!r}; it is 'max' or 'min'")

    def preservation(self) -> ocp.checkpoint_managers.AnyPreservationPolicy:
        """The same, as Orbax wants it."""
        policies = [ocp.checkpoint_managers.LatestN(self.keep_last)]
        if self.keep_every is not None:
            policies.append(ocp.checkpoint_managers.EveryNSteps(self.keep_every))
        if self.keep_best:
            sign = 1 if self.best_mode == "max" else -1
            policies.append(
                ocp.checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: sign * metrics[self.best_metric],
                    n=self.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        return ocp.checkpoint_managers.AnyPreservationPolicy(policies)


class Restored(NamedTuple):
    """A state, the data position after it, and what was wrong with newer checkpoints that were stepped over."""

    state: TrainState
    position: Position
    warnings: list[str]


class Checkpoints:
    """The checkpoints of one run, in `MODEL_DIR/checkpoints`."""

    def __init__(self, folder: str | Path, policy: CheckpointPolicy | None = None) -> None:
        """Opens a folder.

        Args:
          folder: need not exist where `policy` is given.
          policy: which checkpoints stay; None only reads.
        """
        self._folder = Path(folder).absolute()
        if policy is None and not self._folder.is_dir():
            raise UserError(f"{self._folder}: no such folder of checkpoints; has the run been trained?")
        self._policy = policy
        # Not read_only=True, about which Orbax warns three times: nothing is written where nothing is saved.
        options = ocp.CheckpointManagerOptions(create=False, save_root_metadata=False)
        if policy is not None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policy.preservation(), cleanup_tmp_directories=True
            )
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(),
            "position": ocp.JsonCheckpointHandler(),
            "digests": integrity.DigestsHandler(),
        }
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)
        # Reads without waiting for other processes, so that one that cannot read is not waited for in vain.
        own = jax.process_index()
        self._reader = ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(**handlers),
            multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own}),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._reader.close()
        self._manager.close()  # waits for the last save to commit

    def steps(self) -> list[int]:
        """Committed steps, in order."""
        self._manager.wait_until_finished()  # Orbax lists a save before it has committed
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, state: TrainState, position: Position, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Saves in the background; arrays are copied before this returns, so the state may be donated."""
        metric = self._policy.best_metric if self._policy else None
        metrics = {metric: metrics[metric]} if metric and metrics and metric in metrics else None
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            position=ocp.args.JsonSave(_of_all_processes(position)),
            digests=integrity.DigestsSave(integrity.computing(state)),
        )
        if step in self._manager.all_steps():  # a corrupt one that was stepped over
            self._manager.delete(step)
        self._manager.save(step, args=items, metrics=metrics, force=True)

    def restore_latest(self, like: TrainState) -> Restored | None:
        """The newest checkpoint that is whole; None where there is none at all.

        Args:
          like: shapes, dtypes and shardings (any mesh) to restore to.

        Raises:
          UserError: the checkpoints hold other shapes than `like`.
          RunFailed: there are checkpoints, and none is whole.
        """
        warnings: list[str] = []
        for step in reversed(self.steps()):
            try:
                self.check_shapes(step, like.params)
                return Restored(*self.restore(step, like), warnings)
            except CorruptCheckpoint as error:
                warnings.append(str(error))
        if warnings:
            raise RunFailed("no checkpoint is whole:\n  " + "\n  ".join(warnings))
        return None

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, Position]:
        """One checkpoint.

        Raises:
          CorruptCheckpoint: it cannot be read, or an array is not what was saved.
        """
        items = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(like, restore_args=ocp.checkpoint_utils.construct_restore_args(like)),
            position=ocp.args.JsonRestore(),
            digests=integrity.DigestsRestore(),
        )
        self._manager.wait_until_finished()
        restored = self._read(step, lambda: self._reader.restore(self._folder / str(step), args=items))
        self._check_digests(step, restored.state, restored.digests)
        return restored.state, restored.position

    def restore_params(self, step: int, like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Parameters alone, by name; their moving average where the run kept one.

        Args:
          step: which checkpoint.
          like: shapes, dtypes and shardings of those wanted, by name.
        """
        metadata = self._metadata(step)
        wanted = {}
        for name in like:
            pattern = re.compile(rf"opt_state/(.*/)?ema/{re.escape(name)}")
            averaged = next((n for n, _ in named_leaves(metadata) if pattern.fullmatch(n)), None)
            wanted[averaged or f"params/{name}"] = name
        item = jax.tree_util.tree_map_with_path(
            lambda path, _: like[wanted[parameter_name(path)]] if parameter_name(path) in wanted else ocp.PLACEHOLDER,
            metadata,
        )
        arguments = ocp.args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=arguments, digests=integrity.DigestsRestore())
        )
        leaves = {name: leaf for name, leaf in named_leaves(restored.state) if name in wanted}
        self._check_digests(step, leaves, restored.digests)
        return {wanted[name]: leaf for name, leaf in leaves.items()}

    def parameter_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """What a checkpoint holds, by name, without reading it."""
        return {name: tuple(leaf.shape) for name, leaf in named_leaves(self._metadata(step)["params"])}

    def _metadata(self, step: int) -> PyTree:
        return self._read(step, lambda: self._manager.item_metadata(step).state.tree)

    def _read(self, step: int, read: Callable[[], T]) -> T:
        """What `read` returns; if it fails in one process, each of which may read other files, it has failed in all."""
        failure: Exception | None = None
        try:
            result = read()
        except Exception as error:  # whatever Orbax, TensorStore or JSON find wrong with the files
            failure = error
        if same_everywhere(failure is None):
            return result
        reason = "another process cannot" if failure is None else str(failure).strip().split("\n")[0]
        raise CorruptCheckpoint(f"{self._folder / str(step)}: cannot be read: {reason or repr(failure)}") from failure

    def _check_digests(self, step: int, tree: PyTree, saved: dict[str, int]) -> None:
        changed = integrity.differences(tree, saved)
        if changed:
            names = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
            raise CorruptCheckpoint(f"{self._folder / str(step)}: not what was saved: {names}")

    def saved_digests(self, step: int) -> dict[str, int]:
        """The digest of every array as it was saved, by name: two runs are bitwise equal where these are."""
        return self._manager.restore(step, args=ocp.args.Composite(digests=integrity.DigestsRestore())).digests

    def check_shapes(self, step: int, like: Params) -> None:
        """Raises `UserError` listing the parameters which a checkpoint and a tree of shapes do not have in common."""
        saved, wanted = (
            self.parameter_shapes(step),
            {name: tuple(leaf.shape) for name, leaf in named_leaves(like)},
        )
        wrong = list(_shape_differences(saved, wanted))
        if wrong:
            raise UserError(f"{self._folder / str(step)} belongs to another model:\n  " + "\n  ".join(wrong[:10]))


class CorruptCheckpoint(Exception):
    """A checkpoint that cannot be read, or whose arrays are not what was saved; the message names file and arrays."""


def _shape_differences(saved: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name in sorted({*saved, *wanted}):
        if saved.get(name) != wanted.get(name):
            yield f"{name}: {saved.get(name, 'missing')} in the checkpoint, {wanted.get(name, 'missing')} in the model"


def _of_all_processes(position: Position) -> Position:
    """The union of what every process knows of the data position: each reads its own shards."""
    if jax.process_count() == 1:
        return position
    text = json.dumps(position).encode()
    size = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    rows = multihost_utils.process_allgather(np.frombuffer(text.ljust(size), np.uint8))
    return {shard: where for row in rows for shard, where in json.loads(bytes(row)).items()}
