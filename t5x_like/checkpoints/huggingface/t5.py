"""T5 1.0, 1.1, FLAN, ByT5, mT5, UMT5 and Switch Transformers."""

import dataclasses
from collections.abc import Iterable
from typing import ClassVar, cast

import numpy as np

from t5x_like.architectures.t5 import T5
from t5x_like.architectures.transformer import Decoder, DecoderLayer, Encoder, EncoderLayer
from t5x_like.checkpoints.huggingface.family import ACTIVATIONS, AnyModel, Family
from t5x_like.checkpoints.huggingface.files import ConfigFile, Tensors
from t5x_like.checkpoints.huggingface.switch import are_sparse, sparse_fields, sparse_stack, sparse_step
from t5x_like.checkpoints.huggingface.tensors import Modules
from t5x_like.layers.attention import MultiHeadAttention
from t5x_like.layers.embeddings import Embedding
from t5x_like.layers.linear import Linear
from t5x_like.layers.mlp import MlpBlock
from t5x_like.layers.moe import Experts, SparseMlp
from t5x_like.layers.norms import RMSNorm
from t5x_like.layers.positions import RelativePositionBias
from t5x_like.layers.routing import FixedCapacity, Router, TopK
from t5x_like.models.encoder_decoder import EncoderDecoderModel

_EMBEDDING, _HEAD = "shared.weight", "lm_head.weight"
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_SWITCH = "switch_transformers"
_SWITCH_ACTIVATIONS = {name: (ACTIVATIONS[name],) for name in ("relu", "gelu", "gelu_new", "silu")}
_ACTIVATIONS = _SWITCH_ACTIVATIONS | {
    "gated-relu": ("relu", "linear"),
    "gated-gelu": ("gelu", "linear"),  # the tanh form, though "gelu" alone is the exact one
    "gated-silu": ("silu", "linear"),
}
_SWITCH_NAMES = {"feed_forward_proj": "dense_act_fn", "scale_decoder_outputs": "tie_word_embeddings"}
"""Fields that Switch Transformers call otherwise. Which embeddings are tied, their tensors say."""


