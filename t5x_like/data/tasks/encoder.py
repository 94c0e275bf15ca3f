"""Tasks for encoders: a class of a text, a label for each word, the answer in a passage, one of several choices."""

import functools
from collections.abc import Mapping
from typing import cast

import numpy as np
import seqio

from t5x_like.data import corpora, metrics, preprocessors, questions
from t5x_like.data.objectives import encoder_inputs
from t5x_like.data.sources import CorpusSource
from t5x_like.data.tasks.pretraining import POSITIONS
from t5x_like.data.vocabularies import labels_vocabulary, numbers_vocabulary, sentencepiece_vocabulary

_SPLITS = ("train", "validation", "test")
_TEXT = seqio.Feature(sentencepiece_vocabulary(), add_eos=False)
_POSITIONS = seqio.Feature(POSITIONS, add_eos=False)
_SEGMENTS = seqio.Feature(numbers_vocabulary(2), add_eos=False)


def _labels(*names: str) -> seqio.Feature:
    return seqio.Feature(labels_vocabulary(names), add_eos=False)


def labels_of_words(text: str, example: Mapping[str, object], is_target: bool = False) -> list[str]:
    """A seqio postprocessor: the labels in `text`; of a prediction, which has one for each token, those of words."""
    labels = text.split()
    return labels if is_target else [labels[place] for place in cast(np.ndarray, example["target_positions"])]


TASKS = (
    seqio.Task(
        "wordnet_supersense_label",
        source=CorpusSource(corpora.wordnet, _SPLITS),
        preprocessors=[
            functools.partial(preprocessors.classify, prefix=None, fields=("word", "definition"), label="supersense"),
            seqio.preprocessors.tokenize,
            encoder_inputs.frame,
        ],
        output_features={"inputs": _TEXT, "targets": _labels(*corpora.SUPERSENSES)},
        metric_fns=[metrics.accuracy],
        shuffle_buffer_size=None,  # the source shuffles
    ),
    seqio.Task(
        "bible_punctuation",
        source=CorpusSource(questions.punctuated, _SPLITS),
        preprocessors=[encoder_inputs.label_words],
        output_features={"inputs": _TEXT, "targets": _labels(*questions.MARKS), "target_positions": _POSITIONS},
        postprocess_fn=labels_of_words,
        metric_fns=[metrics.label_accuracy],
        shuffle_buffer_size=None,
    ),
    seqio.Task(
        "wordnet_class_member",
        source=CorpusSource(questions.class_members, _SPLITS),
        preprocessors=[encoder_inputs.locate_answer],
        output_features={"inputs": _TEXT, "targets": _POSITIONS, "segment_ids": _SEGMENTS},
        metric_fns=[metrics.span_f1],
        shuffle_buffer_size=None,
    ),
    seqio.Task(
        "wordnet_definition_choice",
        source=CorpusSource(questions.definition_choices, _SPLITS),
        preprocessors=[encoder_inputs.choose],
        output_features={"inputs": _TEXT, "targets": _labels(*questions.LETTERS), "segment_ids": _SEGMENTS},
        metric_fns=[metrics.accuracy],
        shuffle_buffer_size=None,
    ),
)
