"""`t5x_like infer`: outputs for the inputs of a task or a file, as JSON lines."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import seqio

from t5x_like import gin_config
from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.checkpoints.restore import restore_parameters
from t5x_like.commands.evaluate import choose_steps
from t5x_like.data import text_files
from t5x_like.data.loader import DatasetConfig, EvalBatch, eval_batches, weighted_tasks
from t5x_like.decoding.contract import DecodeFn
from t5x_like.decoding.greedy import Greedy
from t5x_like.distributed import own_rows, same_everywhere
from t5x_like.errors import UserError
from t5x_like.models.contract import Model
from t5x_like.models.predictor import Predictor
from t5x_like.recipe import example_batch
from t5x_like.sharding import Partitioner
from t5x_like.training.evaluation import example_text


def infer(
    *,
    model_dir: str,
    model: Model,
    dataset: DatasetConfig,
    decoder: DecodeFn = Greedy(),
    source: str | None = None,
    output: str | None = None,
    step: int | str = "latest",
    seed: int = 0,
    num_shards: int = 1,
    shard_index: int = 0,
    partitioner: Partitioner | None = None,
    dry_run: bool = False,
) -> None:
    """Writes a JSON object per example: `task`, `inputs`, `targets` (empty where unknown), `predictions` and `scores`.

    Every finished batch is a file in `OUTPUT.parts` until the last one joins them: a restart does none of them again.

    Args:
      model_dir: the run's folder.
      model: as it was trained.
      dataset: lengths, batch size and vocabulary; without a `source` also which tasks, and which split of them.
      decoder: how outputs are found; beam search and several samples give several predictions, best first.
      source: a file to read instead, see `data.text_files.task`.
      output: the file to write; None means `MODEL_DIR/inference/NAME-STEP.jsonl`.
      step: a step, or `latest`.
      seed: for decoders that draw.
      num_shards: jobs that share the work; each writes its own file.
      shard_index: which of them this is, from 0.
      partitioner: the mesh and its rules; None uses all devices, data parallel.
      dry_run: print the configuration and where the output would go.

    Raises:
      UserError: no such checkpoint or file, or a line of the file cannot be read.
    """
    if not 0 <= shard_index < num_shards:
        raise UserError(
            f"infer.shard_index is {shard_index}; with num_shards = {num_shards} it is 0 to {num_shards - 1}"
        )
    partitioner = partitioner or Partitioner()
    tasks = [entry.task for entry in weighted_tasks(dataset)]
    if source is not None:
        tasks = [text_files.task(source, tasks[0].output_features, model.converter)]
        dataset = dataclasses.replace(dataset, split=text_files.SPLIT)
    with Checkpoints(Path(model_dir) / "checkpoints") as checkpoints:
        (step,) = choose_steps(checkpoints.steps(), step, model_dir)
        path = _output_path(output, model_dir, Path(source).stem if source else dataset.mixture_or_task_name, step)
        if num_shards > 1:
            path = path.with_name(f"{path.stem}-{shard_index:05d}-of-{num_shards:05d}{path.suffix}")
        if dry_run:
            print(f"{gin_config.operative_config()}\nwould write {path}")
            return
        params = restore_parameters(checkpoints, step, model, example_batch(model, dataset, 1), partitioner)
    predictor = Predictor(model, partitioner)
    done = _finished(path.with_name(path.name + ".parts"))
    parts = []
    for number, (task, batch) in enumerate(_batches(tasks, dataset, predictor)):
        if number % num_shards == shard_index:
            parts.append(path.with_name(path.name + ".parts") / f"{number:08d}.jsonl")
            if number not in done:
                key = jax.random.fold_in(jax.random.key(seed), number)
                length = dataset.task_feature_lengths["targets"]
                found, scores = predictor.generate(params, batch.batch, decoder, length, key)
                _write(parts[-1], "".join(_rows(task, batch, found.tolist(), scores.tolist())))
                _say(f"{path.name}: batch {number + 1} done")
    _join(parts, path)
    _say(f"predictions are in {path}")


def _output_path(output: str | None, model_dir: str, name: str, step: int | str) -> Path:
    return Path(output) if output else Path(model_dir) / "inference" / f"{name}-{step}.jsonl"


def _batches(
    tasks: list[seqio.Task], dataset: DatasetConfig, predictor: Predictor
) -> Iterator[tuple[seqio.Task, EvalBatch]]:
    rows = own_rows(predictor.partitioner.sharding("batch"), dataset.batch_size)
    for task in tasks:
        for batch in eval_batches(dataset, task, predictor.model.converter, rows=rows):
            yield task, batch


def _finished(folder: Path) -> set[int]:
    """Batches that an earlier run wrote. Every process looks before any of them writes, so that all skip the same."""
    found = {int(path.stem) for path in folder.glob("*.jsonl")}
    same_everywhere(True)
    return found


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def _rows(task: seqio.Task, batch: EvalBatch, found: list[list[list[int]]], scores: list[list[float]]) -> Iterator[str]:
    """A line per example; `predictions` and `scores` are lists where the decoder gives several outputs."""
    vocabulary = task.output_features["targets"].vocabulary
    for example, sequences, values in zip(
        batch.examples, found, scores, strict=False
    ):  # rows past the examples are padding
        texts = [vocabulary.decode(sequence) for sequence in sequences]
        several = len(texts) > 1
        row = {
            "task": task.name,
            **{name: example_text(task, example, name) for name in ("inputs", "targets")},
        }
        row |= {"predictions": texts if several else texts[0], "scores": values if several else values[0]}
        yield json.dumps(row, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    """In one piece or not at all; process 0 writes for all."""
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def _join(parts: list[Path], path: Path) -> None:
    if jax.process_index() == 0:
        _write(path, "".join(part.read_text(encoding="utf-8") for part in parts))
        for part in parts:
            part.unlink()
        if parts:
            parts[0].parent.rmdir()
