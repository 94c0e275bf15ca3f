"""Parameters of scanned layers as those of a loop, and back.

A loop has `encoder/layers_0/...`, `encoder/layers_1/...`; a scan `encoder/layers/...` with the layer axis second, and
`encoder/layers/layers_0/...` where its pattern has several members.
"""

import re
from collections.abc import Mapping

import jax
import numpy as np

from t5x_like.architectures.variables import named_leaves
from t5x_like.typing import Params

SCANNED = re.compile(r"(?P<stack>(?:.*/)?)layers/(?:layers_(?P<member>\d+)/)?(?P<rest>.*)")
LAYER_AXIS = 1


def looped(params: Params) -> dict[str, np.ndarray]:
    """Every array of a loop's parameters by name, from those of any layout."""
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(params)}
    result: dict[str, np.ndarray] = {}
    for name, leaf in leaves.items():
        scanned = SCANNED.fullmatch(name)
        if scanned is None:
            result[name] = leaf
            continue
        stack, rest = scanned["stack"], scanned["rest"]
        size, first = _members(leaves, stack), int(scanned["member"] or 0)
        for repeat, layer in enumerate(np.moveaxis(leaf, LAYER_AXIS, 0)):
            result[f"{stack}layers_{repeat * size + first}/{rest}"] = layer
    return result


def laid_out(loop: Mapping[str, np.ndarray], like: Params) -> Params:
    """A loop's arrays in the layout of another tree, of arrays or shapes."""
    shapes = dict(named_leaves(like))

    def leaf(name: str) -> np.ndarray:
        scanned = SCANNED.fullmatch(name)
        if scanned is None:
            return loop[name]
        stack, rest = scanned["stack"], scanned["rest"]
        size, first = _members(shapes, stack), int(scanned["member"] or 0)
        layers = range(first, first + shapes[name].shape[LAYER_AXIS] * size, size)
        return np.stack([loop[f"{stack}layers_{layer}/{rest}"] for layer in layers], axis=LAYER_AXIS)

    return jax.tree.unflatten(jax.tree.structure(like), [leaf(name) for name in shapes])


def _members(leaves: Mapping[str, object], stack: str) -> int:
    """How many layers the pattern of a scanned stack has."""
    names = (SCANNED.fullmatch(name) for name in leaves if name.startswith(f"{stack}layers/"))
    return 1 + max(int(match["member"] or 0) for match in names if match and match["stack"] == stack)
