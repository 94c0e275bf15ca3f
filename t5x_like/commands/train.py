"""`t5x_like train`: trains a model, or goes on where it stopped."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from t5x_like import gin_config
from t5x_like.checkpoints.manager import CheckpointPolicy, Checkpoints
from t5x_like.checkpoints.restore import Restore
from t5x_like.commands import dry_run as dry
from t5x_like.commands import run_folder
from t5x_like.data.loader import DatasetConfig, TrainLoader
from t5x_like.distributed import own_rows
from t5x_like.layers.linear import default_dtype
from t5x_like.models.contract import Model
from t5x_like.models.predictor import Predictor
from t5x_like.recipe import example_batch
from t5x_like.sharding import Partitioner
from t5x_like.training import train_state
from t5x_like.training.evaluation import EarlyStopping, Evaluator, samples, write_rows
from t5x_like.training.flops import matmul_flops, matmul_peak
from t5x_like.training.optimizers import ema_params
from t5x_like.training.report import write_report
from t5x_like.training.run_log import RunLog, SilentRunLog, read_evaluations, write_run_json
from t5x_like.training.step import TrainStep
from t5x_like.training.train_state import TrainState
from t5x_like.training.trainer import Monitor, Progress, Trainer
from t5x_like.typing import Batch, Params


def train(
    *,
    model_dir: str,
    model: Model,
    dataset: DatasetConfig,
    trainer: Trainer,
    evaluator: Evaluator | None = None,
    eval_period: int = 1000,
    checkpoints: CheckpointPolicy = CheckpointPolicy(),
    partitioner: Partitioner | None = None,
    restore: Restore | None = None,
    early_stopping: EarlyStopping | None = None,
    wandb_project: str | None = None,
    dry_run: bool = False,
) -> None:
    """Trains until `trainer.train_steps`; the same command in the same folder goes on bitwise as if never stopped.

    Args:
      model_dir: the run's folder; everything is written here.
      model: what to train.
      dataset: what on.
      trainer: how, and how long.
      evaluator: what to evaluate, every `eval_period` steps and at the end; None evaluates nothing.
      eval_period: steps.
      checkpoints: when to save and what to keep.
      partitioner: the mesh and its rules; None uses all devices, data parallel.
      restore: another run's parameters to start from: `RestoreFrom`, or one of `checkpoints.experts`.
      early_stopping: ends the run when evaluation no longer gets better.
      wandb_project: also report to this Weights & Biases project (extra `wandb`).
      dry_run: print what would be trained, and train nothing.

    Raises:
      UserError: what was asked for does not fit together, or does not fit what the folder holds.
      RunFailed: loss or gradient was not finite too often.
    """
    partitioner = partitioner or Partitioner()
    config = gin_config.operative_config()
    if dry_run:
        dry.print_plan(config, model, dataset, trainer, partitioner)
        return
    run_folder.check_config(model_dir, config)
    batch = example_batch(model, dataset, dataset.batch_size)
    shardings = train_state.state_shardings(model, trainer.optimizer, batch, partitioner)
    like = train_state.abstract(model, trainer.optimizer, batch, shardings)
    batch_sharding = partitioner.sharding("batch")
    loader = TrainLoader(dataset, model.converter, rows=own_rows(batch_sharding, dataset.batch_size))

    with Checkpoints(Path(model_dir) / "checkpoints", checkpoints) as saved, ThreadPoolExecutor(1) as background:
        restored = saved.restore_latest(like)
        # Compiled, or read as another run compiled it, while parameters are drawn and the first batch is prepared.
        step = TrainStep(model, trainer.optimizer, trainer.seed, trainer.microbatches)
        compiling = background.submit(lambda: step.lowered(partitioner, shardings, like, batch).compile())
        if restored is None:
            state, position, warnings = _first_state(model, trainer, batch, partitioner, restore), None, []
        else:
            state, position, warnings = restored
        with _open_log(model_dir, trainer, start := int(state.step), wandb_project) as log:
            _write_start(log, model_dir, config, _facts(state, partitioner, trainer, dataset), warnings)
            log.message(f"{'resumed at' if restored else 'starting from'} step {start} in {model_dir}")
            evaluation = None
            if evaluator is not None:
                predictor = Predictor(model, partitioner)
                evaluation = EvaluationHook(evaluator, predictor, eval_period, model_dir, log, early_stopping, start)
            save = SaveHook(saved, checkpoints.save_period, evaluation)
            batches = loader.batches(position)
            first, compiled = next(batches), compiling.result()
            state = trainer.fit(
                state,
                compiled,
                itertools.chain([first], batches),
                batch_sharding,
                _monitor(trainer, log, model_dir, model, like.params, batch, dataset.batch_size / len(loader.rows)),
                [save] if evaluation is None else [evaluation, save],
            )
            rest = "" if int(state.step) >= trainer.train_steps else "; the same command goes on from there"
            log.message(f"stopped at step {int(state.step)} of {trainer.train_steps} in {model_dir}{rest}")
    if jax.process_index() == 0:
        write_report(model_dir)


def _first_state(
    model: Model, trainer: Trainer, batch: Batch, partitioner: Partitioner, restore: Restore | None
) -> TrainState:
    state = train_state.create_sharded(model, trainer.optimizer, batch, trainer.seed, partitioner)
    return state if restore is None else state._replace(params=restore(state.params))


@dataclasses.dataclass(frozen=True)
class EvaluationHook:
    """Evaluates every so often, and says when to stop."""

    evaluator: Evaluator
    predictor: Predictor
    period: int
    model_dir: str
    log: RunLog
    early_stopping: EarlyStopping | None = None
    start: int = 0
    history: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Reads what was reported up to `start`; what is past it will be run again, and process 0 drops it."""
        reported = read_evaluations(self.model_dir)
        self.history.update({step: metrics for step, metrics in reported.items() if step <= self.start})

    def due(self, progress: Progress) -> bool:
        """At every period and at the end, but not when whoever stops the run is waiting."""
        return (progress.step % self.period == 0 or progress.last) and not progress.interrupted

    def __call__(self, progress: Progress) -> bool:
        """Evaluates every task; True when early stopping says so."""
        params = ema_params(progress.state.opt_state)
        self.history[progress.step] = {}
        for result in self.evaluator.run(self.predictor, progress.state.params if params is None else params):
            self.log.evaluation(progress.step, result.task, result.metrics)
            self.history[progress.step] |= {f"{result.task}/{name}": value for name, value in result.metrics.items()}
            if progress.last:
                self.log.message(samples(result))
            if jax.process_index() == 0:
                write_rows(self.model_dir, progress.step, result)
        if self.early_stopping is None or not self.early_stopping.should_stop(self.history):
            return False
        self.log.message(f"step {progress.step}: {self.early_stopping.metric} no longer gets better; stopping early")
        return True


