"""`t5x_like evaluate`: a trained model against its tasks' held-out examples."""

from pathlib import Path

import jax

from t5x_like import gin_config
from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.checkpoints.restore import restore_parameters
from t5x_like.errors import UserError
from t5x_like.models.contract import Model
from t5x_like.models.predictor import Predictor
from t5x_like.recipe import example_batch
from t5x_like.sharding import Partitioner
from t5x_like.training.evaluation import Evaluator, samples, write_rows
from t5x_like.training.report import write_report
from t5x_like.training.run_log import RunLog, SilentRunLog


def evaluate(
    *,
    model_dir: str,
    model: Model,
    evaluator: Evaluator,
    step: int | str = "latest",
    partitioner: Partitioner | None = None,
    dry_run: bool = False,
) -> None:
    """Evaluates checkpoints of a run, and adds what comes out to the run's folder.

    Args:
      model_dir: the run's folder.
      model: as it was trained.
      evaluator: tasks, split and decoder.
      step: a step, `latest`, or `all`.
      partitioner: the mesh and its rules; None uses all devices, data parallel.
      dry_run: print the configuration and the steps that would be evaluated.

    Raises:
      UserError: there is no such checkpoint, or it belongs to another model.
    """
    partitioner = partitioner or Partitioner()
    predictor = Predictor(model, partitioner)
    with Checkpoints(Path(model_dir) / "checkpoints") as checkpoints:
        steps = choose_steps(checkpoints.steps(), step, model_dir)
        if dry_run:
            print(
                f"{gin_config.operative_config()}\n"
                f"would evaluate {[task.name for task in evaluator.tasks()]} at {steps}"
            )
            return
        batch = example_batch(model, evaluator.dataset, rows=1)
        with SilentRunLog() if jax.process_index() else RunLog(model_dir, steps[-1], resumed_step=None) as log:
            for each in steps:
                params = restore_parameters(checkpoints, each, model, batch, partitioner)
                for result in evaluator.run(predictor, params):
                    log.evaluation(each, result.task, result.metrics)
                    log.message(samples(result))
                    if jax.process_index() == 0:
                        log.message(f"predictions are in {write_rows(model_dir, each, result)}")
    if jax.process_index() == 0:
        write_report(model_dir)


def choose_steps(steps: list[int], wanted: int | str, model_dir: str) -> list[int]:
    """The steps meant by a number, `latest` or `all`; raises `UserError` where there are none."""
    if not steps:
        raise UserError(f"{model_dir}/checkpoints holds no checkpoint")
    if wanted == "all":
        return steps
    if wanted == "latest":
        return steps[-1:]
    if wanted not in steps:
        raise UserError(
            f"{model_dir} has no checkpoint of step {wanted!r}; it has {', '.join(map(str, steps))} (or: latest, all)"
        )
    return [int(wanted)]
