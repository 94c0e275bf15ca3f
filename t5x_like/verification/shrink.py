"""A model made small: the same objects in the same places, every size a few units of what it was.

Sizes are fields with the names of the library's vocabulary (`embed_dim num_heads mlp_dim ...`), wherever they stand, so
modules that are not the library's own shrink too where they keep to it. What a size is relative to others is kept as
far as it can be: several widths stay different, heads x head_dim stays as much of embed_dim, a gated MLP as narrow.
All new sizes can be split 2 ways over `model` and 4 ways over `expert`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

from t5x_like.architectures.stack import LayerStack
from t5x_like.layers.linear import Linear
from t5x_like.layers.sparse_attention import SMALLEST_BLOCK
from t5x_like.models.contract import Model
from t5x_like.verification.changes import Field, changed, fields_of

EMBED, HEADS, VOCAB = 16, 4, 64
LENGTH = 24
"""Of the longest feature."""
ROWS = 16
"""Of a batch: two for every one of eight devices."""
ROWS_PER_GROUP = 2
"""Sequences that are routed together, where a config asks for several."""

AT_MOST = {
    "vocab_size": VOCAB,
    "num_heads": HEADS,
    "num_experts": 4,
    "choices": 4,
    "max_length": 256,
    "memory_length": 8,
    "num_buckets": 8,
    "max_distance": 12,
    "radius": 8,
    "max_global": 4,
}
"""Sizes that nothing else is relative to."""

IDS = ("pad_id", "padding_id", "start_id", "eos_id", "mask_id")
"""Token ids that a model knows; those beyond the small vocabulary become its last ones."""


class Small(NamedTuple):
    """A small model, the lengths of its features, and what has changed: `name: old -> new`."""

    model: Model
    lengths: dict[str, int]
    changes: list[str]


def shrink(model: Model, lengths: Mapping[str, int]) -> Small:
    """A small model with the structure of a large one, in float32.

    Args:
      model: of any size; nothing of it is computed.
      lengths: of its features, as in a `DatasetConfig`.
    """
    sizes = _Sizes.of(model)
    small_lengths = _small_lengths(model, lengths)
    before, after = _sequences(model, lengths), _sequences(model, small_lengths)
    notes: dict[str, None] = {}

    def change(field: Field) -> object:
        new = sizes.smaller(field, before, after)
        if new == field.value and type(new) is type(field.value):
            return field.value
        notes[f"{field.name} {field.value} -> {new}"] = None
        return new

    small = changed(model, change)
    cut = [f"length of {name} {lengths[name]} -> {new}" for name, new in small_lengths.items() if new != lengths[name]]
    return Small(small, small_lengths, [*notes, *cut])


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What is known of a large model.

    Attributes:
      embed_dims: its widths, ascending: a student's may differ from its teacher's.
      ids: its ids that do not fit into the small one, ascending.
    """

    embed_dims: tuple[int, ...]
    ids: tuple[int, ...]

    @classmethod
    def of(cls, model: Model) -> "_Sizes":
        fields = list(fields_of(model))

        def values(*names: str) -> set[int]:
            return {f.value for f in fields if f.name in names and isinstance(f.value, int)}

        ids = (value for value in values(*IDS) if value >= VOCAB)
        return cls(tuple(sorted(values("embed_dim"))), tuple(sorted(ids)))

    def smaller(self, field: Field, before: list[int], after: list[int]) -> object:
        """What a field is to hold, given the lengths of the sequences that networks see, before and after."""
        owner, name, value = field
        if name == "dtype" and isinstance(value, str):
            return "float32"
        if name == "features" and isinstance(owner, Linear):
            axes = owner.kernel_axes[owner.contract :]
            return tuple(self._width(axis, size) for axis, size in zip(axes, owner.features, strict=True))
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        if name == "repeats" and isinstance(owner, LayerStack):  # programs grow with the layers in a loop
            return min(value, 2 if owner.scan or len(owner.pattern) == 1 else 1)
        if name in AT_MOST:
            return min(value, AT_MOST[name])
        if name in IDS:
            return VOCAB - len(self.ids) + self.ids.index(value) if value in self.ids else value
        if name == "head_dim":
            heads = int(getattr(owner, "num_heads", HEADS))
            return _multiple(4, EMBED * min(value * heads / self._narrowest, 4.0) / min(heads, HEADS))
        if name == "slots":
            return max(2, value * max(after) // max(before))
        if name == "group_size":  # no more rows of the shorter sequences, lest groups be too few for a mesh
            return min(after) * (ROWS_PER_GROUP if value >= 2 * min(before) else 1)
        return self._width(name.removesuffix("_dim"), value) if name in ("embed_dim", "mlp_dim") else value

    def _width(self, axis: str | None, value: int) -> int:
        if axis == "embed" and value in self.embed_dims:
            return EMBED * min(math.ceil(value / self._narrowest), 4)
        if axis == "mlp":
            return _multiple(8, EMBED * min(value / self._narrowest, 4.0))
        return min(value, VOCAB) if axis == "vocab" else value

    @property
    def _narrowest(self) -> int:
        return self.embed_dims[0] if self.embed_dims else EMBED


def _small_lengths(model: Model, lengths: Mapping[str, int]) -> dict[str, int]:
    """Lengths in the same proportion, the longest `LENGTH`, or a few blocks of a sliding window."""
    names = {field.name: field.value for field in fields_of(model)}
    longest = max(lengths.values())
    room = min(longest, SMALLEST_BLOCK + 2 * LENGTH if "radius" in names else LENGTH)
    unit = names.get("num_choices", 1)
    assert isinstance(unit, int)
    return {
        name: _multiple(unit if name == "inputs" else 1, max(size * room / longest, min(size, 4)))
        for name, size in lengths.items()
    }


def _sequences(model: Model, lengths: Mapping[str, int]) -> list[int]:
    """How long the sequences are that the network sees."""
    batch = model.converter.convert([[]], lengths, packed=False)
    return [x.shape[-1] for name, x in batch.items() if name.endswith("input_tokens")]


def _multiple(unit: int, size: int | float) -> int:
    """The multiple of `unit` that is nearest, but 0 for 0 alone."""
    return max(round(size / unit), 1 if size > 0 else 0) * unit
