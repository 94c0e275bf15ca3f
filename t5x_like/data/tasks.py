"""The seqio tasks and mixtures on the shipped corpora, registered when this module is imported.

Tasks: `austen_span_corruption`, `bible_en_es`, `bible_es_en`, `wordnet_supersense`.
Mixtures: `bible_translation` (both directions), `quickstart` (`bible_en_es` and `wordnet_supersense`).
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import seqio
import tensorflow as tf

from t5x_like.data import corpora, metrics, objectives, preprocessors
from t5x_like.data.vocabularies import sentencepiece_vocabulary
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


def strip(text: str, example: Mapping[str, object] | None = None, is_target: bool = False) -> str:
    """A seqio postprocessor, of targets and predictions alike: white space around a text does not count."""
    return text.strip()


_FEATURES = {name: seqio.Feature(sentencepiece_vocabulary(), add_eos=True) for name in ("inputs", "targets")}
_SPLITS = ("train", "validation", "test")
_TOKENIZE = (seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim)


def _translation_task(name: str, source_language: str, target_language: str) -> seqio.Task:
    translate = functools.partial(
        preprocessors.translate, source_language=source_language, target_language=target_language
    )
    return seqio.Task(
        name,
        source=CorpusSource(corpora.bible, _SPLITS),
        preprocessors=[translate, *_TOKENIZE],
        output_features=_FEATURES,
        postprocess_fn=strip,
        metric_fns=[metrics.bleu, metrics.chrf],
        shuffle_buffer_size=None,  # the source shuffles
    )


_TASKS = (
    seqio.Task(
        "austen_span_corruption",
        source=CorpusSource(corpora.austen, ("train", "validation"), shuffled=False),  # novels have an order
        preprocessors=[
            preprocessors.language_modelling,
            functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
            objectives.span_corruption,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=_FEATURES,
        metric_fns=[metrics.log_likelihood],
        shuffle_buffer_size=4096,  # chunks; at 512 tokens the corpus has fewer
    ),
    _translation_task("bible_en_es", "English", "Spanish"),
    _translation_task("bible_es_en", "Spanish", "English"),
    seqio.Task(
        "wordnet_supersense",
        source=CorpusSource(corpora.wordnet, _SPLITS),
        preprocessors=[
            functools.partial(
                preprocessors.classify, prefix="supersense", fields=("word", "definition"), label="supersense"
            ),
            *_TOKENIZE,
        ],
        output_features=_FEATURES,
        postprocess_fn=strip,
        metric_fns=[metrics.accuracy],
        shuffle_buffer_size=None,
    ),
)
_MIXTURES = {  # rates count examples
    "bible_translation": [("bible_en_es", 1.0), ("bible_es_en", 1.0)],
    "quickstart": [("bible_en_es", 1.0), ("wordnet_supersense", 1.0)],
}


def register() -> None:
    """Adds what seqio's registries lack: on import, and again in `get_task_or_mixture` if they were reset."""
    for task in _TASKS:
        if task.name not in seqio.TaskRegistry.names():
            seqio.TaskRegistry.add_provider(task.name, task)
    for name, rates in _MIXTURES.items():
        if name not in seqio.MixtureRegistry.names():
            seqio.MixtureRegistry.add(name, rates)


def get_task_or_mixture(name: str) -> seqio.Task | seqio.Mixture:
    """The task or mixture of that name, ours or any that an imported module has registered.

    Raises:
        UserError: if there is none; it names the nearest ones.
    """
    register()
    known = [*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()]
    if name not in known:
        nearest = difflib.get_close_matches(name, known) or sorted(known)
        raise UserError(
            f"no seqio task or mixture is named {name!r}; the nearest: {', '.join(nearest)}. "
            "A task of your own is found once the module that registers it is imported"
        )
    return seqio.get_mixture_or_task(name)


def with_vocabulary(task: seqio.Task, vocabulary: seqio.Vocabulary) -> seqio.Task:
    """The same task with another vocabulary, not registered; features that are no text keep theirs.

    A task that changes is no longer read from seqio's offline cache, which holds the old vocabulary's ids.

    Raises:
        UserError: if the task is of a subclass of `seqio.Task`, which seqio cannot copy.
    """
    features = {
        name: feature
        if isinstance(feature.vocabulary, seqio.PassThroughVocabulary)
        else dataclasses.replace(feature, vocabulary=vocabulary)
        for name, feature in task.output_features.items()
    }
    if features == task.output_features:
        return task
    if type(task) is not seqio.Task:
        raise UserError(f"task {task.name!r} is a {type(task).__name__}; only a plain seqio.Task can change vocabulary")
    steps = [step for step in task.preprocessors if not isinstance(step, seqio.CacheDatasetPlaceholder)]
    return task.replace(output_features=features, preprocessors=steps)


register()
