"""The encoder-decoder beyond T5 (test_t5.py) and the first Transformer, whose oracle is Marian of Hugging Face."""

import jax.numpy as jnp
import numpy as np
from tiny_family import ATTENTION, MLP, VOCAB, embedder, random_params

from t5x_like.architectures.stack import LayerStack
from t5x_like.architectures.transformer import Decoder, DecoderLayer, Encoder, EncoderLayer, Transformer
from t5x_like.decoding.greedy import Greedy
from t5x_like.layers.norms import LayerNorm
from t5x_like.layers.residual import PostNorm
from t5x_like.layers.sparse_attention import LongformerAttention
from t5x_like.models.encoder_decoder import EncoderDecoderModel


def test_a_longformer_encoder_sees_far_through_global_tokens_alone() -> None:
    """LED: one encoder layer that sees two columns away, and a decoder that is asked what it makes of column 0."""
    local = EncoderLayer(LongformerAttention(3, 4, radius=2), MLP, norm=LayerNorm(), residual=PostNorm())
    layer = DecoderLayer(ATTENTION, ATTENTION, MLP, norm=LayerNorm(), residual=PostNorm())
    network = Transformer(
        embedder(segments=False),
        Encoder(LayerStack((local,), 1), norm=None),
        Decoder(LayerStack((layer,), 1), norm=None),
    )
    model = EncoderDecoderModel(network)
    tokens = np.random.default_rng(0).integers(2, VOCAB, (1, 12)).astype(np.int32)
    far = tokens.copy()
    far[0, 9] = tokens[0, 9] % (VOCAB - 3) + 2
    batch = {
        "encoder_input_tokens": jnp.asarray(tokens),
        "decoder_input_tokens": jnp.asarray([[0, 5]]),
        "global_attention_mask": jnp.zeros((1, 12), jnp.int32),
    }
    params = random_params(model, batch)

    def encoded(tokens: np.ndarray, is_global: np.ndarray) -> np.ndarray:
        arguments = {"encoder_input_tokens": jnp.asarray(tokens), "global_attention_mask": jnp.asarray(is_global)}
        return np.asarray(network.apply({"params": params}, **arguments, method="encode"))[0, 0]

    nowhere, there, here = np.zeros((3, 1, 12), np.int32)
    there[0, 9], here[0, 0] = 1, 1
    np.testing.assert_array_equal(encoded(tokens, nowhere), encoded(far, nowhere))
    for is_global in (there, here):
        assert np.abs(encoded(tokens, is_global) - encoded(far, is_global)).max() > 1e-3
    found = model.generate(params, batch | {"global_attention_mask": jnp.asarray(here)}, Greedy(), 3)
    first = model.logits(
        params, batch | {"global_attention_mask": jnp.asarray(here), "decoder_input_tokens": jnp.asarray([[0]])}
    )
    assert int(found.tokens[0, 0, 0]) == int(first[0, 0].argmax())
