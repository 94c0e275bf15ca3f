"""Between Linen's variables and what the rest of the library sees: plain trees of arrays, and trees of logical axes."""

import operator
from collections.abc import Mapping
from typing import TypeVar

import flax.linen as nn
import jax

from t5x_like.layers.moe import REPORTS, RouterReport
from t5x_like.sharding import LogicalAxes
from t5x_like.typing import Params, PyTree

Leaf = TypeVar("Leaf")


def _is_box(x: object) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def unbox(variables: PyTree) -> Params:
    """The arrays (or shapes) of freshly initialised variables, without the names of their dimensions."""
    return jax.tree.map(lambda x: x.value if _is_box(x) else x, variables, is_leaf=_is_box)


def logical_axes(variables: PyTree) -> PyTree:
    """The names of the dimensions of every parameter, e.g. `("embed", "heads", "head_dim")`, `layers` included."""
    return jax.tree.map(lambda x: tuple(x.names) if _is_box(x) else (None,) * x.ndim, variables, is_leaf=_is_box)


def parameter_name(path: tuple[jax.tree_util.KeyEntry, ...]) -> str:
    """The name `encoder/layers_0/mlp/wi/kernel` of a leaf at a JAX key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: PyTree[Leaf]) -> list[tuple[str, Leaf]]:
    """Every leaf of a tree with its name, in the order of `jax.tree.leaves`."""
    return [(parameter_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


def named_axes(axes: PyTree) -> list[tuple[str, LogicalAxes]]:
    """The same for `logical_axes`, whose leaves are tuples."""
    leaves = jax.tree.leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
    return [(parameter_name(path), names) for path, names in leaves]


def router_reports(variables: Mapping[str, PyTree], params: Params) -> dict[str, RouterReport]:
    """What every sparse layer reported, by the layer's name: `encoder/layers_1`; nothing from a dense network.

    Scanned layers report together; here each stands by itself, under the name that it has in a loop.

    Args:
      variables: what a call of the network with a mutable `REPORTS` returned.
      params: the network's parameters, which say how long a scanned pattern is.
    """
    reports: dict[str, RouterReport] = {}
    for path, report in jax.tree.leaves_with_path(variables.get(REPORTS, {}), is_leaf=_is_report):
        name = parameter_name(path).removesuffix("/mlp/report")
        if report.tokens.ndim == 0:
            reports[name] = report
            continue
        # `encoder/layers`, or `encoder/layers/layers_1` of a longer pattern
        stack, _, member = name.partition("/layers")
        length, first = 1, 0
        if member:
            length, first = len(params[stack]["layers"]), int(member.removeprefix("/layers_"))
        for r in range(len(report.tokens)):
            reports[f"{stack}/layers_{r * length + first}"] = jax.tree.map(operator.itemgetter(r), report)
    return reports


def _is_report(x: object) -> bool:
    return isinstance(x, RouterReport)
