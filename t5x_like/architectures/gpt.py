"""GPT (Radford et al. 2018): a decoder that stands alone. GPT-2, GPT-3, LaMDA and prefix LMs are objects plugged in."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5x_like.layers.logits import LazyLogits, multiplied_out
from t5x_like.layers.masks import Mask, within
from t5x_like.layers.routing import Tokens
from t5x_like.typing import Array, Bool, Float, Int


class Gpt(nn.Module):
    """A causal language model: token ids in, logits of the next ones out.

    Attributes:
      token_embedder: of inputs, and of outputs where `decoder.logits_dense` is None.
      decoder: a `transformer.Decoder` whose layers have no attention to an encoder.
      prefix_lm: tokens of the prefix see each other in both directions (Raffel et al. 2020, section 3.2.1).
    """

    token_embedder: nn.Module
    decoder: nn.Module
    prefix_lm: bool = False

    def outputs(
        self,
        decoder_input_tokens: Int[Array, "batch length"],
        decoder_segment_ids: Int[Array, "batch length"] | None = None,
        decoder_positions: Int[Array, "batch length"] | None = None,
        decoder_causal_attention: Int[Array, "batch length"] | None = None,
    ) -> LazyLogits:
        """Logits of every next token.

        Args:
          decoder_input_tokens: ids.
          decoder_segment_ids: which example of a packed row each is of, 0 for padding; None: no row is packed, and
            padding stands behind all that matters.
          decoder_positions: place in the example; None is the column.
          decoder_causal_attention: seqio's name for the prefix: 1 where a prefix LM sees in both directions.
        """
        mask = within(decoder_input_tokens.shape[1], decoder_segment_ids, causal=True)
        if decoder_causal_attention is not None:
            mask = self._with_prefix(mask, decoder_causal_attention > 0)
        return self._decode(decoder_input_tokens, mask, decoder_positions)

    __call__ = multiplied_out(outputs)

    def make_cache(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length vocab"]:
        """Run with a mutable `cache`: makes room for `length` tokens."""
        return self._decode(tokens, within(tokens.shape[1], causal=True), None).values()

    def decode_step(
        self,
        tokens: Int[Array, "rows step_length"],
        position: Int[Array, ""],
        real: Bool[Array, "rows length"],
        prefix: Bool[Array, "rows length"],
    ) -> Float[Array, "rows step_length vocab"]:
        """One cached step over a mutable `cache`: logits after `tokens`, which stand from column `position` on.

        Args:
          tokens: several at once, or one.
          position: their first column.
          real: of all columns, those with tokens; prompts of unequal length end at the same column.
          prefix: of all columns, those of a prompt.
        """
        queries = position + jnp.arange(tokens.shape[1])
        mask = Mask(queries, jnp.arange(real.shape[1]), key_segments=real.astype(jnp.int32), causal=True)
        places = jnp.maximum(jnp.cumsum(real.astype(jnp.int32), axis=1) - 1, 0)
        places = jax.lax.dynamic_slice_in_dim(places, position, tokens.shape[1], axis=1)
        return self._decode(tokens, self._with_prefix(mask, prefix), places, position).values()

    def _decode(
        self, tokens: Array, mask: Mask, positions: Array | None, position: Int[Array, ""] | None = None
    ) -> LazyLogits:
        real = jnp.ones_like(tokens, jnp.bool_) if mask.query_segments is None else mask.query_segments > 0
        x = self.token_embedder(tokens, positions)
        x = self.decoder(x, None, mask, None, Tokens(tokens, real), position)
        return x if isinstance(x, LazyLogits) else self.token_embedder.logits(x)

    def _with_prefix(self, mask: Mask, prefix: Bool[Array, "batch length"]) -> Mask:
        return dataclasses.replace(mask, seen_by_all=prefix) if self.prefix_lm else mask
