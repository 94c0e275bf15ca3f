"""Unlabelled text, Jane Austen's novels, under every objective."""

import functools
from collections.abc import Callable

import seqio

from t5x_like.data import corpora, metrics, preprocessors
from t5x_like.data.objectives import autoregressive, masked_lm, span_corruption
from t5x_like.data.sources import CorpusSource
from t5x_like.data.vocabularies import numbers_vocabulary, sentencepiece_vocabulary

POSITIONS = numbers_vocabulary(2**20)
"""Places in an input."""

_WITH_EOS = seqio.Feature(sentencepiece_vocabulary())
_WITHOUT_EOS = seqio.Feature(sentencepiece_vocabulary(), add_eos=False)
_POSITIONS = seqio.Feature(POSITIONS, add_eos=False)
_BINARY = seqio.Feature(numbers_vocabulary(2), add_eos=False)

_TEXT_TO_TEXT = {"inputs": _WITH_EOS, "targets": _WITH_EOS}
_STREAM = {"inputs": _WITHOUT_EOS, "targets": _WITH_EOS}  # EOS ends a paragraph, not an example
_MASKED = {"inputs": _WITHOUT_EOS, "targets": _WITHOUT_EOS, "target_positions": _POSITIONS}
_PAIRS = {**_MASKED, "segment_ids": _BINARY, "next_sentence": _BINARY}
_PERMUTED = {**_MASKED, "order": _POSITIONS}

_TOKENIZE = functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False)


def _task(
    name: str,
    output_features: dict[str, seqio.Feature],
    *objective: Callable[..., object],
    text: Callable[..., object] = preprocessors.language_modelling,
) -> seqio.Task:
    return seqio.Task(
        name,
        source=CorpusSource(corpora.austen, ("train", "validation"), shuffled=False),  # novels have an order
        preprocessors=[text, _TOKENIZE, *objective],
        output_features=output_features,
        metric_fns=[metrics.log_likelihood],
        shuffle_buffer_size=4096,  # chunks; at 512 tokens the corpus has fewer
    )


TASKS = (
    _task(
        "austen_span_corruption",
        _TEXT_TO_TEXT,
        span_corruption.span_corruption,
        seqio.preprocessors.append_eos_after_trim,
    ),
    _task(
        "austen_masked_lm",
        _PAIRS,
        masked_lm.sentence_pairs,
        masked_lm.masked_lm,
        text=preprocessors.sentences,
    ),
    _task(
        "austen_whole_word_masked_lm",
        _PAIRS,
        masked_lm.sentence_pairs,
        masked_lm.whole_word_masked_lm,
        text=preprocessors.sentences,
    ),
    _task("austen_full_sentences", _MASKED, masked_lm.full_sentences, masked_lm.masked_lm),
    _task("austen_causal_lm", _STREAM, seqio.preprocessors.append_eos, autoregressive.causal_lm),
    _task("austen_prefix_lm", _STREAM, seqio.preprocessors.append_eos, autoregressive.prefix_lm),
    _task("austen_permutation_lm", _PERMUTED, autoregressive.permutation_lm),
)
