"""The words that types are written in: array annotations and the few trees that every room passes around.

Shapes are checked with beartype in tests only (`tests/conftest.py` has jaxtyping's import hook), never in production.
"""

from collections.abc import Mapping

import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Key, PyTree, Shaped, UInt, UInt32

Params = PyTree
"""Nested dict of parameters, or of shapes; names are the checkpoint format: `encoder/layers_0/mlp/wi_0/kernel`."""

Batch = Mapping[str, Array | np.ndarray]
"""One batch under seqio's keys, each `[batch, length]`: `encoder_input_tokens`, `decoder_target_tokens`, ..."""

Scalar = Float[Array, ""]
PRNGKey = Key[Array, ""] | UInt32[Array, "2"]
"""One random key: new-style (`jax.random.key`) or raw (`jax.random.PRNGKey`)."""

__all__ = ["Array", "Batch", "Bool", "Float", "Int", "Key", "PRNGKey", "Params", "PyTree", "Scalar", "Shaped", "UInt"]
