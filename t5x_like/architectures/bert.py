"""BERT (Devlin et al. 2019): an encoder and a head. RoBERTa and Longformer are the same network of other objects."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from t5x_like.layers.logits import multiplied_out
from t5x_like.layers.masks import within
from t5x_like.layers.routing import Tokens
from t5x_like.typing import Array, Bool, Float, Int, PyTree


class Bert(nn.Module):
    """An encoder over one sequence: token ids in, what `head` says of them out.

    Attributes:
      token_embedder: adds up tokens, positions and segments, see `InputEmbedding`.
      encoder: called with embedded tokens and a mask.
      head: `(hidden, attend, positions) -> PyTree`; see `heads`.
      pad_id: never attended to.
    """

    token_embedder: nn.Module
    encoder: nn.Module
    head: nn.Module
    pad_id: int = 0

    def outputs(
        self,
        encoder_input_tokens: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None = None,
        global_attention_mask: Int[Array, "batch length"] | None = None,
        target_positions: Int[Array, "batch targets"] | None = None,
    ) -> PyTree:
        """The head's outputs.

        Args:
          encoder_input_tokens: ids.
          segment_ids: BERT's token types; None is all 0.
          global_attention_mask: 1 where a Longformer's token sees all and is seen by all.
          target_positions: where a language model's head is to predict; None is everywhere.
        """
        x = self.encode(encoder_input_tokens, segment_ids, global_attention_mask)
        return self.head(x, self.token_embedder.logits, target_positions)

    __call__ = multiplied_out(outputs)

    def encode(
        self,
        encoder_input_tokens: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None = None,
        global_attention_mask: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length embed"]:
        """The last hidden states."""
        real = self.is_real(encoder_input_tokens)
        mask = within(real.shape[1], real.astype(jnp.int32))
        if global_attention_mask is not None:
            mask = dataclasses.replace(mask, seen_by_all=global_attention_mask > 0)
        x = self.token_embedder(encoder_input_tokens, segment_ids=segment_ids)
        return self.encoder(x, mask, Tokens(encoder_input_tokens, real))

    def is_real(self, tokens: Int[Array, "batch length"]) -> Bool[Array, "batch length"]:
        """True where a token is not padding."""
        return tokens != self.pad_id
