"""What a family of networks says of itself, so that its folders can be read and written."""

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, TypeAlias, TypeVar

from t5x_like.architectures.stack import LayerStack
from t5x_like.architectures.transformer import DecoderLayer, EncoderLayer
from t5x_like.checkpoints.huggingface.files import ConfigFile, Tensors
from t5x_like.checkpoints.huggingface.tensors import Layout, Modules, out_in
from t5x_like.errors import UserError
from t5x_like.models.classification import ClassificationModel
from t5x_like.models.decoder_only import DecoderOnlyModel
from t5x_like.models.encoder_decoder import EncoderDecoderModel
from t5x_like.models.masked_lm import MaskedLMModel
from t5x_like.models.permutation_lm import PermutationLMModel

Activation = Literal["relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_python", "silu", "swish"]
"""Hugging Face's names of activations."""
Layer = TypeVar("Layer", bound=EncoderLayer | DecoderLayer)
AnyModel: TypeAlias = EncoderDecoderModel | DecoderOnlyModel | MaskedLMModel | ClassificationModel | PermutationLMModel
"""What a folder can become."""

ACTIVATIONS: dict[Activation, str] = {
    "relu": "relu",
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_python": "gelu_exact",
    "silu": "silu",
    "swish": "silu",
}
"""Ours for each."""


def activation_of(ours: tuple[str, ...]) -> Activation:
    """The first of their names for the activations of an MLP; a `KeyError` if they have none, or several are gated."""
    for theirs, name in ACTIVATIONS.items():
        if (name,) == ours:
            return theirs
    raise KeyError(ours)


@dataclasses.dataclass(frozen=True)
class Family(abc.ABC):
    """A kind of network, as `config.json` describes it: a field for each entry that decides what is computed.

    A family of its own is a subclass with these fields, `model` and `modules`, and whatever else of this is not so
    there; `of` is needed for saving only. `FAMILIES` in this package lists all.

    Attributes:
      classes: every `model_type`, and which class a folder of it is said to be of.
      network: our class of networks.
      prefix: begins the names of all tensors but a head's.
      unused: a regular expression for the names of tensors that are not parameters.
      copies: tensors, and others that are the same ones.
      layout: how tensors lie.
      model_type: the kind.
    """

    classes: ClassVar[Mapping[str, str]]
    network: ClassVar[type]
    prefix: ClassVar[str] = ""
    unused: ClassVar[str] = ""
    copies: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    layout: ClassVar[Layout] = staticmethod(out_in)

    model_type: str

    @classmethod
    def names(cls, model_type: str) -> dict[str, str]:
        """The fields that stand in `config.json`, and what they are called there."""
        return {field.name: field.name for field in dataclasses.fields(cls)}

    @classmethod
    def read(cls, config: ConfigFile, tensors: Tensors) -> "Family":
        """The network of a folder; where its config does not say, its tensors do. Those of no use are taken out."""
        return config.fields(cls, cls.names(str(config.entries["model_type"])), {})

    @classmethod
    def unpacked(cls, tensors: Tensors) -> Tensors:
        """Tensors that are one parameter each, under today's names."""
        return tensors

    def packed(self, tensors: Tensors) -> Tensors:
        """The inverse of `unpacked`."""
        return tensors

    @abc.abstractmethod
    def model(self, dtype: str) -> AnyModel:
        """The model, its layers in a loop."""

    @abc.abstractmethod
    def modules(self) -> Modules:
        """Names of the network's modules; see `tensors`."""

    @classmethod
    def kind(cls, network: object) -> str:
        """The `model_type` of a network of ours, if none is asked for."""
        return next(iter(cls.classes))

    @classmethod
    def of(cls, model: AnyModel, model_type: str) -> "Family":
        """What reads as a model like this one; an `AttributeError` or `KeyError` says where there is no such."""
        raise UserError(f"save: {model_type} can only be read so far")

    def entries(self) -> dict[str, object]:
        """What `config.json` says of it: the inverse of `read`."""
        return {theirs: getattr(self, ours) for ours, theirs in self.names(self.model_type).items()} | {
            "architectures": [self.classes[self.model_type]]
        }


def stack_of(layers: list[Layer]) -> LayerStack:
    """These layers, as repetitions of the shortest pattern."""
    count = len(layers)
    period = next(n for n in range(1, count + 1) if count % n == 0 and layers == layers[:n] * (count // n))
    return LayerStack(tuple(layers[:period]), count // period)


def check_same(network: object, described: object, model_type: str) -> None:
    """Raises a `UserError` if the network does not compute what the one that would be read back does."""
    theirs = dict(_settings(described))
    for name, value in _settings(network):
        if value != theirs.get(name):
            raise UserError(f"save: {name} is {value}, but {theirs.get(name)} in Hugging Face's {model_type}")


_RUNNING = ("parent", "name", "dtype", "scan", "remat", "vocab_axis")
_TRAINING = ("dropout_rate", "output_dropout_rate", "kernel_init", "out_init", "init_stddev", "init_scale")
_ROUTING = ("jitter_noise", "balance_loss", "z_loss")
_SAME = {"Chunked": "DotProduct"}
"""Classes that compute the same in another way."""


def _settings(module: object, name: str = "network") -> Iterator[tuple[str, object]]:
    """Everything that decides what a network computes, by name; not how it starts, trains and runs."""
    if dataclasses.is_dataclass(module):
        kind = type(module).__name__
        yield name, _SAME.get(kind, kind)
        for field in dataclasses.fields(module):
            if field.name not in _RUNNING + _TRAINING + _ROUTING and kind != "Chunked":
                yield from _settings(getattr(module, field.name), f"{name}.{field.name}")
    elif isinstance(module, tuple):
        for i, part in enumerate(module):
            yield from _settings(part, f"{name}[{i}]")
    else:
        yield name, module
