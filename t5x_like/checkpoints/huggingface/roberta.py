"""RoBERTa with any of its heads, or none (Liu et al. 2019)."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from t5x_like.checkpoints.huggingface import encoder_heads
from t5x_like.checkpoints.huggingface.bert import BertFamily
from t5x_like.layers.embeddings import LearnedPositions

HEADS: encoder_heads.Heads = {
    encoder_heads.MASKED: {
        "token_embedder/tokens/bias": "lm_head.bias",
        "head/transform": "lm_head.dense",
        "head/norm": "lm_head.layer_norm",
    },
    encoder_heads.SEQUENCE: {"head/pooler": "classifier.dense", "head/logits": "classifier.out_proj"},
    encoder_heads.TOKENS: {"head/logits": "classifier"},
    encoder_heads.SPAN: {"head/logits": "qa_outputs"},
    encoder_heads.NONE: {},
}


@dataclasses.dataclass(frozen=True)
class RobertaFamily(BertFamily):
    """BERT with positions that start behind the padding's id, and heads of other names."""

    classes: ClassVar[Mapping[str, str]] = {"roberta": "Roberta"}
    prefix: ClassVar[str] = "roberta."
    copies: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "roberta.embeddings.word_embeddings.weight": ("lm_head.decoder.weight", "lm_head.weight"),
        "lm_head.bias": ("lm_head.decoder.bias",),
    }
    heads: ClassVar[encoder_heads.Heads] = HEADS

    pad_token_id: int = 1

    @property
    def head_activation(self) -> str:
        """Whatever the layers have."""
        return "gelu_exact"

    def positions(self, dtype: str) -> LearnedPositions:
        """The first rows of the table are padding's."""
        length = self.max_position_embeddings - self.pad_token_id - 1
        return LearnedPositions(length, self.hidden_size, dtype, padding_id=self.pad_token_id)
