"""From a user's own texts to examples, as the tasks that a model was trained on would have made them."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import seqio

from t5x_like.data.features import (
    ClassificationFeatures,
    DecoderFeatures,
    MaskedLMFeatures,
    PermutationFeatures,
    TokenLabelFeatures,
)
from t5x_like.data.packing import EncoderDecoderFeatures, Example, FeatureConverter
from t5x_like.data.vocabularies import special_tokens
from t5x_like.errors import UserError

BLANK = "[MASK]"
"""What a user writes for a token that a masked language model is to fill in."""


class Vocabularies(NamedTuple):
    """What texts are written in; labels have a vocabulary of their own."""

    inputs: seqio.Vocabulary
    targets: seqio.Vocabulary


@functools.singledispatch
def example(converter: FeatureConverter, inputs: str, targets: str, vocabularies: Vocabularies) -> Example:
    """One example for `converter` of an input and a target, either of which may be empty.

    Encoder-decoders and decoders read `inputs` and write `targets`, which end with EOS. A masked language model reads
    `[CLS] inputs [SEP] targets [SEP]` (`[CLS] targets [SEP]` without inputs), a permuted one `inputs targets [SEP]
    [CLS]`; both are asked for every token of the targets. Without targets, a masked one is asked for every `BLANK`. A
    classifier reads `[CLS] inputs [SEP]`, and `targets` names labels.

    Raises:
      UserError: the model reads something that is not a pair of texts.
    """
    raise UserError(f"{type(converter).__name__}: its examples are no pairs of texts; use a task")


@example.register
def _(converter: EncoderDecoderFeatures, inputs: str, targets: str, vocabularies: Vocabularies) -> Example:
    return {
        "inputs": _ids([*vocabularies.inputs.encode(inputs), vocabularies.inputs.eos_id]),
        "targets": _ids([*vocabularies.targets.encode(targets), vocabularies.targets.eos_id]),
    }


@example.register
def _(converter: DecoderFeatures, inputs: str, targets: str, vocabularies: Vocabularies) -> Example:
    return {
        "inputs": _ids(vocabularies.inputs.encode(inputs)),
        "targets": _ids([*vocabularies.targets.encode(targets), vocabularies.targets.eos_id]),
    }


@example.register
def _(converter: MaskedLMFeatures, inputs: str, targets: str, vocabularies: Vocabularies) -> Example:
    given = _framed(inputs, targets, vocabularies.inputs) if targets else _blanks(inputs, vocabularies.inputs)
    return given | {"next_sentence": _ids([0])}


@example.register
def _(converter: PermutationFeatures, inputs: str, targets: str, vocabularies: Vocabularies) -> Example:
    first, second = (vocabularies.inputs.encode(text) for text in (inputs, targets))
    special = special_tokens(vocabularies.inputs)
    return {
        "inputs": _ids([*first, *second, special.sep, special.cls]),
        "targets": _ids(second),
        "target_positions": np.arange(len(first), len(first) + len(second), dtype=np.int32),
        "order": _ids([*[0] * len(first), *range(1, len(second) + 1), 0, 0]),  # from left to right
    }


@example.register(ClassificationFeatures)
@example.register(TokenLabelFeatures)
def _(converter: FeatureConverter, inputs: str, targets: str, vocabularies: Vocabularies) -> Example:
    special = special_tokens(vocabularies.inputs)
    labels = _ids(vocabularies.targets.encode(targets) if targets else [])
    return {
        "inputs": _ids([special.cls, *vocabularies.inputs.encode(inputs), special.sep]),
        "targets": labels,
        "target_positions": np.arange(1, len(labels) + 1, dtype=np.int32),
    }


def _framed(first: str, second: str, vocabulary: seqio.Vocabulary) -> dict[str, np.ndarray]:
    """`[CLS] first [SEP] second [SEP]`, of which every token of the second is a target."""
    special, targets = special_tokens(vocabulary), vocabulary.encode(second)
    opening = [special.cls, *([*vocabulary.encode(first), special.sep] if first else [])]
    tokens = [*opening, *targets, special.sep]
    return {
        "inputs": _ids(tokens),
        "segment_ids": _ids([0] * len(opening) + [1 if first else 0] * (len(tokens) - len(opening))),
        "targets": _ids(targets),
        "target_positions": np.arange(len(opening), len(opening) + len(targets), dtype=np.int32),
    }


def _blanks(text: str, vocabulary: seqio.Vocabulary) -> dict[str, np.ndarray]:
    """`[CLS] text [SEP]`, of which every `BLANK` is a target (whose token nobody knows: the mask stands for it)."""
    special, first, *rest = special_tokens(vocabulary), *text.split(BLANK)
    tokens = [special.cls, *vocabulary.encode(first)]
    for part in rest:
        tokens += [special.mask, *vocabulary.encode(part)]
    places = [place for place, token in enumerate(tokens) if token == special.mask]
    return {
        "inputs": _ids([*tokens, special.sep]),
        "targets": _ids([special.mask] * len(places)),
        "target_positions": _ids(places),
    }


def _ids(tokens: Sequence[int]) -> np.ndarray:
    return np.array(tokens, np.int32)
