"""A model's pure functions, compiled over a mesh and called with NumPy batches: for evaluation and inference."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np

from t5x_like.data.loader import host_to_devices
from t5x_like.decoding.contract import DecodeFn
from t5x_like.models.contract import Model
from t5x_like.sharding import Partitioner
from t5x_like.typing import Float, Int, Params, PRNGKey, PyTree


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Scores and generates; every process gets the results of the whole global batch.

    Attributes:
      model: the network's functions.
      partitioner: where to run.
    """

    model: Model
    partitioner: Partitioner

    def logits(self, params: Params, batch: Mapping[str, np.ndarray]) -> Float[np.ndarray, "batch length vocab"]:
        """Float32 logits under teacher forcing."""
        return self._run(self._logits, params, batch)

    def score(self, params: Params, batch: Mapping[str, np.ndarray]) -> Float[np.ndarray, " batch"]:
        """Log-likelihood of each example's targets."""
        return self._run(self._score, params, batch)

    def generate(
        self,
        params: Params,
        batch: Mapping[str, np.ndarray],
        decoder: DecodeFn,
        max_length: int,
        key: PRNGKey | None = None,
    ) -> tuple[Int[np.ndarray, "batch samples length"], Float[np.ndarray, "batch samples"]]:
        """Tokens and scores, best first."""
        return tuple(self._run(self._generate(decoder, max_length), params, batch, key))

    @functools.cached_property
    def _logits(self) -> Callable[..., PyTree]:
        return self._jit(self.model.logits)

    @functools.cached_property
    def _score(self) -> Callable[..., PyTree]:
        return self._jit(self.model.score)

    @functools.cached_property
    def _generators(self) -> dict[tuple[DecodeFn, int], Callable[..., PyTree]]:
        return {}

    def _generate(self, decoder: DecodeFn, max_length: int) -> Callable[..., PyTree]:
        """One compiled program per decoder and length; decoders are frozen dataclasses, so equal ones share it."""
        if (decoder, max_length) not in self._generators:

            def generate(params: Params, batch: PyTree, key: PRNGKey | None) -> PyTree:
                return self.model.generate(params, batch, decoder, max_length, key)

            self._generators[decoder, max_length] = self._jit(generate)
        return self._generators[decoder, max_length]

    def _jit(self, function: Callable[..., PyTree]) -> Callable[..., PyTree]:
        return jax.jit(function, out_shardings=self.partitioner.sharding())

    def _run(
        self, function: Callable[..., PyTree], params: Params, batch: Mapping[str, np.ndarray], *rest: PyTree
    ) -> PyTree:
        with self.partitioner.active():
            arrays = host_to_devices(batch, self.partitioner.sharding("batch"))
            return jax.tree.map(np.asarray, function(params, arrays, *rest))
