"""Whether two trees of arrays agree, how far they are from not doing so, and where they part."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from t5x_like.architectures.variables import named_leaves
from t5x_like.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What two trees have in common.

    Attributes:
      difference: the worst of all leaves: their largest absolute difference, over the leaf's scale; infinite where one
        of them is not finite, or has another shape.
      bound: what it may be at most; 0 asks for the same bits.
      first_difference: the first leaf beyond the bound, where in it, and both values; None where there is none.
    """

    difference: float
    bound: float
    first_difference: str | None

    @property
    def passed(self) -> bool:
        """Whether no leaf is beyond the bound."""
        return self.first_difference is None

    @property
    def margin(self) -> float:
        """The share of the bound that is left: 1 for equal trees, negative for a failure, and never below -1."""
        if self.difference == 0:
            return 1.0
        return max(1.0 - self.difference / self.bound, -1.0) if self.bound else -1.0


class Leaf(NamedTuple):
    """One leaf of both trees: the difference over its scale, and the place of the worst of it."""

    difference: float
    place: tuple[int, ...]


def compare(found: PyTree, expected: PyTree, bound: float, least_scale: float = 0.0) -> Comparison:
    """Compares two trees leaf by leaf, in the order of `expected`.

    Args:
      found: arrays.
      expected: the same names; a leaf's scale is the largest absolute value in it.
      bound: for every leaf's difference over its scale.
      least_scale: of any leaf. What is zero but for rounding, such as the gradient of a bias on attention's keys, has
        no scale of its own.
    """
    theirs, ours = _leaves(expected), _leaves(found)
    worst, first = 0.0, None
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        if name not in ours or name not in theirs:
            difference, said = math.inf, f"{name}: {'missing' if name not in ours else 'nobody asked for it'}"
        elif ours[name].shape != theirs[name].shape:
            difference, said = math.inf, f"{name}: shape {ours[name].shape} instead of {theirs[name].shape}"
        else:
            difference, place = _compared(ours[name], theirs[name], least_scale)
            said = f"{_indexed(name, place)}: {ours[name][place]:.7g} instead of {theirs[name][place]:.7g}"
        worst = max(worst, difference)
        if difference > bound and first is None:
            first = said
    return Comparison(worst, bound, first)


def same_bits(found: PyTree, expected: PyTree) -> Comparison:
    """Compares two trees bit by bit."""
    return compare(found, expected, bound=0.0)


def _leaves(tree: PyTree) -> Mapping[str, np.ndarray]:
    parts = tree if isinstance(tree, Mapping) else {"": tree}  # in its own order; JAX would sort it
    arrays = {
        f"{part}/{name}".strip("/"): np.asarray(leaf)
        for part, subtree in parts.items()
        for name, leaf in named_leaves(jax.device_get(subtree))
    }
    return {name: x if x.dtype.kind in "fc" else x.astype(np.float64) for name, x in arrays.items()}


def _scale(x: np.ndarray) -> float:
    return float(np.abs(x.astype(np.float64)).max(initial=0.0, where=np.isfinite(x)))


def _compared(found: np.ndarray, expected: np.ndarray, least_scale: float) -> Leaf:
    if found.size == 0:
        return Leaf(0.0, ())
    with np.errstate(invalid="ignore"):
        gap = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    gap = np.where(same, 0.0, np.where(np.isfinite(gap), gap, np.inf))
    place = tuple(int(i) for i in np.unravel_index(int(gap.argmax()), gap.shape))
    scale = max(_scale(expected), least_scale) or 1.0
    return Leaf(float(gap[place]) / scale, place)


def _indexed(name: str, place: tuple[int, ...]) -> str:
    return f"{name}[{', '.join(map(str, place))}]" if place else name


def said(so: bool, otherwise: str) -> Comparison:
    """What is so or not, without a measure."""
    return Comparison(0.0, 0.0, None) if so else Comparison(math.inf, 0.0, otherwise)
