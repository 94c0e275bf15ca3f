"""The heads that encoders have over there: what makes each, and which one a folder has."""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from t5x_like.architectures.bert import Bert
from t5x_like.architectures.heads import (
    ClassificationHead,
    MaskedLanguageModelHead,
    NoHead,
    SpanHead,
    TokenClassificationHead,
)
from t5x_like.checkpoints.huggingface.files import Tensors
from t5x_like.data.features import ClassificationFeatures, MaskedLMFeatures, TokenLabelFeatures
from t5x_like.models.classification import ClassificationModel, Likeliest, LikeliestSpan
from t5x_like.models.masked_lm import MaskedLMModel

Heads = Mapping[str, Mapping[str, str]]
"""Our modules and theirs in every head, by the last part of the name of its class over there."""

PRETRAINING = "ForPreTraining"
MASKED = "ForMaskedLM"
SEQUENCE = "ForSequenceClassification"
TOKENS = "ForTokenClassification"
SPAN = "ForQuestionAnswering"
NONE = "Model"

Head: TypeAlias = MaskedLanguageModelHead | ClassificationHead | TokenClassificationHead | SpanHead | NoHead


def head_of(tensors: Tensors, heads: Heads, architectures: object) -> str:
    """The first head of which all modules are there; a language model's, or else the one that the config names."""
    modules = {name.rpartition(".")[0] for name in tensors} | tensors.keys()
    said = [str(name) for name in architectures] if isinstance(architectures, Iterable) else []
    named = [head for head in heads if any(name.endswith(head) for name in said)]
    order = [head for head in (PRETRAINING, MASKED, *named, *heads) if head in heads]
    return next(head for head in order if modules.issuperset(heads[head].values()))


def make_head(kind: str, num_labels: int, masked: MaskedLanguageModelHead, dtype: str) -> Head:
    """A head.

    Args:
      kind: a key of `Heads`.
      num_labels: of a classifier.
      masked: what a language model has.
      dtype: of products.
    """
    makers: dict[str, Callable[[], Head]] = {
        PRETRAINING: lambda: masked.clone(next_sentence=ClassificationHead(2, dtype=dtype)),
        MASKED: lambda: masked,
        SEQUENCE: lambda: ClassificationHead(num_labels, dtype=dtype),
        TOKENS: lambda: TokenClassificationHead(num_labels),
        SPAN: SpanHead,
        NONE: NoHead,
    }
    return makers[kind]()


def model_of(network: Bert, kind: str) -> MaskedLMModel | ClassificationModel:
    """The model of a network with this head."""
    if kind in (PRETRAINING, MASKED):
        return MaskedLMModel(network, mask_id=None, converter=MaskedLMFeatures(network.pad_id))
    features = TokenLabelFeatures if kind == TOKENS else ClassificationFeatures
    decide = LikeliestSpan() if kind == SPAN else Likeliest()
    return ClassificationModel(network, features(network.pad_id), decide)


def kind_of(head: object) -> str:
    """The inverse of `make_head`; a `KeyError` if there is no such head over there."""
    if isinstance(head, MaskedLanguageModelHead):
        return MASKED if head.next_sentence is None else PRETRAINING
    kinds = {ClassificationHead: SEQUENCE, TokenClassificationHead: TOKENS, SpanHead: SPAN, NoHead: NONE}
    return kinds[type(head)]
