"""The layers that every Transformer is made of, their stacks, and the encoder-decoder (Vaswani et al. 2017).

The first Transformer, T5 and Switch Transformers are one network with other objects plugged in; `bert` and `gpt` are
its halves.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from t5x_like.architectures.stack import LayerStack
from t5x_like.errors import UserError
from t5x_like.layers.attention import Bias
from t5x_like.layers.dropout import Dropout
from t5x_like.layers.logits import LazyLogits, multiplied_out
from t5x_like.layers.masks import Mask, within
from t5x_like.layers.norms import RMSNorm
from t5x_like.layers.residual import PreNorm, Residual
from t5x_like.layers.routing import Tokens
from t5x_like.sharding import constrain
from t5x_like.typing import Array, Bool, Float, Int, PyTree


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each with a norm and added to its input.

    Attributes:
      attention: called with `bias` and `mask`.
      mlp: called with the sequence and its `Tokens`: dense, or sparse in a Switch Transformer.
      dropout_rate: on what is added.
      norm: copied under the names of the two norms.
      relpos_bias: the layer's own bias table (UMT5); None takes the stack's.
      residual: norms in front of what is added, or behind the sum.
    """

    attention: nn.Module
    mlp: nn.Module
    dropout_rate: float = 0.0
    norm: nn.Module = RMSNorm()
    relpos_bias: nn.Module | None = None
    residual: Residual = PreNorm()

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length embed"], bias: Bias | None, mask: Mask, tokens: Tokens
    ) -> Float[Array, "batch length embed"]:
        """One encoder layer."""
        bias = position_bias(self.relpos_bias, mask, bias)
        x = _add(self, "attention", x, lambda y: self.attention(y, bias=bias, mask=mask))
        return _add(self, "mlp", x, lambda y: self.mlp(y, tokens))


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder, MLP; attributes as in `EncoderLayer`.

    Without `encoder_decoder_attention` it is a layer of a decoder that stands alone, such as GPT.
    """

    self_attention: nn.Module
    encoder_decoder_attention: nn.Module | None
    mlp: nn.Module
    dropout_rate: float = 0.0
    norm: nn.Module = RMSNorm()
    relpos_bias: nn.Module | None = None
    residual: Residual = PreNorm()

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
        bias: Bias | None,
        mask: Mask,
        cross_mask: Mask | None,
        position: Int[Array, ""] | None,
        tokens: Tokens,
    ) -> Float[Array, "batch length embed"]:
        """One decoder layer; with a `position`, one cached step (see `MultiHeadAttention`)."""
        bias = position_bias(self.relpos_bias, mask, bias)
        x = _add(self, "self_attention", x, lambda y: self.self_attention(y, bias=bias, mask=mask, position=position))
        if self.encoder_decoder_attention is not None:
            attend = self.encoder_decoder_attention
            x = _add(
                self, "cross_attention", x, lambda y: attend(y, context=encoded, mask=cross_mask, position=position)
            )
        return _add(self, "mlp", x, lambda y: self.mlp(y, tokens))


class MlpLayer(nn.Module):
    """A dense MLP alone, with a norm and added to its input: ST-MoE puts one behind every sparse layer.

    Attributes:
      mlp: dense.
      dropout_rate: on what is added.
      norm: copied.
      residual: norm in front of what is added, or behind the sum.
    """

    mlp: nn.Module
    dropout_rate: float = 0.0
    norm: nn.Module = RMSNorm()
    residual: Residual = PreNorm()

    @nn.compact
    def __call__(self, x: Float[Array, "batch length embed"], *context: PyTree) -> Float[Array, "batch length embed"]:
        """Needs none of what the layers around it do."""
        return _add(self, "mlp", x, self.mlp)


def _add(
    layer: EncoderLayer | DecoderLayer | MlpLayer, name: str, x: Array, sublayer: Callable[[Array], Array]
) -> Array:
    """The stream `x` with what `sublayer` makes of it; the layer's norm is copied for it."""
    norm = layer.norm.clone(parent=layer, name=f"{layer.residual.prefix}_{name}_layer_norm")
    return constrain(layer.residual(x, norm, sublayer, Dropout(layer.dropout_rate)), "batch", "length", "embed")


