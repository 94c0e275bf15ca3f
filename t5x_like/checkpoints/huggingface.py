"""Hugging Face folders (`config.json`, `model.safetensors`) of T5, MT5 and UMT5, read and written without torch."""

import dataclasses
import json
import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from t5x_like.architectures.stack import LayerStack
from t5x_like.architectures.t5 import T5, Decoder, DecoderLayer, Encoder, EncoderLayer
from t5x_like.architectures.variables import named_leaves, parameter_name
from t5x_like.errors import UserError
from t5x_like.layers.attention import MultiHeadAttention
from t5x_like.layers.linear import Embedding, Linear, default_dtype
from t5x_like.layers.mlp import MlpBlock
from t5x_like.layers.norms import RMSNorm
from t5x_like.layers.positions import RelativePositionBias
from t5x_like.models.encoder_decoder import EncoderDecoderModel
from t5x_like.typing import Params

_MODULES = {
    "token_embedder": "shared",
    "encoder/relpos_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "encoder/layers_#/relpos_bias": "encoder.block.#.layer.0.SelfAttention.relative_attention_bias",
    "encoder/layers_#/pre_attention_layer_norm": "encoder.block.#.layer.0.layer_norm",
    "encoder/layers_#/attention/query": "encoder.block.#.layer.0.SelfAttention.q",
    "encoder/layers_#/attention/key": "encoder.block.#.layer.0.SelfAttention.k",
    "encoder/layers_#/attention/value": "encoder.block.#.layer.0.SelfAttention.v",
    "encoder/layers_#/attention/out": "encoder.block.#.layer.0.SelfAttention.o",
    "encoder/layers_#/pre_mlp_layer_norm": "encoder.block.#.layer.1.layer_norm",
    "encoder/layers_#/mlp/wi": "encoder.block.#.layer.1.DenseReluDense.wi",
    "encoder/layers_#/mlp/wi_0": "encoder.block.#.layer.1.DenseReluDense.wi_0",
    "encoder/layers_#/mlp/wi_1": "encoder.block.#.layer.1.DenseReluDense.wi_1",
    "encoder/layers_#/mlp/wo": "encoder.block.#.layer.1.DenseReluDense.wo",
    "encoder/encoder_norm": "encoder.final_layer_norm",
    "decoder/relpos_bias": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "decoder/layers_#/relpos_bias": "decoder.block.#.layer.0.SelfAttention.relative_attention_bias",
    "decoder/layers_#/pre_self_attention_layer_norm": "decoder.block.#.layer.0.layer_norm",
    "decoder/layers_#/self_attention/query": "decoder.block.#.layer.0.SelfAttention.q",
    "decoder/layers_#/self_attention/key": "decoder.block.#.layer.0.SelfAttention.k",
    "decoder/layers_#/self_attention/value": "decoder.block.#.layer.0.SelfAttention.v",
    "decoder/layers_#/self_attention/out": "decoder.block.#.layer.0.SelfAttention.o",
    "decoder/layers_#/pre_cross_attention_layer_norm": "decoder.block.#.layer.1.layer_norm",
    "decoder/layers_#/encoder_decoder_attention/query": "decoder.block.#.layer.1.EncDecAttention.q",
    "decoder/layers_#/encoder_decoder_attention/key": "decoder.block.#.layer.1.EncDecAttention.k",
    "decoder/layers_#/encoder_decoder_attention/value": "decoder.block.#.layer.1.EncDecAttention.v",
    "decoder/layers_#/encoder_decoder_attention/out": "decoder.block.#.layer.1.EncDecAttention.o",
    "decoder/layers_#/pre_mlp_layer_norm": "decoder.block.#.layer.2.layer_norm",
    "decoder/layers_#/mlp/wi": "decoder.block.#.layer.2.DenseReluDense.wi",
    "decoder/layers_#/mlp/wi_0": "decoder.block.#.layer.2.DenseReluDense.wi_0",
    "decoder/layers_#/mlp/wi_1": "decoder.block.#.layer.2.DenseReluDense.wi_1",
    "decoder/layers_#/mlp/wo": "decoder.block.#.layer.2.DenseReluDense.wo",
    "decoder/decoder_norm": "decoder.final_layer_norm",
    "decoder/logits_dense": "lm_head",
}
"""Our modules, one parameter each, and theirs."""