@dataclasses.dataclass(frozen=True)
class T5Family(Family):
    """T5's entries. Fields with defaults are Switch Transformers' alone.

    UMT5 of transformers 5 scales the decoder's output whatever a folder says, and divides the logits of one trained
    without that, Google's own included, by sqrt(d_model).

    Switch Transformers compute what transformers 5 does for every real token. Padding in front of tokens or between
    them takes an expert's capacity over there, and never here (Hugging Face leaves `router_ignore_padding_tokens`
    unused). Older releases gave dropped tokens their own input, gated, where newer ones and we give zeros.
    """

    classes: ClassVar = {
        "t5": "T5ForConditionalGeneration",
        "mt5": "MT5ForConditionalGeneration",
        "umt5": "UMT5ForConditionalGeneration",
        _SWITCH: "SwitchTransformersForConditionalGeneration",
    }
    network: ClassVar = T5
    # Old folders have this one, and copies; so have untied ones.
    unused: ClassVar = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
    copies: ClassVar = {_EMBEDDING: _COPIES}

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    feed_forward_proj: str
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    layer_norm_epsilon: float | int
    dropout_rate: float | int
    tie_word_embeddings: bool
    scale_decoder_outputs: bool
    pad_token_id: int
    eos_token_id: int
    decoder_start_token_id: int
    encoder_sparse_step: int = 0
    decoder_sparse_step: int = 0
    num_experts: int = 8
    expert_capacity: int = 64
    router_jitter_noise: float | int = 0.01
    router_aux_loss_coef: float | int = 0.001
    router_z_loss_coef: float | int = 0.001
    router_bias: bool = False
    router_dtype: str = "float32"

    @classmethod
    def names(cls, model_type: str) -> dict[str, str]:
        """See `Family`."""
        fields = dataclasses.fields(cls)
        if model_type != _SWITCH:
            return {field.name: field.name for field in fields if field.default is dataclasses.MISSING}
        return {f.name: _SWITCH_NAMES.get(f.name, f.name) for f in fields if f.name != "tie_word_embeddings"}

    @classmethod
    def read(cls, config: ConfigFile, tensors: Tensors) -> "T5Family":
        """Old files are read with their defaults."""
        entries, model_type = config.entries, config.choice("model_type", cls.classes)
        defaults = {
            "num_decoder_layers": entries.get("num_layers"),
            "feed_forward_proj": "gated-gelu" if model_type in ("mt5", "umt5") else "relu",
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "layer_norm_epsilon": 1e-6,
            "dropout_rate": 0.1,
            "tie_word_embeddings": True,
            # Before transformers 5, tied meant scaled; since then, the file says of every T5 that it is tied.
            "scale_decoder_outputs": entries.get("tie_word_embeddings", True),
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": entries.get("pad_token_id", 0),
        }
        if model_type == _SWITCH:
            encoder, decoder = entries.get("num_layers"), entries.get("num_decoder_layers", entries.get("num_layers"))
            defaults["encoder_sparse_step"] = sparse_step(encoder, entries.get("num_sparse_encoder_layers", 3))
            defaults["decoder_sparse_step"] = sparse_step(decoder, entries.get("num_sparse_decoder_layers", 3))
        names = cls.names(model_type)
        family = config.fields(cls, names, defaults)
        known: dict[str, Iterable[object]] = {
            "feed_forward_proj": _SWITCH_ACTIVATIONS if model_type == _SWITCH else _ACTIVATIONS,
            "router_bias": (False,),
            "router_dtype": ("float32",),
        }
        for ours, choices in known.items():
            config.check_choice(names.get(ours, ours), getattr(family, ours), choices)
        for name in ("num_layers", "num_decoder_layers", "num_experts", "expert_capacity"):
            config.check_positive(name, getattr(family, name))
        if _HEAD in tensors and np.array_equal(tensors[_HEAD], tensors.get(_EMBEDDING, ())):
            del tensors[_HEAD]
        return dataclasses.replace(family, tie_word_embeddings=_HEAD not in tensors)

    def entries(self) -> dict[str, object]:
        """See `Family`."""
        entries = super().entries() | {"is_encoder_decoder": True}
        if self.model_type != _SWITCH:
            return entries
        encoder = are_sparse(self.num_layers, self.encoder_sparse_step)
        decoder = are_sparse(self.num_decoder_layers, self.decoder_sparse_step)
        return entries | {"num_sparse_encoder_layers": sum(encoder), "num_sparse_decoder_layers": sum(decoder)}

    def packed(self, tensors: Tensors) -> Tensors:
        """With the copies that a Switch Transformer's folder has if anything is untied."""
        if self.model_type == _SWITCH and not self.scale_decoder_outputs:
            return dict.fromkeys((*_COPIES, _HEAD), tensors[_EMBEDDING]) | tensors
        return tensors

    @classmethod
    def kind(cls, network: object) -> str:
        """See `Family`."""
        network = cast(T5, network)
        layers = (*network.encoder.stack.pattern, *network.decoder.stack.pattern)
        if any(isinstance(layer.mlp, SparseMlp) for layer in layers):
            return _SWITCH
        return "umt5" if layers[0].relpos_bias else "t5"

    @classmethod
    def of(cls, model: AnyModel, model_type: str) -> "T5Family":
        """See `Family`."""
        model = cast(EncoderDecoderModel, model)
        network = cast(T5, model.network)
        embedder, encoder, decoder = network.token_embedder, network.encoder, network.decoder
        layer = encoder.stack.pattern[0]
        bias = layer.relpos_bias or encoder.relpos_bias
        mlp = layer.mlp.expert if isinstance(layer.mlp, SparseMlp) else layer.mlp
        sparse = sparse_fields(encoder.stack, decoder.stack) if model_type == _SWITCH else None
        activations = _SWITCH_ACTIVATIONS if model_type == _SWITCH else _ACTIVATIONS
        family = cls(
            model_type=model_type,
            vocab_size=embedder.vocab_size,
            d_model=embedder.embed_dim,
            d_kv=layer.attention.head_dim,
            d_ff=mlp.mlp_dim,
            num_layers=encoder.stack.repeats * len(encoder.stack.pattern),
            num_decoder_layers=decoder.stack.repeats * len(decoder.stack.pattern),
            num_heads=layer.attention.num_heads,
            feed_forward_proj={value: key for key, value in activations.items()}[mlp.activations],
            relative_attention_num_buckets=bias.num_buckets,
            relative_attention_max_distance=bias.max_distance,
            layer_norm_epsilon=encoder.norm.epsilon,
            dropout_rate=encoder.dropout_rate,
            tie_word_embeddings=decoder.logits_dense is None,
            scale_decoder_outputs=network.scale_decoder_output,
            pad_token_id=network.pad_id,
            eos_token_id=model.eos_id,
            decoder_start_token_id=model.start_id,
        )
        return dataclasses.replace(family, **sparse._asdict()) if sparse else family

    def model(self, dtype: str) -> EncoderDecoderModel:
        """See `Family`."""
        network = self._network(dtype)
        return EncoderDecoderModel(network, eos_id=self.eos_token_id, start_id=self.decoder_start_token_id)

    def _network(self, dtype: str) -> T5:
        rate, norm = float(self.dropout_rate), RMSNorm(float(self.layer_norm_epsilon))
        attention = MultiHeadAttention(self.num_heads, self.d_kv, rate, dtype)
        activations = _ACTIVATIONS[self.feed_forward_proj]
        mlp = MlpBlock(self.d_ff, activations, rate, dtype)
        experts = Experts(self.num_experts, self.d_ff, activations, rate, dtype=dtype)
        losses = float(self.router_aux_loss_coef), float(self.router_z_loss_coef)
        router = Router(TopK(), float(self.router_jitter_noise), *losses)
        sparse = SparseMlp(experts, router, FixedCapacity(self.expert_capacity))
        buckets = self.relative_attention_num_buckets, self.relative_attention_max_distance
        encoder_bias = RelativePositionBias(self.num_heads, *buckets, bidirectional=True)
        decoder_bias = RelativePositionBias(self.num_heads, *buckets, bidirectional=False)
        shared = self.model_type != "umt5"
        encoder_layer = EncoderLayer(attention, mlp, rate, norm, None if shared else encoder_bias)
        decoder_layer = DecoderLayer(attention, attention, mlp, rate, norm, None if shared else decoder_bias)
        encoder_stack = sparse_stack(encoder_layer, sparse, self.num_layers, self.encoder_sparse_step)
        decoder_stack = sparse_stack(decoder_layer, sparse, self.num_decoder_layers, self.decoder_sparse_step)
        head = None if self.tie_word_embeddings else Linear((self.vocab_size,), ("embed", "vocab"))
        return T5(
            Embedding(self.vocab_size, self.d_model, dtype),
            Encoder(encoder_stack, rate, norm, encoder_bias if shared else None),
            Decoder(decoder_stack, rate, norm, decoder_bias if shared else None, head),
            scale_decoder_output=self.scale_decoder_outputs and self.model_type != "mt5",  # which never scales
            pad_id=self.pad_token_id,
        )

    def modules(self) -> Modules:
        """See `Family`."""
        mlp = "mlp" if self.model_type == _SWITCH else "DenseReluDense"
        encoder = _half("encoder", mlp, {"attention": "SelfAttention"})
        attentions = {"self_attention": "SelfAttention", "encoder_decoder_attention": "EncDecAttention"}
        decoder = _half("decoder", mlp, attentions)
        return {"token_embedder": "shared", "decoder/logits_dense": "lm_head"} | encoder | decoder


