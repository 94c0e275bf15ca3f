"""Sources for seqio tasks: rows in memory, and any source read in an order of its own."""

import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import seqio
import tensorflow as tf

from t5x_like.errors import UserError


class CorpusSource(seqio.DataSource):
    """Rows in memory as a seqio source, for any number of shards: each has its own stretch of the rows.

    Args:
        rows: gives a split's rows, all of one NamedTuple type; its fields are the features of an example.
        splits: the names of all splits.
        shuffled: whether to obey seqio's `shuffle`, and then over all rows; if not, they keep their order.
    """

    def __init__(
        self, rows: Callable[[str], Sequence[NamedTuple]], splits: Sequence[str], shuffled: bool = True
    ) -> None:
        super().__init__(splits, performs_internal_shuffling=shuffled)
        self._rows = rows

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """Yes."""
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        """All rows as one shard; seqio does not ask where sharding is arbitrary."""
        return [split]

    def num_input_examples(self, split: str) -> int:
        """The number of rows."""
        return len(self._rows(split))

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
    ) -> tf.data.Dataset:
        """One pass over the rows of a shard.

        Raises:
            UserError: if the shard would be empty.
        """
        rows = self._rows(split)
        shard = shard_info or seqio.ShardInfo(index=0, num_shards=1)
        if len(rows) < shard.num_shards:
            raise UserError(f"split {split!r} has {len(rows)} rows, too few for {shard.num_shards} shards")
        start, end = (i * len(rows) // shard.num_shards for i in (shard.index, shard.index + 1))
        rows = rows[start:end]
        columns = dict(zip(rows[0]._fields, zip(*rows, strict=True), strict=True))
        dataset = tf.data.Dataset.from_tensor_slices({name: list(column) for name, column in columns.items()})
        if shuffle and self.performs_internal_shuffling:
            dataset = dataset.shuffle(len(rows), seed=seed)
        return dataset


class Ordered(seqio.DataSource):
    """A source that is read in the order of its own seed, whatever seed the preprocessors get.

    The shards of a task must agree on the order of its source, or they overlap, but not on the noise that its
    preprocessors draw; seqio has one seed for both.
    """

    def __init__(self, source: seqio.DataSource, seed: int) -> None:
        super().__init__(source.splits, None, source.caching_permitted, source.performs_internal_shuffling)
        self._source, self._seed = source, seed

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """As the source."""
        return self._source.supports_arbitrary_sharding

    def list_shards(self, split: str) -> Sequence[str]:
        """As the source."""
        return self._source.list_shards(split)

    def get_dataset(
        self, split: str, shuffle: bool, seed: int, shard_info: seqio.ShardInfo | None = None
    ) -> tf.data.Dataset:
        """One pass in the order of the own seed; `seed` is not looked at."""
        order: int | None = self._seed
        function = getattr(self._source, "_dataset_fn", None)  # of a `seqio.FunctionDataSource`
        if function is not None and "seed" not in inspect.signature(function).parameters:
            shuffle, order = False, None  # seqio would raise; the task's buffer still shuffles
        return self._source.get_dataset(split=split, shuffle=shuffle, seed=order, shard_info=shard_info)
