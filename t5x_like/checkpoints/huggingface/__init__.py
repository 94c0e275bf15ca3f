"""Hugging Face folders (`config.json`, `model.safetensors`), read and written without torch.

A folder's `model_type` says which family it is of, and a family is one short file here:

    t5 (with switch)   T5, FLAN, ByT5, mT5, UMT5, Switch Transformers -> EncoderDecoderModel
    marian             Marian, the first Transformer -> EncoderDecoderModel
    bert               BERT with any of its heads, or none -> MaskedLMModel, ClassificationModel
    roberta            the same
    longformer         the same
    gpt2               GPT-2 -> DecoderOnlyModel
    xlnet              XLNet -> PermutationLMModel

To add one, write a subclass of `family.Family` and list it in `FAMILIES`. It is a frozen dataclass with a field for
each entry of `config.json` that decides what the network computes: its type is checked, a `Literal` names all values
that are known here, and a default stands in for a missing entry. Then it has

    classes    `model_type` -> Hugging Face's class, which `save` writes
    network    our class of networks, by which `save` finds the family
    model()    the model that the fields describe
    modules()  our modules -> theirs: {"encoder/layers_#/attention/out": "bert.encoder.layer.#.attention.output.dense"};
               kernels, scales and tables are `.weight`, biases `.bias`; any other parameter is listed by itself
    of()       for saving: the fields from a model

and, only where they differ from what `Family` has: `layout` (how matrices lie), `unpacked` and `packed` (tensors that
hold several parameters), `prefix`, `unused`, `copies`, and `read` (what only the tensors tell). Reading compares names
and shapes of all tensors with those that the network asks for, and lists every difference.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from t5x_like.checkpoints.huggingface import files
from t5x_like.checkpoints.huggingface.bert import BertFamily
from t5x_like.checkpoints.huggingface.family import AnyModel, Family, check_same
from t5x_like.checkpoints.huggingface.gpt2 import Gpt2Family
from t5x_like.checkpoints.huggingface.longformer import LongformerFamily
from t5x_like.checkpoints.huggingface.marian import MarianFamily
from t5x_like.checkpoints.huggingface.roberta import RobertaFamily
from t5x_like.checkpoints.huggingface.t5 import T5Family
from t5x_like.checkpoints.huggingface.tensors import read_parameters, with_prefix, without_copies, write_parameters
from t5x_like.checkpoints.huggingface.xlnet import XLNetFamily
from t5x_like.errors import UserError
from t5x_like.layers.linear import default_dtype
from t5x_like.typing import Params

FAMILIES: tuple[type[Family], ...] = (
    *(T5Family, MarianFamily, BertFamily, RobertaFamily, LongformerFamily, Gpt2Family, XLNetFamily),
)
_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.classes}


class Loaded(NamedTuple):
    """A model, its parameters, and Hugging Face's name of its kind (`t5`, ...), which `save` takes too."""

    model: AnyModel
    params: Params
    model_type: str


def load(folder: str | Path, dtype: str | None = None) -> Loaded:
    """Reads a folder that `save_pretrained` wrote, whole or in shards.

    Args:
      folder: has `config.json`, and `model.safetensors`, `model.safetensors.index.json` or, where torch is installed,
        `pytorch_model.bin`.
      dtype: of the products; None takes what this machine is good at (`default_dtype`).

    Returns:
      The model, its layers in a loop, and its parameters in float32 whatever the file's dtype.

    Raises:
      UserError: a file is missing or broken, or the tensors are not those that `config.json` asks for.
    """
    folder = Path(folder)
    config = files.ConfigFile.of(folder)
    family = _BY_TYPE[config.choice("model_type", _BY_TYPE)]
    tensors = with_prefix(files.read_tensors(folder, family.unused), family.prefix)
    tensors = without_copies(family.unpacked(tensors), family.copies, folder)
    described = family.read(config, tensors)
    model = described.model(dtype or default_dtype())
    token = np.zeros((1, 1), np.int32)
    batch = dict.fromkeys(("encoder_input_tokens", "decoder_input_tokens", "input_tokens"), token)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))
    params = read_parameters(shapes, described.modules(), family.layout, tensors, folder)
    return Loaded(model, params, described.model_type)


def save(folder: str | Path, model: AnyModel, params: Params, model_type: str | None = None) -> None:
    """Writes a folder that `load` and Hugging Face's `from_pretrained` read: the inverse of `load`.

    Args:
      folder: made if need be.
      model: of a network that Hugging Face has too; scanned layers are written one by one, and one dropout rate for
        all. Sparse layers need a `FixedCapacity`.
      params: its parameters.
      model_type: Hugging Face's name; None is `switch_transformers` for a T5 with sparse layers, `umt5` for one whose
        layers own their bias tables, `t5` for others, `bert` for encoders, `gpt2` for decoders, `xlnet` for
        XLNet, `marian` for other encoder-decoders.

    Raises:
      UserError: Hugging Face's `model_type` is not this network; the message says where they differ.
    """
    network = model.network
    family = _BY_TYPE.get(model_type) if model_type else _family_of(network)
    if family is None:
        raise UserError(f"save: model_type {model_type!r} is not one of {', '.join(_BY_TYPE)}")
    if type(network) is not family.network:
        raise UserError(f"save: Hugging Face's {model_type} cannot be a {type(network).__name__}")
    model_type = model_type or family.kind(network)
    try:
        described = family.of(model, model_type)
    except (AttributeError, KeyError) as error:
        raise UserError(f"save: Hugging Face's {model_type} cannot be this network: {error}") from error
    check_same(network, described.model("float32").network, model_type)
    halves = {name: getattr(network, name, None) for name in ("encoder", "decoder")}
    patterns = {name: len(half.stack.pattern) for name, half in halves.items() if half is not None}
    tensors = write_parameters(params, described.modules(), family.layout, patterns)
    entries = described.entries() | {"dtype": next(iter(tensors.values())).dtype.name}
    files.write(Path(folder), entries, described.packed(tensors))


def _family_of(network: object) -> type[Family]:
    for family in FAMILIES:
        if type(network) is family.network:
            return family
    raise UserError(f"save: Hugging Face has no {type(network).__name__} that is known here")
