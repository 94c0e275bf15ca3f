"""seqio tasks -> batches of this process -> global arrays, and back to any batch from a few bytes of position.

Every random choice is a function of (seed, task, epoch), (seed, task, epoch, shard) or (seed, shard, block): nothing is
carried from batch to batch. The examples of a shard come in blocks of `BLOCK`; mixing and packing never look past a
block, so a batch is found again from its block, its row in the packed block, and where each task stood at the block's
start.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import inspect
import itertools
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypedDict, TypeVar

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow is imported: warnings and errors only

import jax
import numpy as np
import seqio
import tensorflow as tf

from t5x_like.data import tasks
from t5x_like.data.packing import Example, FeatureConverter, Row
from t5x_like.errors import UserError

with contextlib.suppress(RuntimeError):  # a program that already runs TensorFlow on its GPU keeps it
    tf.config.set_visible_devices([], "GPU")  # or TensorFlow would take all the memory that JAX needs

BLOCK = 1024
"""Examples that are mixed and packed together. Part of the data order: another value gives other batches."""

_CHUNK = 256  # examples that leave TensorFlow at once; speed only

_SEQIO_LOCK = threading.Lock()  # seqio deals out preprocessing seeds from a global variable

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """What to read, and how. More than eight fields, because they are T5X's, under T5X's names, in one gin object.

    Attributes:
      mixture_or_task_name: a registered seqio task or mixture.
      task_feature_lengths: maximum length of each task feature, in tokens.
      batch_size: rows of the global batch.
      split: e.g. `train`; a mixture skips tasks without it, as seqio does.
      shuffle: read files in random order and shuffle examples in the task's own buffer.
      pack: put several examples in a row.
      seed: of every random choice made here, not negative.
      vocabulary: to be used instead of the tasks' own.
      num_shards: streams that the data is dealt into, each feeding its own rows of the batch. Set it to the number of
        processes that should share the work of reading: the data order depends on it, but not on the processes.
      use_cached: read the tasks that have one from seqio's offline cache.
      module: imported first, to register third-party tasks.
    """

    mixture_or_task_name: str
    task_feature_lengths: Mapping[str, int]
    batch_size: int
    split: str = "train"
    shuffle: bool = True
    pack: bool = False
    seed: int = 0
    vocabulary: seqio.Vocabulary | None = None
    num_shards: int = 1
    use_cached: bool = False
    module: str | None = None

    def __post_init__(self) -> None:
        """Raises `UserError` for a number that can never work."""
        least = {"batch_size": 1, "num_shards": 1, "seed": 0}
        values = [(name, getattr(self, name), minimum) for name, minimum in least.items()]
        values += [(f"task_feature_lengths[{name!r}]", size, 1) for name, size in self.task_feature_lengths.items()]
        for name, value, minimum in values:
            if value < minimum:
                raise UserError(f"DatasetConfig.{name} is {value}; it must be at least {minimum}")


class WeightedTask(NamedTuple):
    """A task and its share of a mixture (any unit)."""

    task: seqio.Task
    rate: float


def weighted_tasks(config: DatasetConfig) -> list[WeightedTask]:
    """The tasks behind `config.mixture_or_task_name`, nested mixtures flattened, with `config.vocabulary` if it is set.

    Args:
      config: names the task or mixture, the split, and the module that registers it.

    Returns:
      One entry per task that has the split and a rate above 0, sorted by name.

    Raises:
      UserError: the module cannot be imported, no task has the split, tasks disagree on a vocabulary, or a task cannot
        be read as `config` asks.
    """
    if config.module is not None:
        try:
            importlib.import_module(config.module)
        except ImportError as error:
            raise UserError(f"DatasetConfig.module {config.module!r} cannot be imported: {error}") from error
    name, split = config.mixture_or_task_name, config.split
    provider = tasks.get_task_or_mixture(name)
    mixed = [WeightedTask(provider, 1.0)]
    if isinstance(provider, seqio.Mixture):
        mixed = [WeightedTask(task, provider.get_rate(task)) for task in provider.tasks]
    mixed = [entry for entry in mixed if entry.rate > 0]
    splits = sorted({known for task, _ in mixed for known in task.splits})
    if split not in splits:
        raise UserError(f"DatasetConfig.split {split!r} is not a split of {name!r}; it has: {', '.join(splits)}")
    for task, _ in mixed:
        if split not in task.splits:
            logging.warning("%s: task %s has no split %r, left out", name, task.name, split)
        elif config.use_cached and task.supports_caching and not task.cache_dir:
            raise UserError(f"DatasetConfig.use_cached: {task.name!r} is in none of seqio's cache directories")
        elif task.requires_caching and not config.use_cached:
            raise UserError(f"{task.name!r} can only be read from seqio's cache: set DatasetConfig.use_cached = True")
    mixed = [entry for entry in mixed if split in entry.task.splits]
    if config.vocabulary is not None:
        mixed = [WeightedTask(tasks.with_vocabulary(task, config.vocabulary), rate) for task, rate in mixed]
    for (first, _), (second, _) in itertools.pairwise(mixed):
        for feature in first.output_features.keys() & second.output_features.keys():
            if first.output_features[feature].vocabulary != second.output_features[feature].vocabulary:
                raise UserError(
                    f"{name!r}: {first.name!r} and {second.name!r} have different vocabularies for {feature!r}; "
                    "set DatasetConfig.vocabulary to use one for all"
                )
    return mixed


class ShardPosition(TypedDict):
    """Where one shard stands: the next row of its current block, and where each task stood at that block's start."""

    block: int
    row: int
    tasks: dict[str, list[int]]  # name -> [epoch, examples of that epoch already used]


