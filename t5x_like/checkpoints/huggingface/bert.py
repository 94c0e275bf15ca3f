"""BERT with any of its heads, or none (Devlin et al. 2019)."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal, TypeAlias, cast

from t5x_like.architectures.bert import Bert
from t5x_like.architectures.heads import MaskedLanguageModelHead
from t5x_like.architectures.transformer import Encoder, EncoderLayer
from t5x_like.checkpoints.huggingface import encoder_heads
from t5x_like.checkpoints.huggingface.family import ACTIVATIONS, Activation, AnyModel, Family, activation_of, stack_of
from t5x_like.checkpoints.huggingface.files import ConfigFile, Tensors
from t5x_like.checkpoints.huggingface.tensors import Modules
from t5x_like.errors import UserError
from t5x_like.layers.attention import MultiHeadAttention
from t5x_like.layers.embeddings import Embedding, InputEmbedding, LearnedPositions
from t5x_like.layers.mlp import MlpBlock
from t5x_like.layers.norms import LayerNorm
from t5x_like.layers.residual import PostNorm
from t5x_like.layers.sparse_attention import LongformerAttention

_MASKED = {
    "token_embedder/tokens/bias": "cls.predictions.bias",
    "head/transform": "cls.predictions.transform.dense",
    "head/norm": "cls.predictions.transform.LayerNorm",
}

Attention: TypeAlias = MultiHeadAttention | LongformerAttention


@dataclasses.dataclass(frozen=True)
class BertFamily(Family):
    """BERT's entries, and which head its tensors make.

    A pooler that no head reads is dropped: an encoder without a head puts out hidden states.

    Attributes:
      heads: all that are known.
      head: one of them.
      num_labels: classes of a classifier.
    """

    classes: ClassVar[Mapping[str, str]] = {"bert": "Bert"}
    network: ClassVar[type] = Bert
    prefix: ClassVar[str] = "bert."
    unused: ClassVar[str] = r".*embeddings\.position_ids"
    copies: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "bert.embeddings.word_embeddings.weight": ("cls.predictions.decoder.weight",),
        "cls.predictions.bias": ("cls.predictions.decoder.bias",),
    }
    heads: ClassVar[encoder_heads.Heads] = {
        encoder_heads.PRETRAINING: _MASKED
        | {"head/next_sentence/pooler": "bert.pooler.dense", "head/next_sentence/logits": "cls.seq_relationship"},
        encoder_heads.MASKED: _MASKED,
        encoder_heads.SEQUENCE: {"head/pooler": "bert.pooler.dense", "head/logits": "classifier"},
        encoder_heads.TOKENS: {"head/logits": "classifier"},
        encoder_heads.SPAN: {"head/logits": "qa_outputs"},
        encoder_heads.NONE: {},
    }

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    hidden_act: Activation = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    type_vocab_size: int = 2
    layer_norm_eps: float | int = 1e-12
    pad_token_id: int = 0
    position_embedding_type: Literal["absolute"] = "absolute"
    is_decoder: Literal[False] = False
    head: str = encoder_heads.NONE
    num_labels: int = 0

    @classmethod
    def names(cls, model_type: str) -> dict[str, str]:
        """All but what tensors tell."""
        return {name: name for name in super().names(model_type) if name not in ("head", "num_labels")}

    @classmethod
    def read(cls, config: ConfigFile, tensors: Tensors) -> "BertFamily":
        """See `Family`."""
        head = encoder_heads.head_of(tensors, cls.heads, config.entries.get("architectures"))
        modules = cls.heads[head]
        if f"{cls.prefix}pooler.dense" not in modules.values():
            tensors.pop(f"{cls.prefix}pooler.dense.weight", None)
            tensors.pop(f"{cls.prefix}pooler.dense.bias", None)
        labels = len(tensors[f"{modules['head/logits']}.weight"]) if "head/logits" in modules else 0
        return dataclasses.replace(cast(BertFamily, super().read(config, tensors)), head=head, num_labels=labels)

    @classmethod
    def unpacked(cls, tensors: Tensors) -> Tensors:
        """The norms of the first folders had names of their own."""
        new = {"gamma": "weight", "beta": "bias"}
        split = {name: name.rpartition(".") for name in tensors}
        return {f"{module}.{new.get(leaf, leaf)}": tensors[name] for name, (module, _, leaf) in split.items()}

    @classmethod
    def of(cls, model: AnyModel, model_type: str) -> "BertFamily":
        """See `Family`."""
        network = cast(Bert, model.network)
        inputs, stack = network.token_embedder, network.encoder.stack
        layer, padding_id = stack.pattern[0], inputs.positions.padding_id
        if inputs.segments is None:
            raise UserError(
                f"save: InputEmbedding.segments is None, but Hugging Face's {model_type} has a table of segments, one "
                "row of zeros if nothing else; give the network one"
            )
        return cls(
            model_type=model_type,
            vocab_size=inputs.tokens.vocab_size,
            hidden_size=inputs.tokens.embed_dim,
            num_hidden_layers=stack.repeats * len(stack.pattern),
            num_attention_heads=layer.attention.num_heads,
            intermediate_size=layer.mlp.mlp_dim,
            max_position_embeddings=inputs.positions.max_length + (0 if padding_id is None else padding_id + 1),
            hidden_act=activation_of(layer.mlp.activations),
            hidden_dropout_prob=layer.dropout_rate,
            attention_probs_dropout_prob=layer.attention.dropout_rate,
            type_vocab_size=inputs.segments.vocab_size,
            layer_norm_eps=inputs.norm.epsilon,
            pad_token_id=network.pad_id,
            head=encoder_heads.kind_of(network.head),
            num_labels=getattr(network.head, "num_classes", 0),
        )

    def entries(self) -> dict[str, object]:
        """See `Family`."""
        entries = super().entries() | {"architectures": [f"{self.classes[self.model_type]}{self.head}"]}
        return entries | {"num_labels": self.num_labels} if self.num_labels else entries

    def model(self, dtype: str) -> AnyModel:
        """See `Family`."""
        rate, epsilon = float(self.hidden_dropout_prob), float(self.layer_norm_eps)
        is_masked_lm = self.head in (encoder_heads.PRETRAINING, encoder_heads.MASKED)
        embedding = InputEmbedding(
            Embedding(self.vocab_size, self.hidden_size, dtype, output_bias=is_masked_lm),
            self.positions(dtype),
            Embedding(self.type_vocab_size, self.hidden_size, dtype, vocab_axis=None),
            LayerNorm(epsilon),
        )
        mlp = MlpBlock(self.intermediate_size, (ACTIVATIONS[self.hidden_act],), dtype=dtype, use_bias=True)
        norm = LayerNorm(epsilon)
        layers = [EncoderLayer(each, mlp, rate, norm, residual=PostNorm()) for each in self.attentions(dtype)]
        encoder = Encoder(stack_of(layers), rate, norm=None)
        masked = MaskedLanguageModelHead(self.head_activation, LayerNorm(epsilon), dtype=dtype)
        head = encoder_heads.make_head(self.head, self.num_labels, masked, dtype)
        return encoder_heads.model_of(Bert(embedding, encoder, head, self.pad_token_id), self.head)

    @property
    def head_activation(self) -> str:
        """In the language model's head."""
        return ACTIVATIONS[self.hidden_act]

    def positions(self, dtype: str) -> LearnedPositions:
        """A vector for every column."""
        return LearnedPositions(self.max_position_embeddings, self.hidden_size, dtype)

    def attentions(self, dtype: str) -> list[Attention]:
        """One for every layer."""
        heads, rate = self.num_attention_heads, float(self.attention_probs_dropout_prob)
        attention = MultiHeadAttention(heads, self.hidden_size // heads, rate, dtype, scaled=True, use_bias=True)
        return [attention] * self.num_hidden_layers

    def modules(self) -> Modules:
        """See `Family`."""
        embeddings, ours, layer = f"{self.prefix}embeddings", "encoder/layers_#", f"{self.prefix}encoder.layer.#"
        projections = (f"{name}{which}" for name in ("query", "key", "value") for which in ("", "_global"))
        return {
            "token_embedder/tokens": f"{embeddings}.word_embeddings",
            "token_embedder/positions": f"{embeddings}.position_embeddings",
            "token_embedder/segments": f"{embeddings}.token_type_embeddings",
            "token_embedder/norm": f"{embeddings}.LayerNorm",
            **{f"{ours}/attention/{name}": f"{layer}.attention.self.{name}" for name in projections},
            f"{ours}/attention/out": f"{layer}.attention.output.dense",
            f"{ours}/post_attention_layer_norm": f"{layer}.attention.output.LayerNorm",
            f"{ours}/mlp/wi": f"{layer}.intermediate.dense",
            f"{ours}/mlp/wo": f"{layer}.output.dense",
            f"{ours}/post_mlp_layer_norm": f"{layer}.output.LayerNorm",
            **self.heads[self.head],
        }
