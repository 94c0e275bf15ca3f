"""seqio tasks -> this process's batches -> global arrays; and back to any batch from a few bytes of position.

Every random choice is a function of (seed, task, epoch, shard) or (seed, shard, block): nothing is carried.
The examples of a shard come in blocks of `BLOCK`. Mixing and packing never look past a block, so any batch is
found again from its block, its row in the packed block, and where each task stood when the block began.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypedDict, TypeVar

# TensorFlow logs a missing GPU as an error, and raises what really is one. Must be set before it is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
import seqio
import tensorflow as tf

from t5x_like.data.packing import Example, FeatureConverter, Row, check_lengths
from t5x_like.data.sources import Ordered
from t5x_like.data.tasks import registry
from t5x_like.distributed import even_share
from t5x_like.errors import UserError

BLOCK = 1024
"""Examples that are mixed and packed together. Part of the data order: another value gives other batches."""

T = TypeVar("T")

_CHUNK = 256  # examples that leave TensorFlow at once; for speed only

_SEQIO_LOCK = threading.Lock()  # seqio deals out the preprocessors' seeds from a global variable

with contextlib.suppress(RuntimeError):  # a program that already runs TensorFlow on its GPU keeps it
    tf.config.set_visible_devices([], "GPU")  # or TensorFlow takes the memory that JAX needs

# seqio warns, every epoch, of sources that begin again when a run does; here they go on where it stopped.
logging.getLogger("absl").addFilter(lambda record: "uncached FunctionDataset" not in str(record.msg))


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """What to read, and how. More than eight fields: they are T5X's, by T5X's names, and so are the bindings.

    Attributes:
      mixture_or_task_name: a registered seqio task or mixture.
      task_feature_lengths: maximum length of `inputs` and of `targets`, in tokens; what goes along with one of
        them, such as `segment_ids`, is as long as it.
      batch_size: rows of the global batch.
      split: e.g. `train`; a mixture leaves out the tasks that lack it, as in seqio.
      shuffle: read the source in random order, and shuffle examples in the task's buffer.
      pack: put several examples in a row.
      seed: of every random choice made here.
      vocabulary: used instead of the tasks' own.
      num_shards: parts that the data is dealt into, each feeding its own rows of the batch. The data order
        depends on it, not on the number of processes; with one shard per process, each reads only its own.
      use_cached: read from seqio's offline cache where a task supports it.
      cache_dirs: folders to look for that cache in, beside those that `seqio.add_global_cache_dirs` was given.
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
    cache_dirs: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raises `UserError` for a number that can never work."""
        for name, value in {"batch_size": self.batch_size, "num_shards": self.num_shards}.items():
            if value < 1:
                raise UserError(f"DatasetConfig.{name} is {value}; it must be at least 1")
        lengths = {f"task_feature_lengths[{name!r}]": size for name, size in self.task_feature_lengths.items()}
        for name, value in {"seed": self.seed, **lengths}.items():
            if value < 0:
                raise UserError(f"DatasetConfig.{name} is {value}; it must not be negative")


class WeightedTask(NamedTuple):
    """A task and its share of a mixture, in any unit."""

    task: seqio.Task
    rate: float


def weighted_tasks(config: DatasetConfig) -> list[WeightedTask]:
    """The tasks behind `config.mixture_or_task_name`; nested mixtures are flattened.

    Args:
      config: names the task or mixture, the split and the vocabulary.

    Returns:
      The tasks that have the split, sorted by name; with `config.vocabulary` if it is set.

    Raises:
      UserError: no task has the split, or the tasks' vocabularies differ.
    """
    name, split = config.mixture_or_task_name, config.split
    provider = registry.get_task_or_mixture(name)
    mixed = [WeightedTask(provider, 1.0)]
    if isinstance(provider, seqio.Mixture):
        mixed = [WeightedTask(task, provider.get_rate(task)) for task in provider.tasks]
    splits = sorted({known for task, _ in mixed for known in task.splits})
    if split not in splits:
        raise UserError(f"DatasetConfig.split: {name!r} has no {split!r}; it has {', '.join(splits)}")
    lacking = [task.name for task, _ in mixed if split not in task.splits]
    if lacking:
        logging.getLogger(__name__).warning("%s without %s: no split %r", name, ", ".join(lacking), split)
    mixed = [entry for entry in mixed if entry.task.name not in lacking]
    if config.vocabulary is not None:
        mixed = [WeightedTask(registry.with_vocabulary(task, config.vocabulary), rate) for task, rate in mixed]
    for (first, _), (second, _) in itertools.pairwise(mixed):
        for feature, spec in first.output_features.items():
            if spec.vocabulary != second.output_features[feature].vocabulary:
                raise UserError(
                    f"mixture {name!r}: the vocabularies of {first.name!r} and {second.name!r} differ for "
                    f"{feature!r}; set DatasetConfig.vocabulary to use one for both"
                )
    return mixed


class ShardPosition(TypedDict):
    """Where one shard stands."""

    block: int
    row: int  # rows of the block already used
    tasks: dict[str, list[int]]  # name -> [epoch, examples of it already used], both when the block began


Position = dict[str, ShardPosition]
"""Where a loader stands, ready for JSON: shard number (as a string) -> its position."""


class TrainLoader:
    """Endless batches for one process, which can go on from any position, with any number of processes."""

    def __init__(
        self,
        config: DatasetConfig,
        converter: FeatureConverter,
        process_index: int = 0,
        process_count: int = 1,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Checks the configuration; reads nothing yet.

        Shard `s` feeds rows `[s * n, (s + 1) * n)` of a global batch, `n = batch_size / num_shards`. Process
        `p` gets rows `[p * m, (p + 1) * m)`, `m = batch_size / process_count`, and reads just their shards.

        Args:
          config: what to read.
          converter: makes arrays of examples.
          process_index: this process, from 0.
          process_count: processes that share a global batch.
          rows: the rows that this process gets instead, ascending; see `distributed.own_rows`.

        Raises:
          UserError: a name, split, feature or vocabulary is wrong, or the batch cannot be divided.
        """
        self._config, self._converter = config, converter
        self._mixed = weighted_tasks(config)
        self._names = [task.name for task, _ in self._mixed]
        for task, _ in self._mixed:
            _check_task(task, config, converter)
        _check_divisible(config.batch_size, math.lcm(config.num_shards, process_count))
        self._shard_rows = config.batch_size // config.num_shards
        self.rows = even_share(config.batch_size, process_index, process_count) if rows is None else rows
        self._shards = sorted({row // self._shard_rows for row in self.rows})

    def batches(self, position: Position | None = None) -> Iterator[tuple[dict[str, np.ndarray], Position]]:
        """Batches from `position` on.

        Args:
          position: what the loader gave with the last batch used; `None` for the beginning. If the number of
            processes has changed: the union (`|`) of what all of them gave.

        Returns:
          Endless pairs: this process's rows of the next global batch, int32 `[batch_size / process_count,
          length]` by feature name; and the position after it of the shards that this process reads.

        Raises:
          UserError: `position` comes from another `num_shards` or mixture; while iterating: a task is empty.
        """
        starts = {shard: self._start(shard, position) for shard in self._shards}
        return self._batches({shard: self._rows(shard, start) for shard, start in starts.items()})

    def _batches(
        self, shards: Mapping[int, Iterator[tuple[Row, ShardPosition]]]
    ) -> Iterator[tuple[dict[str, np.ndarray], Position]]:
        """Joins what each shard gives to a batch."""
        while True:
            rows: dict[int, Row] = {}
            after: Position = {}
            for shard, stream in shards.items():
                for number in range(shard * self._shard_rows, (shard + 1) * self._shard_rows):
                    rows[number], after[str(shard)] = next(stream)
            own, lengths = [rows[number] for number in self.rows], self._config.task_feature_lengths
            yield self._converter.convert(own, lengths, self._config.pack), after

    def _start(self, shard: int, position: Position | None) -> ShardPosition:
        """Where `shard` goes on, checked against the configuration."""
        if position is None:
            return {"block": 0, "row": 0, "tasks": {name: [0, 0] for name in self._names}}
        start, count = position.get(str(shard)), self._config.num_shards
        if start is None or any(int(known) >= count for known in position):
            raise UserError(
                f"the data position has shards {', '.join(position)}, DatasetConfig.num_shards is {count}: "
                "go on with the number that it was saved with"
            )
        if start["tasks"].keys() != set(self._names):
            name = self._config.mixture_or_task_name
            raise UserError(
                f"the data position has tasks {', '.join(start['tasks'])}, but {name!r} of "
                f"DatasetConfig.mixture_or_task_name has {', '.join(self._names)}: go on with the same tasks"
            )
        return start

    def _rows(self, shard: int, start: ShardPosition) -> Iterator[tuple[Row, ShardPosition]]:
        """Rows of one shard, each with the position after it."""
        config, places = self._config, start["tasks"]
        streams = [
            _TaskStream(task, config, _features_read(task, self._converter), shard, *places[task.name])
            for task, _ in self._mixed
        ]
        readers = [stream.examples() for stream in streams]
        done = start["row"]
        for block in itertools.count(start["block"]):
            places = {stream.task.name: [stream.epoch, stream.index] for stream in streams}
            examples = (next(readers[choice]) for choice in self._choices(shard, block))
            for number, row in enumerate(self._group(examples), start=1):
                if number > done:
                    yield row, {"block": block, "row": number, "tasks": places}
            done = 0

    def _group(self, examples: Iterator[Example]) -> Iterator[Row]:
        """Rows of the examples of one block."""
        if not self._config.pack:
            yield from ([example] for example in examples)
            return
        block = list(examples)
        for group in self._converter.pack(block, self._config.task_feature_lengths):
            yield [block[index] for index in group]

    def _choices(self, shard: int, block: int) -> list[int]:
        """The task of each example of a block, drawn by the rates; no two blocks share a Philox counter."""
        bits = np.random.Philox(key=[self._config.seed, shard], counter=[0, 0, 0, block])
        bounds = np.cumsum([rate for _, rate in self._mixed])
        draws = np.random.Generator(bits).random(BLOCK)
        return np.searchsorted(bounds / bounds[-1], draws, side="right").tolist()


class EvalBatch(NamedTuple):
    """Rows for the network, and the examples that they come from.

    Attributes:
      batch: this process's rows, int32 `[batch_size / process_count, length]` by feature name, unpacked.
      examples: the examples of the global batch, with all that the task gives, such as `inputs_pretokenized`.
        Row `i` of the global batch is `examples[i]`; any rows beyond them are padding without loss weight.
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
    rows: Sequence[int] | None = None,
) -> Iterator[EvalBatch]:
    """One pass over one task, in order and unpacked, whatever `config` says of shuffling, packing and shards.

    Args:
      config: lengths, batch size, split and seed.
      task: one of `weighted_tasks(config)`.
      converter: makes arrays of examples.
      limit: examples to read at most.
      process_index: this process, from 0.
      process_count: processes that share a global batch; each reads all examples and lays out its own rows.
      rows: the rows that this process gets instead, as for `TrainLoader`.

    Returns:
      Batches, all of the same shape.

    Raises:
      UserError: a feature is missing, or the batch cannot be divided; while iterating: the split is empty.
    """
    config = dataclasses.replace(config, shuffle=False, num_shards=1)
    _check_task(task, config, converter)
    _check_divisible(config.batch_size, process_count)
    own_rows = even_share(config.batch_size, process_index, process_count) if rows is None else rows
    features = _features_read(task, converter)

    def batches() -> Iterator[EvalBatch]:
        dataset = _open(task, config, features, shard=0, epoch=0)
        examples = (dataset if limit is None else dataset.take(limit)).as_numpy_iterator()
        real = list(itertools.islice(examples, config.batch_size))
        if not real:
            raise _empty(task, config)
        while real:
            tokens = [{name: example[name] for name in features} for example in real]
            all_rows = [[example] for example in tokens] + [[]] * (config.batch_size - len(real))
            own = [all_rows[number] for number in own_rows]
            batch = converter.convert(own, config.task_feature_lengths, packed=False)
            yield EvalBatch(batch, real)
            real = list(itertools.islice(examples, config.batch_size))

    return batches()


def prefetch(items: Iterable[T], size: int = 2) -> Generator[T, None, None]:
    """Makes items ahead of time in a background thread.

    The thread starts when the first item is asked for, and ends after the last one or when this generator is
    closed or dropped. What `items` raises is raised here, in its turn.

    Args:
      items: made one after the other, all in that thread.
      size: how many may be ready or in the making, at least 1.

    Returns:
      The same items in the same order.
    """
    iterator = iter(items)
    worker = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        pending = deque(worker.submit(next, iterator) for _ in range(size))
        while True:
            try:
                item = pending.popleft().result()
            except StopIteration:
                return
            pending.append(worker.submit(next, iterator))
            yield item
    finally:
        worker.shutdown(cancel_futures=True)


def host_to_devices(batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """Joins the rows of all processes into global arrays.

    Args:
      batch: the rows of the global batch that this process's devices hold, in order, by feature name.
      sharding: of a global `[batch_size, length]` array, e.g. a `NamedSharding` over the mesh's batch axes.

    Returns:
      Global arrays by the same names.
    """
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def _check_divisible(batch_size: int, by: int) -> None:
    if batch_size % by:
        nearest = max(1, round(batch_size / by)) * by
        raise UserError(
            f"DatasetConfig.batch_size is {batch_size}; equal parts for shards and processes need a multiple "
            f"of {by}: the nearest is {nearest}"
        )


def _check_task(task: seqio.Task, config: DatasetConfig, converter: FeatureConverter) -> None:
    reader = type(converter).__name__
    check_lengths(converter, config.task_feature_lengths)
    for feature in converter.task_features:
        if feature not in task.output_features:
            known = ", ".join(task.output_features)
            raise UserError(f"task {task.name!r} gives {known}; {reader} reads {feature!r}")
    if config.shuffle and task.shuffle_buffer_size is None and not task.source.performs_internal_shuffling:
        raise UserError(f"task {task.name!r} cannot be shuffled: set DatasetConfig.shuffle to False")
    if config.use_cached:
        seqio.add_global_cache_dirs(config.cache_dirs)
    if config.use_cached and task.supports_caching and not task.cache_dir:
        folders = ", ".join(seqio.utils.get_global_cache_dirs()) or "none given"
        raise UserError(
            f"DatasetConfig.use_cached: {task.name!r} is in none of seqio's cache directories ({folders}): name its "
            "own in DatasetConfig.cache_dirs, or write it with scripts/cache_tasks.py"
        )
    if task.requires_caching and not config.use_cached:
        raise UserError(f"task {task.name!r} must be read cached: set DatasetConfig.use_cached to True")


def _features_read(task: seqio.Task, converter: FeatureConverter) -> tuple[str, ...]:
    optional = (feature for feature in converter.optional_features if feature in task.output_features)
    return (*converter.task_features, *optional)


def _empty(task: seqio.Task, config: DatasetConfig, part: str = "") -> UserError:
    return UserError(f"task {task.name!r} has no examples in its split {config.split!r}{part}")


def _seed(*parts: int | str) -> int:
    """A seed of 31 bits for every combination of `parts`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()) >> 1


def _open(task: seqio.Task, config: DatasetConfig, features: Sequence[str], shard: int, epoch: int) -> tf.data.Dataset:
    """One epoch of one task on one shard."""
    order, noise = _seed(config.seed, task.name, epoch), _seed(config.seed, task.name, epoch, shard)
    cached = config.use_cached and task.supports_caching
    if cached or type(task) is not seqio.Task:
        noise = order  # the source of a cache or a subclass cannot be replaced, so one seed must do for both
    else:
        task = task.replace(source=Ordered(task.source, order))
    with _SEQIO_LOCK:
        tf.random.set_seed(noise)  # tf.data mixes this global seed into every other, and others may have set it
        dataset = task.get_dataset(
            sequence_length=dict(config.task_feature_lengths),
            split=config.split,
            use_cached=cached,
            shuffle=config.shuffle,
            seed=noise,
            shard_info=seqio.ShardInfo(shard, config.num_shards),
            num_epochs=1,
            try_in_mem_cache=False,  # it would be filled and never read, since each epoch is a new dataset
        )
    for feature in features:
        spec = dataset.element_spec.get(feature)
        if spec is None or not spec.dtype.is_integer or spec.shape.rank != 1:
            raise UserError(f"task {task.name!r} gives {feature!r} as {spec}, not as a vector of token ids")
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.private_threadpool_size = min(8, os.cpu_count() or 1)
    options.threading.max_intra_op_parallelism = 1
    return dataset.with_options(options)


@dataclasses.dataclass
class _TaskStream:
    """The examples of one task on one shard, epoch after epoch."""

    task: seqio.Task
    config: DatasetConfig
    features: tuple[str, ...]
    shard: int
    epoch: int
    index: int  # examples of this epoch already given

    def examples(self) -> Iterator[Example]:
        pad_ids = {name: self.task.output_features[name].vocabulary.pad_id for name in self.features}
        while True:
            dataset = _open(self.task, self.config, self.features, self.shard, self.epoch)
            for example in _unpadded(dataset.skip(self.index), pad_ids):
                self.index += 1
                yield example
            if self.index == 0:
                raise _empty(self.task, self.config, f", shard {self.shard} of {self.config.num_shards}")
            self.epoch, self.index = self.epoch + 1, 0


def _unpadded(dataset: tf.data.Dataset, pad_ids: Mapping[str, int]) -> Iterator[Example]:
    """The features of each example without padding at their end; chunks leave TensorFlow at once."""
    vectors = dataset.map(lambda example: {name: example[name] for name in pad_ids})
    padding = {name: tf.constant(pad_ids[name], spec.dtype) for name, spec in vectors.element_spec.items()}
    for chunk in vectors.padded_batch(_CHUNK, padding_values=padding).prefetch(1).as_numpy_iterator():
        columns = []
        for name, tokens in chunk.items():
            places = np.where(tokens != pad_ids[name], np.arange(1, tokens.shape[1] + 1), 0)
            sizes = places.max(axis=1, initial=0).tolist()
            columns.append([row[:size] for row, size in zip(tokens, sizes, strict=True)])
        for values in zip(*columns, strict=True):
            yield dict(zip(chunk, values, strict=True))