_EMBEDDING, _HEAD = "shared.weight", "lm_head.weight"
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # of the embedding, in old folders
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # likewise; transformers drops it

_TRANSPOSED = ("kernel", "rel_embedding")

_CLASSES = {
    "t5": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "umt5": "UMT5ForConditionalGeneration",
}
_ACTIVATIONS = {
    "relu": ("relu",),
    "gelu": ("gelu_exact",),
    "gelu_new": ("gelu",),
    "silu": ("silu",),
    "gated-relu": ("relu", "linear"),
    "gated-gelu": ("gelu", "linear"),  # the tanh form, though "gelu" alone is the exact one
    "gated-silu": ("silu", "linear"),
}


class Loaded(NamedTuple):
    """A model, its parameters, and Hugging Face's name of its kind (`t5`, `mt5` or `umt5`), which `save` takes too."""

    model: EncoderDecoderModel
    params: Params
    model_type: str


def load(folder: str | Path, dtype: str | None = None) -> Loaded:
    """Reads a folder that `save_pretrained` wrote, whole or in shards: T5 1.0, 1.1, FLAN, ByT5, mT5 and UMT5.

    Args:
      folder: has `config.json`, and `model.safetensors` or `model.safetensors.index.json`.
      dtype: of the products; None takes what this machine is good at (`default_dtype`).

    Returns:
      The model, its layers in a loop, and its parameters in float32 whatever the file's dtype.

    Raises:
      UserError: a file is missing or broken, or the tensors are not those that `config.json` asks for.
    """
    folder = Path(folder)
    config = _Config.read(folder / "config.json")
    tensors = _read_tensors(folder)
    config = dataclasses.replace(config, tie_word_embeddings=_HEAD not in tensors)
    network = config.network(dtype or default_dtype())
    model = EncoderDecoderModel(network, eos_id=config.eos_token_id, start_id=config.decoder_start_token_id)
    return Loaded(model, _parameters(model, tensors, folder), config.model_type)


def save(folder: str | Path, model: EncoderDecoderModel, params: Params, model_type: str | None = None) -> None:
    """Writes a folder that `load` and Hugging Face's `from_pretrained` read: the inverse of `load`.

    Beware that UMT5 of transformers 5 scales the decoder's output whatever a folder says, and divides the logits of one
    trained without that, Google's own included, by sqrt(d_model).

    Args:
      folder: made if need be.
      model: a network that Hugging Face has too; scanned layers are written one by one, and one dropout rate for all.
      params: its parameters.
      model_type: `t5`, `mt5` or `umt5`; None is `umt5` where layers own their bias tables and `t5` elsewhere.

    Raises:
      UserError: Hugging Face's `model_type` is not this network; the message says where they differ.
    """
    folder = Path(folder)
    config = _Config.of(model, model_type)
    arrays = {_tensor_name(name): _as_stored(name, array) for name, array in _unscanned(params)}
    entries = dataclasses.asdict(config) | {
        "architectures": [_CLASSES[config.model_type]],
        "is_encoder_decoder": True,
        "dtype": arrays[_EMBEDDING].dtype.name,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})


# ---- config.json and the network it describes


