"""Between our parameters and their tensors: what those are called, and which way round they lie."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.architectures.variables import named_leaves, parameter_name
from t5x_like.checkpoints.huggingface.files import Tensors
from t5x_like.errors import UserError
from t5x_like.typing import Params

Modules = Mapping[str, str]
"""Our modules and theirs, every # standing for a number; a parameter that is called otherwise stands by itself."""

Layout = Callable[[str, np.ndarray], np.ndarray]
"""From a parameter's name and array to a view of the array as it lies over there."""


def out_in(name: str, array: np.ndarray) -> np.ndarray:
    """As in `torch.nn.Linear`: matrices are `[out, in]`; bias tables of T5 are `[buckets, heads]`."""
    stored = in_out(name, array)
    return stored.T if name.endswith(("kernel", "rel_embedding")) else stored


def in_out(name: str, array: np.ndarray) -> np.ndarray:
    """Matrices and vectors, heads and their dimensions being one."""
    if name.endswith("bias"):
        return array.reshape(-1)
    if not name.endswith("kernel"):
        return array
    inputs = 2 if name.endswith("out/kernel") else 1
    return array.reshape(math.prod(array.shape[:inputs]), -1)


def read_parameters(shapes: Params, modules: Modules, layout: Layout, tensors: Tensors, folder: Path) -> Params:
    """The parameters, in float32; empties `tensors`, so that no large model is held twice.

    Args:
      shapes: a tree like the parameters', of layers in a loop.
      modules: names.
      layout: orientation.
      tensors: of a folder.
      folder: for messages.

    Raises:
      UserError: tensors are missing, left over, or of other shapes.
    """
    expected = {
        tensor_name(piece, modules): layout(piece, array).shape
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
            stored = layout(piece, array)
            assert np.shares_memory(stored, parameter)
            stored[...] = tensors.pop(tensor_name(piece, modules))
        return jnp.asarray(parameter)

    return jax.tree.map_with_path(take, shapes)


def write_parameters(params: Params, modules: Modules, layout: Layout, patterns: Mapping[str, int]) -> Tensors:
    """The tensors of parameters.

    Args:
      params: of layers in a loop or scanned.
      modules: names.
      layout: orientation.
      patterns: how many layers one repetition of a scanned stack has, by the first part of its parameters' names.
    """
    tensors: Tensors = {}
    for name, leaf in named_leaves(params):
        for piece, array in pieces(name, np.asarray(leaf), patterns.get(name.partition("/")[0], 1)):
            # save_file writes memory as it lies
            tensors[tensor_name(piece, modules)] = np.ascontiguousarray(layout(piece, array))
    return tensors


def pieces(name: str, array: np.ndarray, pattern: int = 1) -> Iterator[tuple[str, np.ndarray]]:
    """Views of a parameter, one for each tensor over there: scanned layers and experts are kept apart.

    Args:
      name: `encoder/layers/layers_1/mlp/expert/wi/kernel`.
      array: experts come first in it, and repetitions of scanned layers second (see `LayerStack`).
      pattern: how many layers one repetition has.

    Yields:
      `encoder/layers_3/mlp/expert_0/wi/kernel` and that expert's matrix, and so on.
    """
    if scanned := re.search(r"/layers/(?:layers_(\d+)/)?", name):
        for repetition in range(array.shape[1]):
            number = repetition * pattern + int(scanned[1] or 0)
            yield from pieces(name.replace(scanned[0], f"/layers_{number}/"), array[:, repetition])
    elif "/expert/" in name:
        yield from ((name.replace("/expert/", f"/expert_{i}/"), matrix) for i, matrix in enumerate(array))
    else:
        yield name, array


def tensor_name(piece: str, modules: Modules) -> str:
    """`encoder/layers_3/mlp/wo/kernel` -> `encoder.block.3.layer.1.DenseReluDense.wo.weight`, for one of T5."""
    numbered = r"(?<=layers_)\d+|(?<=expert_)\d+"
    numbers = iter(re.findall(numbered, piece))
    ours = re.sub(numbered, "#", piece)
    module, _, leaf = ours.rpartition("/")
    theirs = modules.get(ours) or f"{modules[module]}.{'bias' if leaf == 'bias' else 'weight'}"
    return re.sub("#", lambda _: next(numbers), theirs)


def without_copies(tensors: Tensors, copies: Mapping[str, tuple[str, ...]], folder: Path) -> Tensors:
    """Every tensor once; `copies` are those that old folders hold beside another, or in its place."""
    kept = dict(tensors)
    for name, others in copies.items():
        for other in others:
            copy = kept.pop(other, None)
            if copy is not None and not np.array_equal(kept.setdefault(name, copy), copy):
                raise UserError(f"{folder}: {other} is not equal to {name}; a network here has one such table only")
    return kept


def with_prefix(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors, with `prefix` if none has it: folders of networks without a head go without."""
    if any(name.startswith(prefix) for name in tensors):
        return tensors
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