def _half(half: str, mlp: str, attentions: dict[str, str]) -> dict[str, str]:
    """Names of the encoder or the decoder: over there, sublayers are numbered and each has a norm."""
    ours, theirs, last = f"{half}/layers_#", f"{half}.block.#.layer", len(attentions)
    norms = [name.replace("encoder_decoder", "cross") for name in attentions]
    names = {f"{half}/{half}_norm": f"{half}.final_layer_norm"}
    names |= {f"{ours}/pre_{name}_layer_norm": f"{theirs}.{i}.layer_norm" for i, name in enumerate([*norms, "mlp"])}
    for i, (name, attention) in enumerate(attentions.items()):
        parts = ("query", "key", "value", "out")
        names |= {f"{ours}/{name}/{part}": f"{theirs}.{i}.{attention}.{part[0]}" for part in parts}
    names |= {f"{ours}/mlp/{part}": f"{theirs}.{last}.{mlp}.{part}" for part in ("wi", "wi_0", "wi_1", "wo")}
    names |= {f"{ours}/mlp/expert_#/{part}": f"{theirs}.{last}.mlp.experts.expert_#.{part}" for part in ("wi", "wo")}
    return names | {
        f"{ours}/mlp/router/router_weights": f"{theirs}.{last}.mlp.router.classifier",
        f"{half}/relpos_bias": f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias",
        f"{ours}/relpos_bias": f"{theirs}.0.SelfAttention.relative_attention_bias",
    }