@dataclasses.dataclass(frozen=True)
class _Config:
    """What makes a network, under the names of `config.json`."""

    model_type: str
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

    @classmethod
    def read(cls, path: Path) -> "_Config":
        """Reads `config.json`, old ones with their defaults."""
        entries = {name: value for name, value in _read_json(path).items() if value is not None}
        model_type = entries.get("model_type")
        defaults = {
            "num_decoder_layers": entries.get("num_layers"),
            "feed_forward_proj": "relu" if model_type == "t5" else "gated-gelu",
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "layer_norm_epsilon": 1e-6,
            "dropout_rate": 0.1,
            "tie_word_embeddings": True,
            # Before transformers 5, tied meant scaled; since then, the file says of every model that it is tied.
            "scale_decoder_outputs": entries.get("tie_word_embeddings", True),
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": entries.get("pad_token_id", 0),
        }
        entries = defaults | entries
        for name, kind in typing.get_type_hints(cls).items():
            if not isinstance(entries.get(name), kind):
                found = f"is {entries[name]!r}" if name in entries else "is missing"
                raise UserError(f"{path}: {name} {found}; it must be one {getattr(kind, '__name__', 'number')}")
        for name, known in (("model_type", _CLASSES), ("feed_forward_proj", _ACTIVATIONS)):
            if entries[name] not in known:
                raise UserError(f"{path}: {name} is {entries[name]!r}; those known here are {', '.join(known)}")
        return cls(**{field.name: entries[field.name] for field in dataclasses.fields(cls)})

    @classmethod
    def of(cls, model: EncoderDecoderModel, model_type: str | None) -> "_Config":
        """The config whose `network` computes what the model's does, or a `UserError`."""
        network = model.network
        if not isinstance(network, T5):
            raise UserError(f"save: Hugging Face's T5 cannot be a {type(network).__name__}")
        if model_type not in (None, *_CLASSES):
            raise UserError(f"save: model_type {model_type!r} is not one of {', '.join(_CLASSES)}")
        embedder, encoder, decoder = network.token_embedder, network.encoder, network.decoder
        try:
            layer = encoder.stack.pattern[0]
            bias = layer.relpos_bias or encoder.relpos_bias
            config = cls(
                model_type=model_type or ("umt5" if layer.relpos_bias else "t5"),
                vocab_size=embedder.vocab_size,
                d_model=embedder.embed_dim,
                d_kv=layer.attention.head_dim,
                d_ff=layer.mlp.mlp_dim,
                num_layers=encoder.stack.repeats,
                num_decoder_layers=decoder.stack.repeats,
                num_heads=layer.attention.num_heads,
                feed_forward_proj={value: key for key, value in _ACTIVATIONS.items()}[layer.mlp.activations],
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
        except (AttributeError, KeyError) as error:
            raise UserError(f"save: Hugging Face's T5 cannot be this network: {error}") from error
        theirs = dict(_settings(config.network(embedder.dtype)))
        for name, value in _settings(network):
            if value != theirs.get(name):
                raise UserError(
                    f"save: {name} is {value}, but {theirs.get(name)} in Hugging Face's {config.model_type}"
                )
        return config

    def network(self, dtype: str) -> T5:
        """The network, its layers in a loop."""
        rate, norm = float(self.dropout_rate), RMSNorm(float(self.layer_norm_epsilon))
        attention = MultiHeadAttention(self.num_heads, self.d_kv, rate, dtype)
        mlp = MlpBlock(self.d_ff, _ACTIVATIONS[self.feed_forward_proj], rate, dtype)
        buckets = self.relative_attention_num_buckets, self.relative_attention_max_distance
        encoder_bias = RelativePositionBias(self.num_heads, *buckets, bidirectional=True)
        decoder_bias = RelativePositionBias(self.num_heads, *buckets, bidirectional=False)
        shared = self.model_type != "umt5"
        encoder_layer = EncoderLayer(attention, mlp, rate, norm, None if shared else encoder_bias)
        decoder_layer = DecoderLayer(attention, attention, mlp, rate, norm, None if shared else decoder_bias)
        encoder_stack = LayerStack((encoder_layer,), self.num_layers)
        decoder_stack = LayerStack((decoder_layer,), self.num_decoder_layers)
        head = None if self.tie_word_embeddings else Linear((self.vocab_size,), ("embed", "vocab"))
        return T5(
            Embedding(self.vocab_size, self.d_model, dtype),
            Encoder(encoder_stack, rate, norm, encoder_bias if shared else None),
            Decoder(decoder_stack, rate, norm, decoder_bias if shared else None, head),
            scale_decoder_output=self.scale_decoder_outputs and self.model_type != "mt5",  # which never scales
            pad_id=self.pad_token_id,
        )


def _settings(module: object, name: str = "network") -> Iterator[tuple[str, object]]:
    """Everything that decides what a network computes, by name; not how it starts, trains and runs."""
    elsewhere = ("parent", "name", "dtype", "scan", "remat", "dropout_rate", "kernel_init", "init_stddev")
    if dataclasses.is_dataclass(module):
        yield name, type(module).__name__
        for field in dataclasses.fields(module):
            if field.name not in elsewhere:
                yield from _settings(getattr(module, field.name), f"{name}.{field.name}")
    elif isinstance(module, tuple):
        for i, part in enumerate(module):
            yield from _settings(part, f"{name}[{i}]")
    else:
        yield name, module


# ---- model.safetensors and the parameters it holds


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor, once: without what old folders hold in several copies."""
    index, files = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if not files[0].is_file() and index.is_file():
        files = [folder / file for file in sorted(set(_read_json(index).get("weight_map", {}).values()))]
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        try:
            with safe_open(file, "np") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a dict)
                    if (dtype := opened.get_slice(name).get_dtype()) not in ("F64", "F32", "F16", "BF16"):
                        raise UserError(f"{file}: {name} is {dtype}; only unquantised, float weights can be read")
                    tensors[name] = opened.get_tensor(name)
        except FileNotFoundError as error:
            raise UserError(f"{file} is missing; the folder should be one that save_pretrained wrote") from error
        except SafetensorError as error:
            raise UserError(f"{file} is broken, fetch it again: {error}") from error
    tensors.pop(_UNUSED, None)
    for name in _COPIES:
        copy = tensors.pop(name, None)
        if copy is not None and not np.array_equal(tensors.setdefault(_EMBEDDING, copy), copy):
            raise UserError(f"{folder}: {name} is not equal to {_EMBEDDING}; a T5 has one embedding only")
    if _HEAD in tensors and np.array_equal(tensors[_HEAD], tensors.get(_EMBEDDING, ())):
        del tensors[_HEAD]  # tied
    return tensors


def _parameters(model: EncoderDecoderModel, tensors: dict[str, np.ndarray], folder: Path) -> Params:
    """The parameters; empties `tensors`, so that no large model is held twice."""
    token = np.zeros((1, 1), np.int32)
    batch = {"encoder_input_tokens": token, "decoder_input_tokens": token}
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))
    named: dict[str, jax.ShapeDtypeStruct] = dict(named_leaves(shapes))
    expected = {_tensor_name(name): _stored_shape(name, leaf.shape) for name, leaf in named.items()}
    wrong = [f"{name} {shape} is missing" for name, shape in expected.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            wrong.append(f"{name} {tensor.shape} has no place in it")
        elif tensor.shape != expected[name]:
            wrong.append(f"{name} is {tensor.shape} and should be {expected[name]}")
    if wrong:
        raise UserError(
            f"{folder}: the tensors are not those of the model in config.json; mend it, or save the model again:\n  "
            + "\n  ".join(wrong[:9] + ["..."] * (len(wrong) > 9))
        )

    def take(path: tuple[jax.tree_util.KeyEntry, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = parameter_name(path)
        tensor = tensors.pop(_tensor_name(name))
        return jnp.array((tensor.T if name.endswith(_TRANSPOSED) else tensor).reshape(leaf.shape), jnp.float32)

    return jax.tree.map_with_path(take, shapes)


def _unscanned(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters by name, those of scanned layers one by one (see `LayerStack`)."""
    named: dict[str, jax.Array] = dict(named_leaves(params))
    for name, leaf in named.items():
        array = np.asarray(leaf)
        if "/layers/" not in name:
            yield name, array
        else:
            yield from ((name.replace("/layers/", f"/layers_{i}/"), array[:, i]) for i in range(array.shape[1]))


def _tensor_name(name: str) -> str:
    """`encoder/layers_3/mlp/wo/kernel` -> `encoder.block.3.layer.1.DenseReluDense.wo.weight`."""
    module, number = name.rpartition("/")[0], re.search(r"/layers_(\d+)/", name)
    if number is None:
        return f"{_MODULES[module]}.weight"
    module = module.replace(f"layers_{number[1]}", "layers_#")
    return f"{_MODULES[module].replace('#', number[1])}.weight"


def _stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A parameter's shape over there, where matrices are `[out, in]` and bias tables `[buckets, heads]`."""
    if not name.endswith(_TRANSPOSED):
        return shape
    inputs = 2 if name.endswith("/out/kernel") else 1
    return math.prod(shape[inputs:]), math.prod(shape[:inputs])


def _as_stored(name: str, array: np.ndarray) -> np.ndarray:
    shape = _stored_shape(name, array.shape)
    stored = array.reshape(shape[::-1]).T if name.endswith(_TRANSPOSED) else array
    return np.ascontiguousarray(stored)  # save_file writes memory as it lies


def _read_json(path: Path) -> dict[str, typing.Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; the folder should be one that save_pretrained wrote") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: {error}") from error