@dataclasses.dataclass(frozen=True)
class SaveHook:
    """Saves every so often, at the end, and when the run is interrupted."""

    checkpoints: Checkpoints
    period: int
    evaluation: EvaluationHook | None = None

    def due(self, progress: Progress) -> bool:
        """At every period and at the end, whatever ends it."""
        return progress.step % self.period == 0 or progress.last

    def __call__(self, progress: Progress) -> bool:
        """Saves; never ends a run."""
        metrics = self.evaluation.history.get(progress.step) if self.evaluation else None
        self.checkpoints.save(progress.step, progress.state, progress.position, metrics)
        return False


def _open_log(model_dir: str, trainer: Trainer, step: int, wandb_project: str | None) -> RunLog:
    if jax.process_index() != 0:
        return SilentRunLog()
    return RunLog(model_dir, trainer.train_steps, step, wandb_project)


def _monitor(
    trainer: Trainer, log: RunLog, model_dir: str, model: Model, params: Params, batch: Batch, parts: float
) -> Monitor:
    flops = 3.0 * matmul_flops(lambda p, b: model.loss(p, b).loss.total, params, batch)
    peak = matmul_peak(default_dtype()) * run_folder.matmul_devices()
    return Monitor(trainer, log, model_dir, flops, peak, parts)


def _write_start(
    log: RunLog, model_dir: str, config: str, facts: Mapping[str, object], warnings: Sequence[str]
) -> None:
    if jax.process_index() == 0:
        run_folder.write_config(model_dir, config)
        write_run_json(model_dir, facts)
    for warning in warnings:
        log.message(f"stepped over {warning}")


def _facts(
    state: TrainState, partitioner: Partitioner, trainer: Trainer, dataset: DatasetConfig
) -> Mapping[str, object]:
    return {
        "parameters": train_state.count_parameters(state.params),
        "mesh": {name: int(size) for name, size in partitioner.mesh.shape.items()},
        "seeds": {"trainer": trainer.seed, "dataset": dataset.seed},
        "resumed_step": int(state.step),
    }
