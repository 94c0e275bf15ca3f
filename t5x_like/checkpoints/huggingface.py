"""Hugging Face folders (`config.json`, `model.safetensors`) of T5 and its kin, read and written without torch."""

import dataclasses
import json
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from t5x_like.architectures.stack import LayerStack
from t5x_like.architectures.t5 import T5
from t5x_like.architectures.transformer import Decoder, DecoderLayer, Encoder, EncoderLayer
from t5x_like.architectures.variables import named_leaves, parameter_name
from t5x_like.checkpoints.huggingface_names import as_stored, fill, pieces, stored_shape, tensor_name
from t5x_like.errors import UserError
from t5x_like.layers.attention import MultiHeadAttention
from t5x_like.layers.embeddings import Embedding
from t5x_like.layers.linear import Linear, default_dtype
from t5x_like.layers.mlp import MlpBlock
from t5x_like.layers.moe import Experts, SparseMlp
from t5x_like.layers.norms import RMSNorm
from t5x_like.layers.positions import RelativePositionBias
from t5x_like.layers.routing import FixedCapacity, Router, TopK
from t5x_like.models.encoder_decoder import EncoderDecoderModel
from t5x_like.typing import Params

_EMBEDDING, _HEAD = "shared.weight", "lm_head.weight"
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # of the embedding, in old and untied folders
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # likewise; transformers drops it

