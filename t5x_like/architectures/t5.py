"""T5: 1.0, 1.1, mT5, ByT5 and UMT5 are one network with other objects plugged in (Raffel et al. 2020; Shazeer 2020).

1.0: relu MLP, tied and scaled embeddings. 1.1, mT5, ByT5: gated gelu, untied. UMT5: a bias table in every layer.
"""

import flax.linen as nn
import jax.numpy as jnp

from t5x_like.architectures.stack import LayerStack
from t5x_like.errors import UserError
from t5x_like.layers import masks
from t5x_like.layers.dropout import Dropout
from t5x_like.layers.norms import RMSNorm
from t5x_like.layers.routing import Tokens
from t5x_like.sharding import constrain
from t5x_like.typing import Array, Bool, Float, Int, PyTree


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each behind a norm and added to its input.

    Attributes:
      attention: called with `bias` and `mask`.
      mlp: called with the sequence and its `Tokens`: dense, or sparse in a Switch Transformer.
      dropout_rate: on what is added.
      norm: copied under the names of the two norms.
      relpos_bias: the layer's own bias table (UMT5); None takes the stack's.
    """

    attention: nn.Module
    mlp: nn.Module
    dropout_rate: float = 0.0
    norm: nn.Module = RMSNorm()
    relpos_bias: nn.Module | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        bias: Float[Array, "1 heads length length"] | None,
        mask: masks.Mask | None,
        tokens: Tokens,
    ) -> Float[Array, "batch length embed"]:
        """One encoder layer."""
        if self.relpos_bias is not None:
            positions = jnp.arange(x.shape[1])
            bias = self.relpos_bias(positions, positions)
        y = self.norm.clone(parent=self, name="pre_attention_layer_norm")(x)
        x += Dropout(self.dropout_rate)(self.attention(y, bias=bias, mask=mask))
        y = self.norm.clone(parent=self, name="pre_mlp_layer_norm")(x)
        x += Dropout(self.dropout_rate)(self.mlp(y, tokens))
        return constrain(x, "batch", "length", "embed")


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder, MLP; attributes as in `EncoderLayer`."""

    self_attention: nn.Module
    encoder_decoder_attention: nn.Module
    mlp: nn.Module
    dropout_rate: float = 0.0
    norm: nn.Module = RMSNorm()
    relpos_bias: nn.Module | None = None

    def __post_init__(self) -> None:
        if not getattr(self.mlp, "causal", True):
            raise UserError(
                "DecoderLayer.mlp: its router looks at tokens that the decoder has yet to write (ExpertChoice, or "
                "TopK.prioritize); give decoder layers a router of their own, such as TopK"
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        encoded: Float[Array, "batch encoder_length embed"] | None,
        bias: Float[Array, "1 heads length _"] | None,
        mask: masks.Mask,
        cross_mask: masks.Mask | None,
        position: Int[Array, ""] | None,
        tokens: Tokens,
    ) -> Float[Array, "batch length embed"]:
        """One decoder layer; with a `position`, one cached step (see `MultiHeadAttention`)."""
        if self.relpos_bias is not None:
            bias = self.relpos_bias(*decoder_positions(x, mask, position))
        y = self.norm.clone(parent=self, name="pre_self_attention_layer_norm")(x)
        x += Dropout(self.dropout_rate)(self.self_attention(y, bias=bias, mask=mask, position=position))
        y = self.norm.clone(parent=self, name="pre_cross_attention_layer_norm")(x)
        y = self.encoder_decoder_attention(y, context=encoded, mask=cross_mask, position=position)
        x += Dropout(self.dropout_rate)(y)
        y = self.norm.clone(parent=self, name="pre_mlp_layer_norm")(x)
        x += Dropout(self.dropout_rate)(self.mlp(y, tokens))
        return constrain(x, "batch", "length", "embed")


