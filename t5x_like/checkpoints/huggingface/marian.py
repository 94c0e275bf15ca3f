"""Marian's translation models: the first Transformer (Vaswani et al. 2017; Junczys-Dowmunt et al. 2018)."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal, cast

import numpy as np

from t5x_like.architectures.transformer import Decoder, DecoderLayer, Encoder, EncoderLayer, Transformer
from t5x_like.checkpoints.huggingface.family import ACTIVATIONS, Activation, AnyModel, Family, activation_of, stack_of
from t5x_like.checkpoints.huggingface.files import ConfigFile, Tensors
from t5x_like.checkpoints.huggingface.tensors import Modules
from t5x_like.layers.attention import MultiHeadAttention
from t5x_like.layers.embeddings import Embedding, InputEmbedding, SinusoidalPositions
from t5x_like.layers.mlp import MlpBlock
from t5x_like.layers.norms import LayerNorm
from t5x_like.layers.residual import PostNorm
from t5x_like.models.encoder_decoder import EncoderDecoderModel

_BIAS = "final_logits_bias"


@dataclasses.dataclass(frozen=True)
class MarianFamily(Family):
    """Marian's entries; both languages share one vocabulary.

    Attributes:
      logits_bias: whether logits have one; not an entry, the tensors tell.
    """

    classes: ClassVar[Mapping[str, str]] = {"marian": "MarianMTModel"}
    network: ClassVar[type] = Transformer
    unused: ClassVar[str] = r"model\.(encoder|decoder)\.embed_positions\.weight"
    copies: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "model.shared.weight": (
            "model.encoder.embed_tokens.weight",
            "model.decoder.embed_tokens.weight",
            "lm_head.weight",
        )
    }

    vocab_size: int
    d_model: int
    encoder_layers: int
    decoder_layers: int
    encoder_attention_heads: int
    decoder_attention_heads: int
    encoder_ffn_dim: int
    decoder_ffn_dim: int
    pad_token_id: int
    eos_token_id: int
    decoder_start_token_id: int
    max_position_embeddings: int = 1024
    activation_function: Activation = "gelu"
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    scale_embedding: bool = False
    share_encoder_decoder_embeddings: Literal[True] = True
    tie_word_embeddings: Literal[True] = True
    logits_bias: bool = True

    @classmethod
    def names(cls, model_type: str) -> dict[str, str]:
        """All but what tensors tell."""
        return {name: name for name in super().names(model_type) if name != "logits_bias"}

    @classmethod
    def read(cls, config: ConfigFile, tensors: Tensors) -> "MarianFamily":
        """See `Family`."""
        if _BIAS in tensors and not tensors[_BIAS].any():
            del tensors[_BIAS]
        return dataclasses.replace(cast(MarianFamily, super().read(config, tensors)), logits_bias=_BIAS in tensors)

    @classmethod
    def unpacked(cls, tensors: Tensors) -> Tensors:
        """The bias of logits as a vector."""
        return {name: tensor.reshape(-1) if name == _BIAS else tensor for name, tensor in tensors.items()}

    def packed(self, tensors: Tensors) -> Tensors:
        """See `Family`."""
        bias = tensors.get(_BIAS, np.zeros(self.vocab_size, np.float32))
        return tensors | {_BIAS: bias[None]}

    @classmethod
    def of(cls, model: AnyModel, model_type: str) -> "MarianFamily":
        """See `Family`."""
        model = cast(EncoderDecoderModel, model)
        network = cast(Transformer, model.network)
        inputs, encoder, decoder = network.token_embedder, network.encoder.stack, network.decoder.stack
        first, last = encoder.pattern[0], decoder.pattern[0]
        return cls(
            model_type=model_type,
            vocab_size=inputs.tokens.vocab_size,
            d_model=inputs.tokens.embed_dim,
            encoder_layers=encoder.repeats * len(encoder.pattern),
            decoder_layers=decoder.repeats * len(decoder.pattern),
            encoder_attention_heads=first.attention.num_heads,
            decoder_attention_heads=last.self_attention.num_heads,
            encoder_ffn_dim=first.mlp.mlp_dim,
            decoder_ffn_dim=last.mlp.mlp_dim,
            pad_token_id=network.pad_id,
            eos_token_id=model.eos_id,
            decoder_start_token_id=model.start_id,
            activation_function=activation_of(first.mlp.activations),
            dropout=first.dropout_rate,
            attention_dropout=first.attention.dropout_rate,
            activation_dropout=first.mlp.dropout_rate,
            scale_embedding=inputs.scaled,
            logits_bias=inputs.tokens.output_bias,
        )

    def entries(self) -> dict[str, object]:
        """See `Family`."""
        return super().entries() | {"is_encoder_decoder": True}

    def model(self, dtype: str) -> EncoderDecoderModel:
        """See `Family`."""
        rate, mlp_rate = float(self.dropout), float(self.activation_dropout)
        norm, residual = LayerNorm(1e-5), PostNorm()

        def attention(heads: int) -> MultiHeadAttention:
            rate = float(self.attention_dropout)
            return MultiHeadAttention(heads, self.d_model // heads, rate, dtype, scaled=True, use_bias=True)

        def mlp(width: int) -> MlpBlock:
            return MlpBlock(width, (ACTIVATIONS[self.activation_function],), mlp_rate, dtype, use_bias=True)

        heads = attention(self.encoder_attention_heads)
        first = EncoderLayer(heads, mlp(self.encoder_ffn_dim), rate, norm, residual=residual)
        heads = attention(self.decoder_attention_heads)
        last = DecoderLayer(heads, heads, mlp(self.decoder_ffn_dim), rate, norm, residual=residual)
        network = Transformer(
            InputEmbedding(
                Embedding(self.vocab_size, self.d_model, dtype, output_bias=self.logits_bias),
                SinusoidalPositions(self.d_model, dtype),
                scaled=self.scale_embedding,
            ),
            Encoder(stack_of([first] * self.encoder_layers), rate, norm=None),
            Decoder(stack_of([last] * self.decoder_layers), rate, norm=None),
            self.pad_token_id,
        )
        return EncoderDecoderModel(network, eos_id=self.eos_token_id, start_id=self.decoder_start_token_id)

    def modules(self) -> Modules:
        """See `Family`."""
        names = {"token_embedder/tokens": "model.shared", "token_embedder/tokens/bias": _BIAS}
        attentions = (
            ("encoder", "attention", "attention", "self_attn"),
            ("decoder", "self_attention", "self_attention", "self_attn"),
            ("decoder", "encoder_decoder_attention", "cross_attention", "encoder_attn"),
        )
        for half, ours, norm, theirs in attentions:
            layer, their_layer = f"{half}/layers_#", f"model.{half}.layers.#"
            names |= {f"{layer}/{ours}/{part}": f"{their_layer}.{theirs}.{proj}" for part, proj in _PROJECTIONS.items()}
            names |= {
                f"{layer}/post_{norm}_layer_norm": f"{their_layer}.{theirs}_layer_norm",
                f"{layer}/mlp/wi": f"{their_layer}.fc1",
                f"{layer}/mlp/wo": f"{their_layer}.fc2",
                f"{layer}/post_mlp_layer_norm": f"{their_layer}.final_layer_norm",
            }
        return names


_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