Position = dict[str, ShardPosition]
"""Where a loader stands, ready for JSON: shard number (as a string) -> its position."""


class TrainLoader:
    """Endless batches for one process, which can start again from any position, on any number of processes."""

    def __init__(
        self, config: DatasetConfig, converter: FeatureConverter, process_index: int = 0, process_count: int = 1
    ) -> None:
        """Checks the configuration; reads nothing yet.

        Shard `v` feeds rows `[v * b, (v + 1) * b)` of the global batch, `b = batch_size / num_shards`; process `p` gets
        rows `[p * c, (p + 1) * c)`, `c = batch_size / process_count`, and reads just the shards that these rows touch.

        Args:
          config: what to read.
          converter: makes arrays of examples.
          process_index: this process, from 0.
          process_count: processes that share a global batch.

        Raises:
          UserError: a name, split, feature or vocabulary is wrong, or the batch cannot be divided.
        """
        self._config, self._converter = config, converter
        self._mixed = weighted_tasks(config)
        for task, _ in self._mixed:
            _check_task(task, config, converter)
            if config.shuffle and task.shuffle_buffer_size is None and not task.source.performs_internal_shuffling:
                raise UserError(f"{task.name!r} forbids shuffling: set DatasetConfig.shuffle = False")
        _check_divisible(config.batch_size, math.lcm(config.num_shards, process_count))
        self._shard_rows = config.batch_size // config.num_shards
        rows = config.batch_size // process_count
        start = process_index * rows
        self._shards = range(start // self._shard_rows, -(-(start + rows) // self._shard_rows))
        first_row = self._shards.start * self._shard_rows  # of the rows that are read here, the ones that we feed
        self._own_rows = slice(start - first_row, start - first_row + rows)

    def batches(self, position: Position | None = None) -> Iterator[tuple[dict[str, np.ndarray], Position]]:
        """Batches from `position` on.

        Args:
          position: what an earlier loader gave with the last batch used; `None` for the beginning. With several
            processes, pass the union (`|`) of what they gave if their number has changed.

        Returns:
          Endless pairs: this process's rows of the next global batch, int32 `[batch_size / process_count, length]` by
          feature name, and the position after it, of the shards that this process reads.

        Raises:
          UserError: `position` comes from another `num_shards` or mixture; while iterating: a task has no examples.
        """
        starts = {shard: self._start(shard, position) for shard in self._shards}
        return self._generate({shard: self._rows(shard, start) for shard, start in starts.items()})

    def _generate(
        self, shards: Mapping[int, Iterator[tuple[Row, ShardPosition]]]
    ) -> Iterator[tuple[dict[str, np.ndarray], Position]]:
        """Takes each shard's share of a batch, side by side."""
        while True:
            rows: list[Row] = []
            after: Position = {}
            for shard, stream in shards.items():
                for row, after[str(shard)] in itertools.islice(stream, self._shard_rows):
                    rows.append(row)
            own = rows[self._own_rows]
            yield self._converter.convert(own, self._config.task_feature_lengths, self._config.pack), after

    def _start(self, shard: int, position: Position | None) -> ShardPosition:
        """Where `shard` starts, checked against this configuration."""
        names = [task.name for task, _ in self._mixed]
        if position is None:
            return {"block": 0, "row": 0, "tasks": {name: [0, 0] for name in names}}
        found = position.get(str(shard))
        if found is None or any(int(known) >= self._config.num_shards for known in position):
            raise UserError(
                f"the data position has shards {', '.join(position)}, but DatasetConfig.num_shards is "
                f"{self._config.num_shards}: continue with the num_shards that it was saved with"
            )
        if found["tasks"].keys() != set(names):
            raise UserError(
                f"the data position has tasks {', '.join(found['tasks'])}, but {self._config.mixture_or_task_name!r} "
                f"has {', '.join(names)}: continue with the mixture that it was saved with"
            )
        return found

    def _rows(self, shard: int, start: ShardPosition) -> Iterator[tuple[Row, ShardPosition]]:
        """Rows of one shard, each with the position after it."""
        config = self._config
        streams = [
            _examples_forever(task, config, self._converter, shard, start["tasks"][task.name]) for task, _ in self._mixed
        ]
        names = [task.name for task, _ in self._mixed]
        before, first = start["tasks"], start["row"]
        for block in itertools.count(start["block"]):
            after, examples = dict(before), []
            for choice in self._choices(shard, block):
                example, after[names[choice]] = next(streams[choice])
                examples.append(example)
            groups = [[index] for index in range(BLOCK)]
            if config.pack:
                groups = self._converter.pack(examples, config.task_feature_lengths)
            for row in range(first, len(groups)):
                position: ShardPosition = {"block": block, "row": row + 1, "tasks": before}
                if row + 1 == len(groups):
                    position = {"block": block + 1, "row": 0, "tasks": after}
                yield [examples[index] for index in groups[row]], position
            before, first = after, 0

    def _choices(self, shard: int, block: int) -> list[int]:
        """The task of each example of a block, drawn by the mixture's rates."""
        bits = np.random.Philox(key=[self._config.seed, shard], counter=[0, 0, 0, block])
        bounds = np.cumsum([rate for _, rate in self._mixed])
        return np.searchsorted(bounds / bounds[-1], np.random.Generator(bits).random(BLOCK), side="right").tolist()


class EvalBatch(NamedTuple):
    """Rows for the network, and the examples they came from.

    Attributes:
      batch: this process's rows, int32 `[batch_size / process_count, length]` by feature name, unpacked.
      examples: the real examples of the global batch, in order: row `i` is `examples[i]`, and any further row is
        padding without loss weight. They hold all that the task gives, such as `inputs_pretokenized`.
    """

    batch: dict[str, np.ndarray]
    examples: list[Mapping[str, object]]


def eval_batches(
    config: DatasetConfig,
    task: seqio.Task,
    converter: FeatureConverter,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[EvalBatch]:
    """One pass over one task, in order and unpacked (`config.shuffle`, `pack` and `num_shards` play no part).

    Args:
      config: lengths, batch size, split and seed.
      task: from `weighted_tasks(config)`.
      converter: makes arrays of examples.
      limit: read this many examples at most.
      process_index: this process, from 0.
      process_count: processes that share a global batch; each reads all examples and lays out its own rows.

    Returns:
      Batches, all of the same shape.

    Raises:
      UserError: a feature is missing, the batch cannot be divided, or (while iterating) the split has no examples.
    """
    _check_task(task, config, converter)
    _check_divisible(config.batch_size, process_count)
    rows = config.batch_size // process_count
    own = slice(process_index * rows, (process_index + 1) * rows)

    def generate() -> Iterator[EvalBatch]:
        dataset = _open(dataclasses.replace(config, shuffle=False, num_shards=1), task, shard=0, epoch=0)
        _check_features(task, dataset, converter)
        examples = (dataset if limit is None else dataset.take(limit)).as_numpy_iterator()
        for count in itertools.count():
            batch = list(itertools.islice(examples, config.batch_size))
            if not batch and count == 0:
                raise UserError(f"{task.name!r} has no examples in its split {config.split!r}")
            if not batch:
                return
            padded = [[example] for example in batch] + [[]] * (config.batch_size - len(batch))
            yield EvalBatch(converter.convert(padded[own], config.task_feature_lengths, packed=False), batch)

    return generate()


def prefetch(items: Iterable[T], size: int = 2) -> Generator[T, None, None]:
    """Makes up to `size` items ahead in a background thread.

    The thread starts with the first item and ends when the items do, or when this generator is closed or dropped. What
    `items` raises is raised here, in its turn.

    Args:
      items: made in the thread, one after the other.
      size: items that are ready or being made, at least 1.

    Returns:
      The items, in order.
    """
    end = object()
    iterator = iter(items)
    worker = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        pending: deque[Future[T | object]] = deque(worker.submit(next, iterator, end) for _ in range(size))
        while (item := pending.popleft().result()) is not end:
            pending.append(worker.submit(next, iterator, end))
            yield item
    finally:
        worker.shutdown(cancel_futures=True)


def host_to_devices(batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """Joins every process's rows into global arrays.

    Args:
      batch: this process's rows, `[batch_size / process_count, length]` by feature name.
      sharding: of a global `[batch_size, length]` array, e.g. a `NamedSharding` over the mesh's batch axes.

    Returns:
      Global arrays under the same names.
    """
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def _check_divisible(batch_size: int, by: int) -> None:
    if batch_size % by:
        below, above = batch_size // by * by, (batch_size // by + 1) * by
        raise UserError(
            f"DatasetConfig.batch_size {batch_size} is not divisible by {by} (shards and processes share it evenly); "
            f"the nearest that works is {above if above - batch_size <= batch_size - below or not below else below}"
        )


def _check_task(task: seqio.Task, config: DatasetConfig, converter: FeatureConverter) -> None:
    for feature in converter.task_features:
        if feature not in config.task_feature_lengths:
            raise UserError(
                f"DatasetConfig.task_feature_lengths has no {feature!r}, which {type(converter).__name__} reads; "
                f"it has: {', '.join(config.task_feature_lengths)}"
            )
        if feature not in task.output_features:
            raise UserError(
                f"{task.name!r} gives no {feature!r}, which {type(converter).__name__} reads; "
                f"it gives: {', '.join(task.output_features)}"
            )


def _check_features(task: seqio.Task, dataset: tf.data.Dataset, converter: FeatureConverter) -> None:
    for feature in converter.task_features:
        spec = dataset.element_spec.get(feature)
        if spec is None or not spec.dtype.is_integer or spec.shape.rank != 1:
            raise UserError(f"{task.name!r}: {feature!r} must be a vector of token ids; its preprocessors give {spec}")


def _seed(*parts: int | str) -> int:
    """A seed of 31 bits for each combination of `parts`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()) >> 1


class _InOrderOf(seqio.DataSource):
    """A source that is read in the order of its own seed, whatever the seed of the preprocessors.

    Shards must agree on the order of the source, or they would not be disjoint, but not on the noise they add: seqio
    has one seed for both.
    """

    def __init__(self, source: seqio.DataSource, seed: int) -> None:
        super().__init__(source.splits, None, source.caching_permitted, source.performs_internal_shuffling)
        self._source, self._seed = source, seed

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return self._source.supports_arbitrary_sharding

    def list_shards(self, split: str) -> Sequence[str]:
        return self._source.list_shards(split)

    def get_dataset(
        self, split: str, shuffle: bool, seed: int, shard_info: seqio.ShardInfo | None = None
    ) -> tf.data.Dataset:
        order: int | None = self._seed
        if isinstance(self._source, seqio.FunctionDataSource):
            # seqio refuses a seed where the function takes none: then it is read as it comes, and shuffled later.
            if "seed" not in inspect.signature(self._source._dataset_fn).parameters:
                shuffle, order = False, None
        return self._source.get_dataset(split=split, shuffle=shuffle, seed=order, shard_info=shard_info)


def _open(config: DatasetConfig, task: seqio.Task, shard: int, epoch: int) -> tf.data.Dataset:
    """One epoch of one task on one shard."""
    order, noise = _seed(config.seed, task.name, epoch), _seed(config.seed, task.name, epoch, shard)
    cached = config.use_cached and task.supports_caching  # then the source is seqio's own, and gets the common seed
    with _SEQIO_LOCK:
        dataset = (task if cached else task.replace(source=_InOrderOf(task.source, order))).get_dataset(
            sequence_length=dict(config.task_feature_lengths),
            split=config.split,
            use_cached=cached,
            shuffle=config.shuffle,
            seed=order if cached else noise,
            shard_info=seqio.ShardInfo(shard, config.num_shards),
            num_epochs=1,
            try_in_mem_cache=False,  # each epoch is a new dataset: nothing would ever read the cache
        )
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.private_threadpool_size = min(8, os.cpu_count() or 1)
    options.threading.max_intra_op_parallelism = 1
    return dataset.with_options(options)


def _examples_forever(
    task: seqio.Task, config: DatasetConfig, converter: FeatureConverter, shard: int, start: Sequence[int]
) -> Iterator[tuple[Example, list[int]]]:
    """Examples of one task on one shard from `start` on, each with the [epoch, index] after it."""
    epoch, index = start
    while True:
        dataset = _open(config, task, shard, epoch)
        _check_features(task, dataset, converter)
        for example in _unpadded(dataset.skip(index), converter.task_features):
            index += 1
            yield example, [epoch, index]
        if index == 0:
            part = f", shard {shard} of {config.num_shards}" if config.num_shards > 1 else ""
            raise UserError(f"{task.name!r} has no examples in its split {config.split!r}{part}")
        epoch, index = epoch + 1, 0


def _unpadded(dataset: tf.data.Dataset, features: Sequence[str]) -> Iterator[Example]:
    """The token features of every example, without the zeros at their end; in chunks, which is ten times faster."""
    chunks = dataset.map(lambda example: {name: example[name] for name in features}).padded_batch(_CHUNK).prefetch(1)
    for chunk in chunks.as_numpy_iterator():
        columns = []
        for tokens in chunk.values():
            place = np.arange(1, tokens.shape[1] + 1)
            sizes = np.where(tokens != 0, place, 0).max(axis=1, initial=0).tolist()
            columns.append([row[:size] for row, size in zip(tokens, sizes, strict=True)])
        for values in zip(*columns, strict=True):
            yield dict(zip(chunk, values, strict=True))
