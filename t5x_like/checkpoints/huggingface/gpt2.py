"""GPT-2 (Radford et al. 2019)."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal, cast

import numpy as np

from t5x_like.architectures.gpt import Gpt
from t5x_like.architectures.transformer import Decoder, DecoderLayer
from t5x_like.checkpoints.huggingface.family import ACTIVATIONS, Activation, AnyModel, Family, activation_of, stack_of
from t5x_like.checkpoints.huggingface.files import ConfigFile, Tensors
from t5x_like.checkpoints.huggingface.tensors import Layout, Modules, in_out, out_in
from t5x_like.data.features import DecoderFeatures
from t5x_like.layers.attention import MultiHeadAttention
from t5x_like.layers.embeddings import Embedding, InputEmbedding, LearnedPositions
from t5x_like.layers.linear import Linear
from t5x_like.layers.mlp import MlpBlock
from t5x_like.layers.norms import LayerNorm
from t5x_like.models.decoder_only import DecoderOnlyModel

_JOINED, _PARTS = "attn.c_attn.", ("attn.query.", "attn.key.", "attn.value.")
_TABLE, _HEAD = "transformer.wte.weight", "lm_head.weight"


def _layout(name: str, array: np.ndarray) -> np.ndarray:
    """Matrices lie as ours, but for that of the logits."""
    return out_in(name, array) if "logits_dense" in name else in_out(name, array)


@dataclasses.dataclass(frozen=True)
class Gpt2Family(Family):
    """GPT-2's entries. Queries, keys and values lie in one tensor over there, and matrices as ours do.

    Attributes:
      tied: whether logits come from the embedding table; not an entry, the tensors tell.
    """

    classes: ClassVar[Mapping[str, str]] = {"gpt2": "GPT2LMHeadModel"}
    network: ClassVar[type] = Gpt
    prefix: ClassVar[str] = "transformer."
    unused: ClassVar[str] = r".*\.attn\.(masked_)?bias"
    layout: ClassVar[Layout] = staticmethod(_layout)

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None = None
    activation_function: Activation = "gelu_new"
    layer_norm_epsilon: float | int = 1e-5
    embd_pdrop: float | int = 0.1
    resid_pdrop: float | int = 0.1
    attn_pdrop: float | int = 0.1
    bos_token_id: int = 50256
    eos_token_id: int = 50256
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    add_cross_attention: Literal[False] = False
    tied: bool = True

    @classmethod
    def names(cls, model_type: str) -> dict[str, str]:
        """All but what tensors tell."""
        return {name: name for name in super().names(model_type) if name != "tied"}

    @classmethod
    def read(cls, config: ConfigFile, tensors: Tensors) -> "Gpt2Family":
        """See `Family`."""
        if _HEAD in tensors and np.array_equal(tensors[_HEAD], tensors.get(_TABLE, ())):
            del tensors[_HEAD]
        return dataclasses.replace(cast(Gpt2Family, super().read(config, tensors)), tied=_HEAD not in tensors)

    @classmethod
    def unpacked(cls, tensors: Tensors) -> Tensors:
        """Three projections each."""
        new: Tensors = {}
        for name, tensor in tensors.items():
            if _JOINED in name and tensor.shape[-1] % 3 == 0:
                new |= {name.replace(_JOINED, part): x for part, x in zip(_PARTS, np.split(tensor, 3, -1), strict=True)}
            else:
                new[name] = tensor
        return new

    def packed(self, tensors: Tensors) -> Tensors:
        """One projection for all three."""
        new: Tensors = {}
        for name, tensor in tensors.items():
            if _PARTS[0] in name:
                joined = [tensors[name.replace(_PARTS[0], part)] for part in _PARTS]
                new[name.replace(_PARTS[0], _JOINED)] = np.concatenate(joined, -1)
            elif not any(part in name for part in _PARTS):
                new[name] = tensor
        return new

    @classmethod
    def of(cls, model: AnyModel, model_type: str) -> "Gpt2Family":
        """See `Family`."""
        model = cast(DecoderOnlyModel, model)
        network = cast(Gpt, model.network)
        inputs, decoder = network.token_embedder, network.decoder
        stack = decoder.stack
        layer = stack.pattern[0]
        return cls(
            model_type=model_type,
            vocab_size=inputs.tokens.vocab_size,
            n_positions=inputs.positions.max_length,
            n_embd=inputs.tokens.embed_dim,
            n_layer=stack.repeats * len(stack.pattern),
            n_head=layer.self_attention.num_heads,
            n_inner=layer.mlp.mlp_dim,
            activation_function=activation_of(layer.mlp.activations),
            layer_norm_epsilon=decoder.norm.epsilon,
            embd_pdrop=decoder.dropout_rate,
            resid_pdrop=layer.dropout_rate,
            attn_pdrop=layer.self_attention.dropout_rate,
            bos_token_id=model.converter.start_id,
            eos_token_id=model.eos_id,
            tied=decoder.logits_dense is None,
        )

    def entries(self) -> dict[str, object]:
        """See `Family`."""
        return super().entries() | {"tie_word_embeddings": self.tied}

    def model(self, dtype: str) -> DecoderOnlyModel:
        """See `Family`."""
        norm, rate = LayerNorm(float(self.layer_norm_epsilon)), float(self.resid_pdrop)
        attention = MultiHeadAttention(
            self.n_head, self.n_embd // self.n_head, float(self.attn_pdrop), dtype, scaled=True, use_bias=True
        )
        width, activation = self.n_inner or 4 * self.n_embd, ACTIVATIONS[self.activation_function]
        mlp = MlpBlock(width, (activation,), dtype=dtype, use_bias=True)
        embedding = InputEmbedding(
            Embedding(self.vocab_size, self.n_embd, dtype), LearnedPositions(self.n_positions, self.n_embd, dtype)
        )
        stack = stack_of([DecoderLayer(attention, None, mlp, rate, norm)] * self.n_layer)
        head = None if self.tied else Linear((self.vocab_size,), ("embed", "vocab"))
        decoder = Decoder(stack, float(self.embd_pdrop), norm, logits_dense=head, output_dropout_rate=0.0)
        converter = DecoderFeatures(start_id=self.bos_token_id)
        return DecoderOnlyModel(Gpt(embedding, decoder), eos_id=self.eos_token_id, converter=converter)

    def modules(self) -> Modules:
        """See `Family`."""
        ours, layer = "decoder/layers_#", "transformer.h.#"
        return {
            "token_embedder/tokens": "transformer.wte",
            "token_embedder/positions": "transformer.wpe",
            f"{ours}/pre_self_attention_layer_norm": f"{layer}.ln_1",
            **{f"{ours}/self_attention/{name}": f"{layer}.attn.{name}" for name in ("query", "key", "value")},
            f"{ours}/self_attention/out": f"{layer}.attn.c_proj",
            f"{ours}/pre_mlp_layer_norm": f"{layer}.ln_2",
            f"{ours}/mlp/wi": f"{layer}.mlp.c_fc",
            f"{ours}/mlp/wo": f"{layer}.mlp.c_proj",
            "decoder/decoder_norm": "transformer.ln_f",
            "decoder/logits_dense": "lm_head",
        }
