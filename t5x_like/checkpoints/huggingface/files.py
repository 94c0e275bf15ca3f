"""The files of a Hugging Face folder: `config.json`, and tensors in whichever form they lie there."""

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from t5x_like.errors import UserError

Tensors = dict[str, np.ndarray]
Fields = TypeVar("Fields")

_WEIGHTS, _LEGACY = "model.safetensors", "pytorch_model.bin"
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """`config.json`.

    Attributes:
      path: the file.
      entries: all of it; entries that are null count as missing.
    """

    path: Path
    entries: Mapping[str, object]

    @classmethod
    def of(cls, folder: Path) -> "ConfigFile":
        """Reads the file of a folder."""
        path = folder / "config.json"
        return cls(path, {name: value for name, value in read_json(path).items() if value is not None})

    def choice(self, name: str, choices: Iterable[object]) -> str:
        """The entry `name`, which must be one of `choices`."""
        value = self.entries.get(name)
        self.check_choice(name, value, choices)
        return str(value)

    def check_choice(self, name: str, value: object, choices: Iterable[object]) -> None:
        """Raises a `UserError` if the value of an entry is none of `choices`."""
        if value not in choices:
            found = "missing" if value is None else repr(value)
            raise UserError(f"{self.path}: {name} is {found}; those known here are {', '.join(map(str, choices))}")

    def check_positive(self, name: str, value: int) -> None:
        """Raises a `UserError` if the value of an entry is below 1."""
        if value < 1:
            raise UserError(f"{self.path}: {name} is {value}; it must be 1 or more")

    def fields(self, kind: type[Fields], names: Mapping[str, str], defaults: Mapping[str, object]) -> Fields:
        """A dataclass of entries.

        Args:
          kind: its fields are of types that `isinstance` knows, or `Literal`.
          names: what fields are called in the file; those not in it keep their default.
          defaults: of fields, where the file says nothing.

        Raises:
          UserError: an entry is missing, of another type, or none of the values that are known here.
        """
        values, kinds = dict(defaults), typing.get_type_hints(kind)
        values |= {ours: self.entries[theirs] for ours, theirs in names.items() if theirs in self.entries}
        required = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}  # type: ignore[arg-type]
        for ours, theirs in names.items():
            if ours in values or ours in required:
                self._check_kind(theirs, values.get(ours), kinds[ours])
        return kind(**values)

    def _check_kind(self, name: str, value: object, kind: object) -> None:
        if typing.get_origin(kind) is typing.Literal:
            self.check_choice(name, value, typing.get_args(kind))
        elif not isinstance(value, _classes(kind)):
            found = "is missing" if value is None else f"is {value!r}"
            raise UserError(f"{self.path}: {name} {found}; it must be one {getattr(kind, '__name__', 'number')}")


def _classes(kind: object) -> tuple[type, ...]:
    """What `isinstance` takes for an annotation: `int | None`, `list[int]`."""
    parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return tuple(typing.get_origin(part) or part for part in parts)


def read_json(path: Path) -> dict[str, object]:
    """The content of a file with one JSON object."""
    try:
        return typing.cast(dict[str, object], json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; the folder should be one that save_pretrained wrote") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: {error}") from error


def read_tensors(folder: Path, unused: str) -> Tensors:
    """All tensors of `model.safetensors`, whole or in shards, or else of an old `pytorch_model.bin`.

    Args:
      folder: where they are.
      unused: a regular expression for the names of those that are not read: buffers.

    Raises:
      UserError: a file is missing or broken, or holds numbers of another kind.
    """
    whole, legacy = folder / _WEIGHTS, folder / _LEGACY
    if not whole.is_file() and not _index(whole).is_file() and (legacy.is_file() or _index(legacy).is_file()):
        return _read_legacy(_parts(legacy), unused)
    tensors: Tensors = {}
    for file in _parts(whole):
        try:
            with safe_open(file, "np") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a dict)
                    if re.fullmatch(unused, name):
                        continue
                    _check_float(file, name, opened.get_slice(name).get_dtype())
                    tensors[name] = opened.get_tensor(name)
        except FileNotFoundError as error:
            raise UserError(f"{file} is missing; the folder should be one that save_pretrained wrote") from error
        except SafetensorError as error:
            raise UserError(f"{file} is broken, fetch it again: {error}") from error
    return tensors


def write(folder: Path, entries: Mapping[str, object], tensors: Tensors) -> None:
    """Writes `config.json` and `model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})


def _index(file: Path) -> Path:
    return file.with_name(f"{file.name}.index.json")


def _parts(file: Path) -> list[Path]:
    """The file itself, or those that its index lists."""
    if file.is_file() or not _index(file).is_file():
        return [file]
    parts = typing.cast(dict[str, str], read_json(_index(file)).get("weight_map", {}))
    return [file.parent / part for part in sorted(set(parts.values()))]


def _check_float(file: Path, name: str, dtype: str) -> None:
    if dtype not in _FLOATS:
        raise UserError(f"{file}: {name} is {dtype}; only unquantised, float weights can be read")


def _read_legacy(files: list[Path], unused: str) -> Tensors:
    """Pickled tensors, which torch alone can read; its `weights_only` runs no code that a file may hold."""
    folder = files[0].parent
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{folder / _WEIGHTS} is missing, and reading {_LEGACY} takes torch: pip install torch, or convert the "
            "folder where torch is: AutoModel.from_pretrained(folder).save_pretrained(folder)"
        ) from error
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    tensors: Tensors = {}
    for file in files:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of many kinds, pickle's and zipfile's among them
            raise UserError(f"{folder / _WEIGHTS} is missing, and {file.name} cannot be read: {error}") from error
        for name, tensor in loaded.items():
            if not re.fullmatch(unused, name):
                _check_float(file, name, names.get(tensor.dtype, str(tensor.dtype)))
                tensors[name] = tensor.float().numpy()
    return tensors
