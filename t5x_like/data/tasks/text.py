"""Text-to-text tasks: translation of the Bible, and the class of a noun, in words."""

import functools
from collections.abc import Mapping

import seqio

from t5x_like.data import corpora, metrics, preprocessors
from t5x_like.data.sources import CorpusSource
from t5x_like.data.vocabularies import sentencepiece_vocabulary

_FEATURES = {name: seqio.Feature(sentencepiece_vocabulary()) for name in ("inputs", "targets")}
_SPLITS = ("train", "validation", "test")
_TOKENIZE = (
    seqio.preprocessors.tokenize,
    seqio.CacheDatasetPlaceholder(),  # what is before it may be cached (scripts/cache_tasks.py): no lengths, no draws
    seqio.preprocessors.append_eos_after_trim,
)


def strip(text: str, example: Mapping[str, object] | None = None, is_target: bool = False) -> str:
    """A seqio postprocessor, of targets and predictions alike: white space around a text does not count."""
    return text.strip()


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


TASKS = (
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