def position_bias(relpos_bias: nn.Module | None, mask: Mask, default: Bias | None = None) -> Bias | None:
    """What a bias table adds to attention under a mask; `default` where there is no table."""
    return default if relpos_bias is None else relpos_bias(mask.query_positions, mask.key_positions)


class Encoder(nn.Module):
    """A stack of layers between an embedded sequence and `encoder_norm`.

    Attributes:
      stack: the layers.
      dropout_rate: on what goes in and what comes out.
      norm: the final norm; None where layers end with one of their own (`PostNorm`), and nothing is dropped there.
      relpos_bias: one bias table for all layers; None where layers own theirs.
      output_dropout_rate: on what comes out instead, if given: GPT-2 drops nothing there.
    """

    stack: LayerStack
    dropout_rate: float = 0.0
    norm: nn.Module | None = RMSNorm()
    relpos_bias: nn.Module | None = None
    output_dropout_rate: float | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length embed"], mask: Mask, tokens: Tokens
    ) -> Float[Array, "batch length embed"]:
        """Encodes embedded tokens; `mask` says which keys each query sees."""
        bias = position_bias(self.relpos_bias, mask)
        x = constrain(Dropout(self.dropout_rate)(x), "batch", "length", "embed")
        x = self.stack(self, x, bias, mask, tokens)
        return _end(self, "encoder_norm", x)


class Decoder(nn.Module):
    """A stack of layers between an embedded sequence and `decoder_norm`; `logits_dense` is the untied output matrix.

    Attributes as in `Encoder`, and:
      logits_dense: from hidden states to logits; None where they come from the embedding table.
    """

    stack: LayerStack
    dropout_rate: float = 0.0
    norm: nn.Module | None = RMSNorm()
    relpos_bias: nn.Module | None = None
    logits_dense: nn.Module | None = None
    output_dropout_rate: float | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        encoded: Float[Array, "batch encoder_length embed"] | None,
        mask: Mask,
        cross_mask: Mask | None,
        tokens: Tokens,
        position: Int[Array, ""] | None = None,
        output_scale: float = 1.0,
    ) -> LazyLogits | Float[Array, "batch length embed"]:
        """Logits, or hidden states where there is no `logits_dense`."""
        bias = position_bias(self.relpos_bias, mask)
        x = constrain(Dropout(self.dropout_rate)(x), "batch", "length", "embed")
        x = self.stack(self, x, encoded, bias, mask, cross_mask, position, tokens)
        x = _end(self, "decoder_norm", x) * output_scale
        return x if self.logits_dense is None else self.logits_dense.logits(x)


def _end(stack: Encoder | Decoder, name: str, x: Array) -> Array:
    """The final norm and dropout, if a stack has them."""
    if stack.norm is None:
        return x
    rate = stack.dropout_rate if stack.output_dropout_rate is None else stack.output_dropout_rate
    return Dropout(rate)(stack.norm.clone(parent=stack, name=name)(x))


