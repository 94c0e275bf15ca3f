"""XLNet with its language model's head."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal, cast

import numpy as np

from t5x_like.architectures.stack import LayerStack
from t5x_like.architectures.transformer import Encoder, EncoderLayer
from t5x_like.architectures.xlnet import XLNet
from t5x_like.checkpoints.huggingface.family import ACTIVATIONS, Activation, Family, activation_of
from t5x_like.checkpoints.huggingface.tensors import Layout, Modules
from t5x_like.data.features import PermutationFeatures
from t5x_like.layers.embeddings import Embedding
from t5x_like.layers.linear import Normal
from t5x_like.layers.mlp import MlpBlock
from t5x_like.layers.norms import LayerNorm
from t5x_like.layers.residual import PostNorm
from t5x_like.layers.two_stream_attention import TwoStreamAttention
from t5x_like.models.network import NetworkModel
from t5x_like.models.permutation_lm import PermutationLMModel


def _layout(name: str, array: np.ndarray) -> np.ndarray:
    """All as here, but for matrices of the MLP, `[out, in]`, and attention's output, whose result comes first."""
    if name == "mask_embedding":
        return array[None, None]
    if name.endswith("attention/out/kernel"):
        return array.transpose(2, 0, 1)
    return array.T if "/mlp/" in name else array


@dataclasses.dataclass(frozen=True)
class XLNetFamily(Family):
    """XLNet's entries. Where `mem_len` is null, Hugging Face remembers everything, and we nothing."""

    classes: ClassVar[Mapping[str, str]] = {"xlnet": "XLNetLMHeadModel"}
    network: ClassVar[type[XLNet]] = XLNet
    prefix: ClassVar[str] = "transformer."
    copies: ClassVar[Mapping[str, tuple[str, ...]]] = {"transformer.word_embedding.weight": ("lm_loss.weight",)}
    layout: ClassVar[Layout] = staticmethod(_layout)

    vocab_size: int
    d_model: int
    n_layer: int
    n_head: int
    d_inner: int
    ff_activation: Activation = "gelu"
    layer_norm_eps: float | int = 1e-12
    dropout: float | int = 0.1
    pad_token_id: int = 5
    mem_len: int = 0
    attn_type: Literal["bi"] = "bi"
    bi_data: Literal[False] = False
    same_length: Literal[False] = False
    untie_r: Literal[True] = True
    clamp_len: Literal[-1] = -1

    def model(self, dtype: str) -> PermutationLMModel:
        """See `Family`."""
        rate = float(self.dropout)
        attention = TwoStreamAttention(self.n_head, self.d_model // self.n_head, rate, dtype, self.mem_len)
        activations = (ACTIVATIONS[self.ff_activation],)
        mlp = MlpBlock(self.d_inner, activations, rate, dtype, use_bias=True, kernel_init=Normal())
        layer = EncoderLayer(attention, mlp, rate, LayerNorm(float(self.layer_norm_eps)), residual=PostNorm())
        embedder = Embedding(self.vocab_size, self.d_model, dtype, init_stddev=0.02, output_bias=True)
        encoder = Encoder(LayerStack((layer,), self.n_layer), rate, norm=None)
        network = XLNet(embedder, encoder, rate, self.pad_token_id)
        return PermutationLMModel(network, PermutationFeatures(self.pad_token_id))

    def modules(self) -> Modules:
        """See `Family`."""
        ours, theirs = "encoder/layers_#", "transformer.layer.#"
        kernels = {"query": "q", "key": "k", "value": "v", "distance": "r", "out": "o"}
        biases = {"content_bias": "r_w_bias", "distance_bias": "r_r_bias", "segment_bias": "r_s_bias"}
        names = {f"{name}/kernel": tensor for name, tensor in kernels.items()} | biases
        names |= {"segment_embedding": "seg_embed"}
        return {
            "token_embedder": "transformer.word_embedding",
            "token_embedder/bias": "lm_loss.bias",
            "mask_embedding": "transformer.mask_emb",
            **{f"{ours}/attention/{name}": f"{theirs}.rel_attn.{tensor}" for name, tensor in names.items()},
            f"{ours}/post_attention_layer_norm": f"{theirs}.rel_attn.layer_norm",
            f"{ours}/mlp/wi": f"{theirs}.ff.layer_1",
            f"{ours}/mlp/wo": f"{theirs}.ff.layer_2",
            f"{ours}/post_mlp_layer_norm": f"{theirs}.ff.layer_norm",
        }

    @classmethod
    def of(cls, model: NetworkModel, model_type: str) -> "XLNetFamily":
        """See `Family`."""
        network = cast(XLNet, model.network)
        stack, embedder = network.encoder.stack, network.token_embedder
        layer = stack.pattern[0]
        return cls(
            model_type=model_type,
            vocab_size=embedder.vocab_size,
            d_model=embedder.embed_dim,
            n_layer=stack.repeats * len(stack.pattern),
            n_head=layer.attention.num_heads,
            d_inner=layer.mlp.mlp_dim,
            ff_activation=activation_of(layer.mlp.activations),
            layer_norm_eps=layer.norm.epsilon,
            dropout=network.dropout_rate,
            pad_token_id=network.pad_id,
            mem_len=layer.attention.memory_length,
        )
