"""XLNet (Yang et al. 2019): an encoder that predicts its own tokens in whatever order it is told."""

import flax.linen as nn
import jax.numpy as jnp

from t5x_like.layers.dropout import Dropout
from t5x_like.layers.linear import Normal
from t5x_like.layers.logits import LazyLogits, multiplied_out
from t5x_like.layers.parameters import parameter
from t5x_like.layers.routing import Tokens
from t5x_like.layers.two_stream_attention import TwoStreamMask
from t5x_like.typing import Array, Int, Shaped


class XLNet(nn.Module):
    """Token ids in, logits of the tokens at some positions out.

    With a mutable `cache`, each call goes on where the one before ended (see `TwoStreamAttention`).

    Attributes:
      token_embedder: of inputs and outputs; knows no positions.
      encoder: a `transformer.Encoder` whose layers have `TwoStreamAttention` and end with a norm.
      dropout_rate: on what comes out of the encoder.
      pad_id: never attended to.
    """

    token_embedder: nn.Module
    encoder: nn.Module
    dropout_rate: float = 0.0
    pad_id: int = 0

    @nn.compact
    def outputs(
        self,
        input_tokens: Int[Array, "batch length"],
        perm_mask: Shaped[Array, "batch length length"] | None = None,
        target_positions: Int[Array, "batch targets"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> LazyLogits:
        """Logits.

        Args:
          input_tokens: ids.
          perm_mask: 1 where a token (row) may not see another (column); a target may not see itself either, if that is
            1. None: all see all.
          target_positions: where to predict, from position and what is seen alone; None: everywhere, from what stands
            there too.
          segment_ids: which of several texts a token is of; None is all 0.
        """
        batch, length = input_tokens.shape
        targets = jnp.zeros((batch, 0), jnp.int32) if target_positions is None else target_positions
        real, columns = input_tokens != self.pad_id, jnp.arange(length)
        types = jnp.zeros_like(input_tokens) if segment_ids is None else segment_ids
        hidden = jnp.zeros((batch, length, length), jnp.bool_) if perm_mask is None else perm_mask.astype(jnp.bool_)
        mask = TwoStreamMask(
            columns,
            columns,
            key_segments=real.astype(jnp.int32),
            hidden=hidden,
            target_positions=targets,
            query_types=types,
            key_types=types,
        )
        x = self.token_embedder(input_tokens)
        unknown = parameter(self, "mask_embedding", Normal(), ("embed",), x.shape[-1:]).astype(x.dtype)
        x = jnp.concatenate((x, jnp.broadcast_to(unknown, (*targets.shape, x.shape[-1]))), axis=1)
        behind = ((0, 0), (0, targets.shape[1]))
        ids = jnp.pad(input_tokens, behind, constant_values=self.pad_id)
        x = self.encoder(x, mask, Tokens(ids, jnp.pad(real, behind, constant_values=True)))
        if target_positions is not None:
            x = x[:, length:]
        return self.token_embedder.logits(Dropout(self.dropout_rate)(x))

    __call__ = multiplied_out(outputs)
