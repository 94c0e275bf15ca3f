"""T5: 1.0, 1.1, mT5, ByT5 and UMT5 are one network with other objects plugged in (Raffel et al. 2020; Shazeer 2020).

1.0: relu MLP, tied and scaled embeddings. 1.1, mT5, ByT5: gated gelu, untied. UMT5: a bias table in every layer.
"""

from t5x_like.architectures.transformer import Transformer


class T5(Transformer):
    """The `Transformer` with relative position biases instead of positions in its embeddings, and norms in front.

    Attributes:
      scale_decoder_output: multiply the last hidden state by embed_dim**-0.5, as T5 1.0 does before its tied table.
    """

    scale_decoder_output: bool = False

    def output_scale(self, embed_dim: int) -> float:
        """See `Transformer`."""
        return embed_dim**-0.5 if self.scale_decoder_output else 1.0
