"""Optimisers: every one is an `optax.GradientTransformation` made by a function, so optax's own serve as well.

Written as a gin file would have it, Adafactor with clipped gradients and a frozen embedding:

    OPTIMIZER = @optimizers.partition()
    optimizers.partition.rules = (("token_embedder/.*", @optimizers.freeze()),)
    optimizers.partition.default = @optimizers.chain()
    optimizers.chain.transformations = (@optax.clip_by_global_norm(), @optimizers.adafactor())
    optax.clip_by_global_norm.max_norm = 1.0
    optimizers.adafactor.learning_rate = @schedules.rsqrt()
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from t5x_like.errors import UserError
from t5x_like.training import schedules
from t5x_like.typing import Array, Float, Int, Params, PyTree, Scalar

Leaf = Array | np.ndarray | jax.ShapeDtypeStruct
SCANNED_LAYERS: Mapping[str, int] = MappingProxyType({"layers": 1})
"""Where stacked parameters hold their stack: under the name `layers`, axis 1 counts layers (T5X's scalable_t5)."""


# ---- Parameter names -------------------------------------------------------------------------------------------------


def parameter_name(path: tuple[jax.tree_util.KeyEntry, ...]) -> str:
    """The name 'encoder/layers_0/mlp/wi/kernel' of a leaf at a JAX key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: PyTree) -> list[tuple[str, Leaf]]:
    """Every leaf of a tree with its name, in the order of `jax.tree.leaves`."""
    return [(parameter_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


# ---- Adafactor -------------------------------------------------------------------------------------------------------


def adafactor(  # Eleven arguments, since these are T5X's names and every published recipe uses them.
    learning_rate: schedules.Schedule | float | None = None,
    multiply_by_parameter_scale: bool = True,
    beta1: float | None = None,
    decay_rate: float = 0.8,
    clipping_threshold: float | None = 1.0,
    weight_decay_rate: float | None = None,
    min_dim_size_to_factor: int = 128,
    epsilon1: float = 1e-30,
    epsilon2: float = 1e-3,
    stacked_axes: Mapping[str, int] = SCANNED_LAYERS,
) -> optax.GradientTransformation:
    """Adafactor as T5 is trained with it (Shazeer and Stern 2018, algorithms 4 and 5, with the settings of section 9).
"""
