"""Longformer with any of RoBERTa's heads, or none (Beltagy et al. 2020)."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, cast

from t5x_like.architectures.bert import Bert
from t5x_like.checkpoints.huggingface.bert import Attention
from t5x_like.checkpoints.huggingface.family import AnyModel
from t5x_like.checkpoints.huggingface.roberta import RobertaFamily
from t5x_like.layers.sparse_attention import LongformerAttention


@dataclasses.dataclass(frozen=True)
class LongformerFamily(RobertaFamily):
    """RoBERTa with a window for every layer, and projections for global tokens, of which a row may have 64."""

    classes: ClassVar[Mapping[str, str]] = {"longformer": "Longformer"}
    prefix: ClassVar[str] = "longformer."
    copies: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "longformer.embeddings.word_embeddings.weight": ("lm_head.decoder.weight",),
        "lm_head.bias": ("lm_head.decoder.bias",),
    }

    attention_window: list[int] | int = 512

    @classmethod
    def of(cls, model: AnyModel, model_type: str) -> "LongformerFamily":
        """See `Family`."""
        stack = cast(Bert, model.network).encoder.stack
        windows = [2 * layer.attention.radius for layer in stack.pattern] * stack.repeats
        return dataclasses.replace(cast(LongformerFamily, super().of(model, model_type)), attention_window=windows)

    def attentions(self, dtype: str) -> list[Attention]:
        """A window there counts both sides."""
        heads, rate, windows = self.num_attention_heads, float(self.attention_probs_dropout_prob), self.attention_window
        return [
            LongformerAttention(heads, self.hidden_size // heads, window // 2, dropout_rate=rate, dtype=dtype)
            for window in (windows if isinstance(windows, list) else [windows] * self.num_hidden_layers)
        ]
