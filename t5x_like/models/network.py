"""What every model does with its network: parameters out of it, and its `__call__` on the arrays of a batch."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from t5x_like.architectures.variables import logical_axes, router_reports, unbox
from t5x_like.layers.moe import REPORTS, RouterReport
from t5x_like.typing import Array, Batch, Params, PRNGKey, PyTree


@runtime_checkable
class Network(Protocol):
    """A Linen module from `architectures`."""

    @property
    def init(self) -> Callable[..., Mapping[str, PyTree]]:
        """As of any Linen module."""
        ...

    @property
    def apply(self) -> Callable[..., PyTree]:
        """As of any Linen module."""
        ...


@dataclasses.dataclass(frozen=True)
class NetworkModel:
    """The base of models.

    Attributes:
      network: its `__call__` takes arrays of the batch under their own names, those in `network_inputs`.
    """

    network_inputs: ClassVar[tuple[str, ...]]

    network: Network

    def init(self, key: PRNGKey, batch: Batch) -> Params:
        """Fresh parameters; the values of `batch` do not matter, and nor does its size."""
        return unbox(self._variables(key, batch))

    def logical_axes(self, batch: Batch) -> PyTree:
        """Tuples of axis names in a tree like the parameters'."""
        return logical_axes(jax.eval_shape(lambda: self._variables(jax.random.key(0), batch)))

    def forward(
        self, params: Params, batch: Batch, key: PRNGKey | None = None
    ) -> tuple[PyTree[Array], dict[str, RouterReport]]:
        """What the network puts out, and what its sparse layers report; `key` turns dropout on."""
        outputs, variables = self.network.apply(
            {"params": params},
            **self._arguments(batch),
            rngs=None if key is None else {"dropout": key},
            mutable=[REPORTS],
        )
        return outputs, router_reports(variables, params)

    def _arguments(self, batch: Batch) -> dict[str, Array]:
        return {name: jnp.asarray(batch[name]) for name in self.network_inputs if name in batch}

    def _variables(self, key: PRNGKey, batch: Batch) -> PyTree:
        arguments = {name: jnp.zeros_like(array) for name, array in self._arguments(batch).items()}
        return self.network.init(key, **arguments)["params"]