class Transformer(nn.Module):
    """An encoder-decoder over one vocabulary: token ids in, logits out.

    Attributes:
      token_embedder: shared by encoder and decoder, and by the output where `decoder.logits_dense` is None.
      encoder: called with embedded tokens and a mask.
      decoder: likewise, see `Decoder`.
      pad_id: never attended to in the encoder.
    """

    token_embedder: nn.Module
    encoder: nn.Module
    decoder: nn.Module
    pad_id: int = 0

    def outputs(
        self,
        encoder_input_tokens: Int[Array, "batch encoder_length"],
        decoder_input_tokens: Int[Array, "batch length"],
        encoder_segment_ids: Int[Array, "batch encoder_length"] | None = None,
        decoder_segment_ids: Int[Array, "batch length"] | None = None,
        encoder_positions: Int[Array, "batch encoder_length"] | None = None,
        decoder_positions: Int[Array, "batch length"] | None = None,
        global_attention_mask: Int[Array, "batch encoder_length"] | None = None,
    ) -> LazyLogits:
        """Logits of every next token, given the true ones before it (teacher forcing)."""
        encoded = self.encode(encoder_input_tokens, encoder_segment_ids, encoder_positions, global_attention_mask)
        mask = within(decoder_input_tokens.shape[1], decoder_segment_ids, causal=True)
        columns = jnp.arange(encoder_input_tokens.shape[1])
        cross_mask = Mask(
            mask.query_positions,
            columns,
            None if encoder_segment_ids is None else decoder_segment_ids,
            self._segments(encoder_input_tokens, encoder_segment_ids),
        )
        return self.decode(decoder_input_tokens, encoded, mask, cross_mask, positions=decoder_positions)

    __call__ = multiplied_out(outputs)

    def encode(
        self,
        encoder_input_tokens: Int[Array, "batch encoder_length"],
        encoder_segment_ids: Int[Array, "batch encoder_length"] | None = None,
        encoder_positions: Int[Array, "batch encoder_length"] | None = None,
        global_attention_mask: Int[Array, "batch encoder_length"] | None = None,
    ) -> Float[Array, "batch encoder_length embed"]:
        """What the decoder attends to; the mask is 1 where a token of a Longformer encoder (LED) sees all."""
        mask = within(encoder_input_tokens.shape[1], self._segments(encoder_input_tokens, encoder_segment_ids))
        if global_attention_mask is not None:
            mask = dataclasses.replace(mask, seen_by_all=global_attention_mask > 0)
        tokens = Tokens(encoder_input_tokens, self.is_real(encoder_input_tokens))
        return self.encoder(self.token_embedder(encoder_input_tokens, encoder_positions), mask, tokens)

    def decode(
        self,
        tokens: Int[Array, "batch length"],
        encoded: Float[Array, "batch encoder_length embed"] | None,
        mask: Mask,
        cross_mask: Mask | None,
        position: Int[Array, ""] | None = None,
        positions: Int[Array, "#batch length"] | None = None,
    ) -> LazyLogits:
        """Decoder logits under explicit masks; without segments, all but padding behind column 0 is real."""
        x = self.token_embedder(tokens, mask.query_positions[None] if positions is None else positions)
        if mask.query_segments is None:
            real = self.is_real(tokens) | (mask.query_positions == 0)[None]  # the start token is T5's padding
        else:
            real = mask.query_segments > 0
        scale = self.output_scale(x.shape[-1])
        x = self.decoder(x, encoded, mask, cross_mask, Tokens(tokens, real), position, scale)
        return x if isinstance(x, LazyLogits) else self.token_embedder.logits(x)

    def make_cache(
        self, encoded: Float[Array, "batch encoder_length embed"], tokens: Int[Array, "batch length"]
    ) -> Float[Array, "batch length vocab"]:
        """Run with a mutable `cache`: fills it with the encoder's keys and values, and room for `length` tokens."""
        return self.decode(tokens, encoded, within(tokens.shape[1], causal=True), None).values()

    def decode_step(
        self,
        tokens: Int[Array, "rows step_length"],
        position: Int[Array, ""],
        max_length: int,
        encoder_is_real: Bool[Array, "examples encoder_length"],
    ) -> Float[Array, "rows step_length vocab"]:
        """One cached step: logits after `tokens`, which stand from `position` on. Needs a mutable `cache`.

        As many rows in a row as there are to an example attend to the same encoded tokens.
        """
        queries = position + jnp.arange(tokens.shape[1])
        mask = Mask(queries, jnp.arange(max_length), causal=True)
        columns = jnp.arange(encoder_is_real.shape[1])
        cross_mask = Mask(queries, columns, key_segments=encoder_is_real.astype(jnp.int32))
        return self.decode(tokens, None, mask, cross_mask, position).values()

    def is_real(self, tokens: Int[Array, "batch length"]) -> Bool[Array, "batch length"]:
        """True where a token is not padding."""
        return tokens != self.pad_id

    def output_scale(self, embed_dim: int) -> float:
        """What the last hidden state is multiplied by."""
        return 1.0

    def _segments(self, tokens: Array, segment_ids: Array | None) -> Array:
        """Segment ids that are 0 on padding."""
        real = self.is_real(tokens).astype(jnp.int32)
        return real if segment_ids is None else real * segment_ids