class MlpLayer(nn.Module):
    """A dense MLP alone, behind a norm and added to its input: ST-MoE puts one behind every sparse layer.

    Attributes:
      mlp: dense.
      dropout_rate: on what is added.
      norm: copied.
    """

    mlp: nn.Module
    dropout_rate: float = 0.0
    norm: nn.Module = RMSNorm()

    @nn.compact
    def __call__(self, x: Float[Array, "batch length embed"], *context: PyTree) -> Float[Array, "batch length embed"]:
        """Needs none of what the layers around it do."""
        y = self.norm.clone(parent=self, name="pre_mlp_layer_norm")(x)
        return constrain(x + Dropout(self.dropout_rate)(self.mlp(y)), "batch", "length", "embed")


def decoder_positions(
    x: Float[Array, "batch length embed"], mask: masks.Mask, position: Int[Array, ""] | None
) -> tuple[Int[Array, " length"], Int[Array, " k_len"]]:
    """Columns that queries and keys stand in: all of them, or in a cached step those from `position` against all."""
    queries = jnp.arange(x.shape[1])
    return queries if position is None else queries + position, jnp.arange(mask.shape[-1])


class Encoder(nn.Module):
    """A stack of layers between an embedded sequence and `encoder_norm`.

    Attributes:
      stack: the layers.
      dropout_rate: on what goes in and what comes out.
      norm: the final norm.
      relpos_bias: one bias table for all layers; None where layers own theirs.
    """

    stack: LayerStack
    dropout_rate: float = 0.0
    norm: nn.Module = RMSNorm()
    relpos_bias: nn.Module | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length embed"], mask: masks.Mask, tokens: Tokens
    ) -> Float[Array, "batch length embed"]:
        """Encodes embedded tokens; `mask` says which keys each query sees."""
        positions = jnp.arange(x.shape[1])
        bias = None if self.relpos_bias is None else self.relpos_bias(positions, positions)
        x = constrain(Dropout(self.dropout_rate)(x), "batch", "length", "embed")
        x = self.stack(self, x, bias, mask, tokens)
        return Dropout(self.dropout_rate)(self.norm.clone(parent=self, name="encoder_norm")(x))


class Decoder(nn.Module):
    """A stack of layers between an embedded sequence and `decoder_norm`; `logits_dense` is the untied output matrix.

    Attributes as in `Encoder`, and:
      logits_dense: from hidden states to logits; None where they come from the embedding table.
    """

    stack: LayerStack
    dropout_rate: float = 0.0
    norm: nn.Module = RMSNorm()
    relpos_bias: nn.Module | None = None
    logits_dense: nn.Module | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        encoded: Float[Array, "batch encoder_length embed"] | None,
        mask: masks.Mask,
        cross_mask: masks.Mask | None,
        tokens: Tokens,
        position: Int[Array, ""] | None = None,
        output_scale: float = 1.0,
    ) -> Float[Array, "batch length _"]:
        """Logits, or hidden states where there is no `logits_dense`."""
        bias = None if self.relpos_bias is None else self.relpos_bias(*decoder_positions(x, mask, position))
        x = constrain(Dropout(self.dropout_rate)(x), "batch", "length", "embed")
        x = self.stack(self, x, encoded, bias, mask, cross_mask, position, tokens)
        x = Dropout(self.dropout_rate)(self.norm.clone(parent=self, name="decoder_norm")(x)) * output_scale
        return x if self.logits_dense is None else self.logits_dense(x)


