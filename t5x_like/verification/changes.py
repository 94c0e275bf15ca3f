"""A model with some of its objects changed, wherever they are: models, networks and layers are frozen dataclasses."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar, cast

T = TypeVar("T")


class Field(NamedTuple):
    """A field somewhere in a tree of dataclasses: its owner, its name there, and what it holds."""

    owner: object
    name: str
    value: object


Change = Callable[[Field], object]
"""What a field is to hold. Where that is the very object it holds, the fields of that are asked for in turn."""


def fields_of(value: object) -> Iterator[Field]:
    """Every field of every dataclass in a tree of dataclasses and tuples, owners before what they own."""
    if isinstance(value, tuple):
        for part in value:
            yield from fields_of(part)
    for name in _names(value):
        field = Field(value, name, getattr(value, name))
        yield field
        yield from fields_of(field.value)


def changed(value: T, change: Change) -> T:
    """A copy of a tree of dataclasses in which every field holds what `change` says."""
    if type(value) is tuple:
        return cast(T, tuple(changed(part, change) for part in cast(tuple[object, ...], value)))
    new = {}
    for name in _names(value):
        old = getattr(value, name)
        wanted = change(Field(value, name, old))
        new[name] = changed(old, change) if wanted is old else wanted
    differing = {name: x for name, x in new.items() if x is not getattr(value, name)}
    return dataclasses.replace(value, **differing) if differing else value  # type: ignore[type-var]


def with_values(value: T, values: Mapping[str, object]) -> T:
    """A copy in which all fields of these names hold these values."""
    return changed(value, lambda field: values.get(field.name, field.value))


def _names(value: object) -> list[str]:
    """Constructor's fields; `parent` and `name` are Linen's own."""
    if isinstance(value, type) or not dataclasses.is_dataclass(value):
        return []
    return [field.name for field in dataclasses.fields(value) if field.init and field.name not in ("parent", "name")]
