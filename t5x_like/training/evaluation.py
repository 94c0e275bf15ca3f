"""Evaluation: what a model makes of every task's held-out examples, in numbers and in text."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypedDict

import jax
import numpy as np
import seqio

from t5x_like.data.loader import DatasetConfig, EvalBatch, eval_batches, weighted_tasks
from t5x_like.data.metrics import perplexity, unigram_perplexity
from t5x_like.decoding.contract import DecodeFn
from t5x_like.decoding.greedy import Greedy
from t5x_like.distributed import own_rows
from t5x_like.errors import UserError
from t5x_like.models.predictor import Predictor
from t5x_like.typing import Params


class EvaluatedExample(TypedDict):
    """One line of `eval/TASK/STEP.jsonl`.

    `predictions` is None where the task has no use for them; `score` is the log-likelihood of the targets in nats.
    """

    inputs: str
    targets: str
    predictions: str | None
    score: float


class TaskResult(NamedTuple):
    """One task at one step.

    Attributes:
      task: its name.
      metrics: `perplexity` beside its trivial baseline `unigram_perplexity`, and what the task's own functions say.
      rows: one per example, in order.
    """

    task: str
    metrics: dict[str, float]
    rows: list[EvaluatedExample]


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Scores the targets of every task, generates outputs for those that judge outputs, and applies their metrics.

    Attributes:
      dataset: which mixture, split, lengths and batch size; every task of the mixture is evaluated by itself.
      decoder: how outputs are found.
      max_examples: of each task, the first so many; None takes all.
      seed: for decoders that draw.
    """

    dataset: DatasetConfig
    decoder: DecodeFn = Greedy()
    max_examples: int | None = None
    seed: int = 0

    def tasks(self) -> list[seqio.Task]:
        """The tasks of the mixture that have the split."""
        return [entry.task for entry in weighted_tasks(self.dataset)]

    def run(self, predictor: Predictor, params: Params) -> Iterator[TaskResult]:
        """Evaluates one task after another."""
        for task in self.tasks():
            yield self.run_task(task, predictor, params)

    def run_task(self, task: seqio.Task, predictor: Predictor, params: Params) -> TaskResult:
        """Evaluates one task."""
        examples: list[Mapping[str, object]] = []
        rows: list[EvaluatedExample] = []
        for number, batch in enumerate(self._batches(task, predictor)):
            likelihoods = predictor.score(params, batch.batch)
            texts = self._predict(task, predictor, params, batch, number)
            examples += batch.examples
            for example, text, score in zip(
                batch.examples, texts, likelihoods, strict=False
            ):  # rows beyond are padding
                inputs, outputs = (example_text(task, example, name) for name in ("inputs", "targets"))
                rows.append({"inputs": inputs, "targets": outputs, "predictions": text, "score": float(score)})
        scores = [row["score"] for row in rows]
        tokens = [np.asarray(example["targets"]) for example in examples]
        metrics = {"perplexity": perplexity(scores, [len(each) for each in tokens])}
        metrics |= {"unigram_perplexity": unigram_perplexity(tokens)}
        targets = _postprocessed(task, [row["targets"] for row in rows], examples, is_target=True)
        if task.predict_metric_fns:
            predictions = _postprocessed(task, [row["predictions"] or "" for row in rows], examples, is_target=False)
            for function in task.predict_metric_fns:
                metrics |= function(targets, predictions)
        for function in task.score_metric_fns:
            metrics |= function(targets, scores)
        return TaskResult(task.name, {name: float(value) for name, value in metrics.items()}, rows)

    def _predict(
        self, task: seqio.Task, predictor: Predictor, params: Params, batch: EvalBatch, number: int
    ) -> list[str | None]:
        """The best output for each example; None for a task that does not judge outputs."""
        if not task.predict_metric_fns:
            return [None] * len(batch.examples)
        key = jax.random.fold_in(jax.random.key(self.seed), number)
        length = self.dataset.task_feature_lengths["targets"]
        found, _ = predictor.generate(params, batch.batch, self.decoder, length, key)
        vocabulary = task.output_features["targets"].vocabulary
        return [vocabulary.decode(tokens.tolist()) for tokens in found[: len(batch.examples), 0]]

    def _batches(self, task: seqio.Task, predictor: Predictor) -> Iterator[EvalBatch]:
        rows = own_rows(predictor.partitioner.sharding("batch"), self.dataset.batch_size)
        return eval_batches(self.dataset, task, predictor.model.converter, self.max_examples, rows=rows)


def _postprocessed(
    task: seqio.Task, texts: list[str], examples: list[Mapping[str, object]], is_target: bool
) -> list[object]:
    return [
        task.postprocess_fn(text, example=example, is_target=is_target)
        for text, example in zip(texts, examples, strict=True)
    ]


def samples(result: TaskResult, count: int = 5) -> str:
    """The first outputs beside their targets, to be read by a person."""
    width = 150
    lines = [f"{result.task}:"]
    for row in result.rows[:count]:
        for name in ("inputs", "targets", "predictions"):
            text = " ".join(str(row[name]).split())
            lines.append(f"  {name:<11}  {text if len(text) <= width else text[: width - 3] + '...'}")
        lines.append("")
    return "\n".join(lines)


def write_rows(model_dir: str | Path, step: int, result: TaskResult) -> Path:
    """Writes a task's examples to `eval/TASK/STEP.jsonl`, a row per example."""
    path = Path(model_dir) / "eval" / result.task / f"{step}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows), encoding="utf-8")
    partial.replace(path)
    return path


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """Stops a run whose evaluation has stopped getting better. A function of the reports so far: nothing is carried.

    Attributes:
      metric: `TASK/METRIC`.
      patience: evaluations in a row that may fail to improve on the best by `min_delta`.
      mode: `max` or `min`.
      min_delta: what counts as better.
    """

    metric: str
    patience: int = 3
    mode: str = "max"
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in ("max", "min") or self.patience < 1:
            raise UserError("EarlyStopping: mode is 'max' or 'min', and patience at least 1")

    def should_stop(self, history: Mapping[int, Mapping[str, float]]) -> bool:
        """Whether the newest `patience` evaluations all failed to beat the best before them.

        Args:
          history: step -> metrics by `TASK/METRIC`.

        Raises:
          UserError: there is no such metric.
        """
        known = [name for metrics in history.values() for name in metrics]
        if known and self.metric not in known:
            raise UserError(
                f"EarlyStopping.metric {self.metric!r} is not reported; these are: {', '.join(dict.fromkeys(known))}"
            )
        sign = 1.0 if self.mode == "max" else -1.0
        values = [sign * history[step][self.metric] for step in sorted(history) if self.metric in history[step]]
        best, waited = -np.inf, 0
        for value in values:
            better = value > best + self.min_delta
            best, waited = (value, 0) if better else (best, waited + 1)
        return waited >= self.patience


def example_text(task: seqio.Task, example: Mapping[str, object], feature: str) -> str:
    """The text that an example was made of, or its tokens decoded where the task did not keep it."""
    kept = example.get(f"{feature}_pretokenized")
    if isinstance(kept, bytes):
        return kept.decode("utf-8")
    return task.output_features[feature].vocabulary.decode(np.asarray(example[feature]).tolist())