class T5(nn.Module):
    """An encoder-decoder over one vocabulary: token ids in, logits out.

    Attributes:
      token_embedder: shared by encoder and decoder, and by the output where `decoder.logits_dense` is None.
      encoder: called with embedded tokens and a mask.
      decoder: likewise, see `Decoder`.
      scale_decoder_output: multiply the last hidden state by embed_dim**-0.5, as T5 1.0 does before its tied table.
      pad_id: never attended to in the encoder.
    """

    token_embedder: nn.Module
    encoder: nn.Module
    decoder: nn.Module
    scale_decoder_output: bool = False
    pad_id: int = 0

    def __call__(
        self,
        encoder_input_tokens: Int[Array, "batch encoder_length"],
        decoder_input_tokens: Int[Array, "batch length"],
        encoder_segment_ids: Int[Array, "batch encoder_length"] | None = None,
        decoder_segment_ids: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Float32 logits of every next token, given the true ones before it (teacher forcing)."""
        encoded = self.encode(encoder_input_tokens, encoder_segment_ids)
        columns = jnp.arange(decoder_input_tokens.shape[1])
        mask = masks.causal_mask(columns, columns)
        cross_mask = masks.key_mask(self.is_real(encoder_input_tokens))
        if encoder_segment_ids is not None and decoder_segment_ids is not None:
            mask = masks.combine(mask, masks.segment_mask(decoder_segment_ids, decoder_segment_ids))
            cross_mask = masks.combine(cross_mask, masks.segment_mask(decoder_segment_ids, encoder_segment_ids))
        real = None if decoder_segment_ids is None else decoder_segment_ids > 0
        return self.decode(decoder_input_tokens, encoded, mask, cross_mask, real=real)

    def encode(
        self,
        encoder_input_tokens: Int[Array, "batch encoder_length"],
        encoder_segment_ids: Int[Array, "batch encoder_length"] | None = None,
    ) -> Float[Array, "batch encoder_length embed"]:
        """What the decoder attends to."""
        mask = masks.key_mask(self.is_real(encoder_input_tokens))
        if encoder_segment_ids is not None:
            mask = masks.combine(mask, masks.segment_mask(encoder_segment_ids, encoder_segment_ids))
        tokens = Tokens(encoder_input_tokens, self.is_real(encoder_input_tokens))
        return self.encoder(self.token_embedder(encoder_input_tokens), mask, tokens)

    def decode(
        self,
        tokens: Int[Array, "batch length"],
        encoded: Float[Array, "batch encoder_length embed"] | None,
        mask: masks.Mask,
        cross_mask: masks.Mask | None,
        position: Int[Array, ""] | None = None,
        real: Bool[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Decoder logits (float32) under explicit masks; without `real`, all but padding behind column 0 is."""
        x = self.token_embedder(tokens)
        if real is None:
            columns = jnp.arange(tokens.shape[1]) + (0 if position is None else position)
            real = self.is_real(tokens) | (columns == 0)[None]  # the start token is T5's padding
        scale = x.shape[-1] ** -0.5 if self.scale_decoder_output else 1.0
        x = self.decoder(x, encoded, mask, cross_mask, Tokens(tokens, real), position, scale)
        logits = self.token_embedder.attend(x) if self.decoder.logits_dense is None else x
        return constrain(logits.astype(jnp.float32), "batch", "length", "vocab")

    def make_cache(
        self, encoded: Float[Array, "batch encoder_length embed"], tokens: Int[Array, "batch length"]
    ) -> Float[Array, "batch length vocab"]:
        """Run with a mutable `cache`: fills it with the encoder's keys and values, and room for `length` tokens."""
        columns = jnp.arange(tokens.shape[1])
        return self.decode(tokens, encoded, masks.causal_mask(columns, columns), None)

    def decode_step(
        self,
        tokens: Int[Array, "rows step_length"],
        position: Int[Array, ""],
        max_length: int,
        encoder_is_real: Bool[Array, "rows encoder_length"],
    ) -> Float[Array, "rows step_length vocab"]:
        """One cached step: logits after `tokens`, which stand from `position` on. Needs a mutable `cache`."""
        mask = masks.causal_mask(position + jnp.arange(tokens.shape[1]), jnp.arange(max_length))
        return self.decode(tokens, None, mask, masks.key_mask(encoder_is_real), position)

    def is_real(self, tokens: Int[Array, "batch length"]) -> Bool[Array, "batch length"]:
        """True where a token is not padding."""
        return tokens != self.pad_id