_SWITCH = "switch_transformers"
_CLASSES = {
    "t5": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "umt5": "UMT5ForConditionalGeneration",
    _SWITCH: "SwitchTransformersForConditionalGeneration",
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
_SWITCH_ACTIVATIONS = {name: parts for name, parts in _ACTIVATIONS.items() if len(parts) == 1}
_SWITCH_NAMES = {"feed_forward_proj": "dense_act_fn", "scale_decoder_outputs": "tie_word_embeddings"}
"""Fields of `_Config` that Switch Transformers call otherwise. Which embeddings are tied, their tensors say."""


class Loaded(NamedTuple):
    """A model, its parameters, and Hugging Face's name of its kind (`t5`, ...), which `save` takes too."""

    model: EncoderDecoderModel
    params: Params
    model_type: str


def load(folder: str | Path, dtype: str | None = None) -> Loaded:
    """Reads a folder that `save_pretrained` wrote, whole or in shards: T5 1.0, 1.1, FLAN, ByT5, mT5, UMT5, Switch.

    Switch Transformers compute what transformers 5 does for every real token. Padding in front of tokens or between
    them takes an expert's capacity over there, and never here (Hugging Face leaves `router_ignore_padding_tokens`
    unused). Older releases gave dropped tokens their own input, gated, where newer ones and we give zeros.

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
    return Loaded(model, _parameters(model, config.model_type, tensors, folder), config.model_type)


def save(folder: str | Path, model: EncoderDecoderModel, params: Params, model_type: str | None = None) -> None:
    """Writes a folder that `load` and Hugging Face's `from_pretrained` read: the inverse of `load`.

    Beware that UMT5 of transformers 5 scales the decoder's output whatever a folder says, and divides the logits of one
    trained without that, Google's own included, by sqrt(d_model).

    Args:
      folder: made if need be.
      model: a network that Hugging Face has too; scanned layers are written one by one, and one dropout rate for all.
        Sparse layers need a `FixedCapacity`.
      params: its parameters.
      model_type: `t5`, `mt5`, `umt5` or `switch_transformers`; None is the last where layers are sparse, `umt5` where
        they own their bias tables, and `t5` elsewhere.

    Raises:
      UserError: Hugging Face's `model_type` is not this network; the message says where they differ.
    """
    folder = Path(folder)
    config = _Config.of(model, model_type)
    network = model.network
    assert isinstance(network, T5)  # as `of` has seen
    arrays: dict[str, np.ndarray] = {}
    for name, leaf in named_leaves(params):
        half = network.encoder if name.startswith("encoder/") else network.decoder
        for piece, array in pieces(name, np.asarray(leaf), len(half.stack.pattern)):
            arrays[tensor_name(piece, config.model_type)] = as_stored(piece, array)
    entries = config.entries() | {
        "architectures": [_CLASSES[config.model_type]],
        "is_encoder_decoder": True,
        "dtype": arrays[_EMBEDDING].dtype.name,
    }
    if config.model_type == _SWITCH and not entries["tie_word_embeddings"]:  # all of these are then apart
        arrays = dict.fromkeys((*_COPIES, _HEAD), arrays[_EMBEDDING]) | arrays
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})


# ---- config.json and the network it describes


@dataclasses.dataclass(frozen=True)
class _Config:
    """What makes a network, under T5's names in `config.json`. Fields with defaults are Switch Transformers' alone."""

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
    def names(cls, model_type: object) -> dict[str, str]:
        """The fields that `config.json` of a kind of model has, and what they are called there."""
        fields = dataclasses.fields(cls)
        if model_type != _SWITCH:
            return {field.name: field.name for field in fields if field.default is dataclasses.MISSING}
        return {f.name: _SWITCH_NAMES.get(f.name, f.name) for f in fields if f.name != "tie_word_embeddings"}

    @classmethod
    def read(cls, path: Path) -> "_Config":
        """Reads `config.json`, old ones with their defaults."""
        entries = {name: value for name, value in _read_json(path).items() if value is not None}
        model_type = entries.get("model_type")
        values = {
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
            values["encoder_sparse_step"] = _sparse_step(encoder, entries.get("num_sparse_encoder_layers", 3))
            values["decoder_sparse_step"] = _sparse_step(decoder, entries.get("num_sparse_decoder_layers", 3))
        names, kinds = cls.names(model_type), typing.get_type_hints(cls)
        values |= {ours: entries[theirs] for ours, theirs in names.items() if theirs in entries}
        for ours, theirs in names.items():
            value, kind = values.get(ours, getattr(cls, ours, None)), kinds[ours]
            if not isinstance(value, kind):
                found = "is missing" if value is None else f"is {value!r}"
                raise UserError(f"{path}: {theirs} {found}; it must be one {getattr(kind, '__name__', 'number')}")
        known: dict[str, Iterable[object]] = {
            "model_type": _CLASSES,
            "feed_forward_proj": _SWITCH_ACTIVATIONS if model_type == _SWITCH else _ACTIVATIONS,
            "router_bias": (False,),
            "router_dtype": ("float32",),
        }
        for ours, choices in known.items():
            if ours in values and values[ours] not in choices:
                listed = ", ".join(map(str, choices))
                raise UserError(f"{path}: {names[ours]} is {values[ours]!r}; those known here are {listed}")
        for name in ("num_layers", "num_decoder_layers", "num_experts", "expert_capacity"):
            if values.get(name, 1) < 1:
                raise UserError(f"{path}: {name} is {values[name]}; it must be 1 or more")
        return cls(**values)

    def entries(self) -> dict[str, object]:
        """What `config.json` says of it: the inverse of `read`."""
        entries = {theirs: getattr(self, ours) for ours, theirs in self.names(self.model_type).items()}
        if self.model_type != _SWITCH:
            return entries
        encoder = _are_sparse(self.num_layers, self.encoder_sparse_step)
        decoder = _are_sparse(self.num_decoder_layers, self.decoder_sparse_step)
        return entries | {"num_sparse_encoder_layers": sum(encoder), "num_sparse_decoder_layers": sum(decoder)}

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
            mlp = layer.mlp.expert if isinstance(layer.mlp, SparseMlp) else layer.mlp
            sparse = _sparse_fields(encoder.stack, decoder.stack) if model_type in (None, _SWITCH) else {}
            model_type = model_type or (_SWITCH if sparse else "umt5" if layer.relpos_bias else "t5")
            activations = _SWITCH_ACTIVATIONS if model_type == _SWITCH else _ACTIVATIONS
            config = cls(
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
                **sparse,
            )
        except (AttributeError, KeyError) as error:
            raise UserError(f"save: Hugging Face's {model_type or 'T5'} cannot be this network: {error}") from error
        theirs = dict(_settings(config.network(embedder.dtype)))
        for name, value in _settings(network):
            if value != theirs.get(name):
                raise UserError(f"save: {name} is {value}, but {theirs.get(name)} in Hugging Face's {model_type}")
        return config

    def network(self, dtype: str) -> T5:
        """The network, its layers in a loop."""
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
        encoder_stack = _stack(encoder_layer, sparse, _are_sparse(self.num_layers, self.encoder_sparse_step))
        decoder_stack = _stack(decoder_layer, sparse, _are_sparse(self.num_decoder_layers, self.decoder_sparse_step))
        head = None if self.tie_word_embeddings else Linear((self.vocab_size,), ("embed", "vocab"))
        return T5(
            Embedding(self.vocab_size, self.d_model, dtype),
            Encoder(encoder_stack, rate, norm, encoder_bias if shared else None),
            Decoder(decoder_stack, rate, norm, decoder_bias if shared else None, head),
            scale_decoder_output=self.scale_decoder_outputs and self.model_type != "mt5",  # which never scales
            pad_id=self.pad_token_id,
        )


def _sparse_step(layers: object, sparse: object) -> int | None:
    """How transformers gets from numbers of layers to a step that the file does not name."""
    if not isinstance(layers, int) or not isinstance(sparse, int):
        return None
    return layers // sparse if sparse > 0 else layers  # which makes a sparse layer where none was asked for


def _are_sparse(layers: int, step: int) -> list[bool]:
    """Which layers are sparse: in every `step` of them, the second."""
    return [step == 1 or (step > 1 and i % step == 1) for i in range(layers)]


def _stack(layer: EncoderLayer | DecoderLayer, sparse: SparseMlp, are_sparse: list[bool]) -> LayerStack:
    """Layers like `layer`, some of them with a sparse MLP, as repetitions of the shortest pattern."""
    count = len(are_sparse)
    period = next(n for n in range(1, count + 1) if count % n == 0 and are_sparse == are_sparse[:n] * (count // n))
    pattern = tuple(layer.clone(mlp=sparse) if each else layer for each in are_sparse[:period])
    return LayerStack(pattern, count // period)


def _sparse_fields(encoder: LayerStack, decoder: LayerStack) -> dict[str, typing.Any]:
    """The fields of `_Config` that the sparse layers of a network fill; none, if it has none."""

    def step(stack: LayerStack) -> int:
        found = [isinstance(layer.mlp, SparseMlp) for layer in stack.pattern] * stack.repeats
        return next((n for n in range(len(found) + 1) if _are_sparse(len(found), n) == found), 0)

    mlps = [layer.mlp for stack in (encoder, decoder) for layer in stack.pattern]
    sparse = next((mlp for mlp in mlps if isinstance(mlp, SparseMlp)), None)
    if sparse is None:
        return {}
    if not isinstance(sparse.capacity, FixedCapacity):
        raise UserError(
            f"save: SparseMlp.capacity is {sparse.capacity}, but Hugging Face's is one number for sequences of any "
            "length; build the model with FixedCapacity(slots), the longest length if no token is to be dropped"
        )
    return {
        "encoder_sparse_step": step(encoder),
        "decoder_sparse_step": step(decoder),
        "num_experts": sparse.expert.num_experts,
        "expert_capacity": sparse.capacity.slots,
        "router_jitter_noise": sparse.router.jitter_noise,
        "router_aux_loss_coef": sparse.router.balance_loss,
        "router_z_loss_coef": sparse.router.z_loss,
    }


def _settings(module: object, name: str = "network") -> Iterator[tuple[str, object]]:
    """Everything that decides what a network computes, by name; not how it starts, trains and runs."""
    running = ("parent", "name", "dtype", "scan", "remat")
    training = ("dropout_rate", "kernel_init", "init_stddev", "init_scale", "jitter_noise", "balance_loss", "z_loss")
    if dataclasses.is_dataclass(module):
        yield name, type(module).__name__
        for field in dataclasses.fields(module):
            if field.name not in running + training:
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


def _parameters(model: EncoderDecoderModel, model_type: str, tensors: dict[str, np.ndarray], folder: Path) -> Params:
    """The parameters; empties `tensors`, so that no large model is held twice."""
    token = np.zeros((1, 1), np.int32)
    batch = {"encoder_input_tokens": token, "decoder_input_tokens": token}
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))
    expected = {
        tensor_name(piece, model_type): stored_shape(piece, array.shape)
        for name, leaf in named_leaves(shapes)
        for piece, array in pieces(name, np.broadcast_to(np.float32(0), leaf.shape))
    }
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
        parameter = np.empty(leaf.shape, np.float32)
        for piece, array in pieces(parameter_name(path), parameter):
            fill(piece, array, tensors.pop(tensor_name(piece, model_type)))
        return jnp.asarray(parameter)

    return jax.tree.map_with_path(take, shapes)


def _read_json(path: Path) -> dict[str, typing.Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; the folder should be one that save_pretrained wrote") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: {error}") from error
