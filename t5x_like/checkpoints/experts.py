"""From dense to sparse and to fewer experts: a run's first parameters made from another run's."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.architectures.variables import named_leaves
from t5x_like.checkpoints.restore import abstract_like, read_parameters, replace_leaves
from t5x_like.errors import UserError
from t5x_like.training.run_log import read_rows
from t5x_like.typing import Float, Params

ROUTER = "/router/router_weights/kernel"
LOGGED_ROWS = 10
"""The load of experts is averaged over so many of the last rows that the run has logged."""


@dataclasses.dataclass(frozen=True)
class Upcycle:
    """Sparse upcycling (Komatsuzaki et al. 2023): every expert starts as a copy of a dense run's MLP in the same layer.

    Routers start at random. Where a token's gates add up to 1 (`TopK.normalize`) and none is dropped, the first forward
    pass is the dense one.

    Attributes:
      path: the dense run's `MODEL_DIR`; its layers have the same names.
      step: which checkpoint; None takes the newest.
    """

    path: str
    step: int | None = None

    def __call__(self, params: Params) -> Params:
        """See `restore.Restore`."""
        leaves: dict[str, jax.Array] = {name: leaf for name, leaf in named_leaves(params) if not name.endswith(ROUTER)}
        experts = {name for name in leaves if "/expert/" in name}
        if not experts:
            raise UserError("Upcycle: this model has no experts; give it sparse layers, or use RestoreFrom")

        def dense(name: str) -> str:
            return name.replace("/expert/", "/")

        like = {
            dense(name): _whole(leaf.shape[1:], leaf) if name in experts else abstract_like(leaf)
            for name, leaf in leaves.items()
        }
        theirs = read_parameters("Upcycle", self.path, self.step, lambda _: like)
        copy = jax.jit(lambda x, count: jnp.repeat(x[None], count, axis=0), static_argnums=1)
        return replace_leaves(
            params,
            {
                name: jax.device_put(copy(theirs[dense(name)], len(leaf)), leaf.sharding)
                if name in experts
                else theirs[name]
                for name, leaf in leaves.items()
            },
        )


@runtime_checkable
class Reduction(Protocol):
    """How a layer's experts become fewer."""

    def __call__(
        self, load: Float[np.ndarray, " old"], columns: Float[np.ndarray, "embed old"], count: int
    ) -> Float[np.ndarray, "new old"]:
        """The share of each old expert in each of `count` new ones, by what they took and their router columns."""
        ...


@dataclasses.dataclass(frozen=True)
class Prune:
    """The experts that took most tokens stay as they are."""

    def __call__(
        self, load: Float[np.ndarray, " old"], columns: Float[np.ndarray, "embed old"], count: int
    ) -> Float[np.ndarray, "new old"]:
        """See `Reduction`."""
        kept = np.sort(np.argsort(-load, kind="stable")[:count])
        return np.eye(len(load), dtype=np.float32)[kept]


@dataclasses.dataclass(frozen=True)
class Merge:
    """As `Prune`, but every other expert is averaged into the kept one whose router column is most like its own.

    Averages are weighted by load, so that a busy expert counts for more (Li et al. 2024).
    """

    def __call__(
        self, load: Float[np.ndarray, " old"], columns: Float[np.ndarray, "embed old"], count: int
    ) -> Float[np.ndarray, "new old"]:
        """See `Reduction`."""
        kept = Prune()(load, columns, count)
        directions = columns / np.linalg.norm(columns, axis=0).clip(1e-9)
        nearest = (kept @ directions.T @ directions).argmax(axis=0)
        nearest[kept.argmax(axis=1)] = np.arange(count)  # a kept expert stays where it is
        shares = (nearest == np.arange(count)[:, None]) * load.clip(1e-6)
        return (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class ReduceExperts:
    """Makes a run's experts fewer, layer by layer: their kernels and their router columns.

    Attributes:
      path: the `MODEL_DIR` of a run with more experts; its log says what each of them took.
      reduction: what becomes of them, `Prune` or `Merge`.
      step: which checkpoint; None takes the newest.
    """

    path: str
    reduction: Reduction
    step: int | None = None

    def __call__(self, params: Params) -> Params:
        """See `restore.Restore`; how many experts are left, the model says."""
        leaves: dict[str, jax.Array] = dict(named_leaves(params))
        routers = [name for name in leaves if name.endswith(ROUTER)]
        if not routers or any("/layers/" in name for name in routers):
            raise UserError("ReduceExperts: needs sparse layers that are not scanned (SCAN_LAYERS = False)")
        layers = {name: name.removesuffix(f"/mlp{ROUTER}") for name in routers}
        kernels = {name: [k for k in leaves if k.startswith(f"{layers[name]}/mlp/expert/")] for name in routers}

        def like(theirs: Mapping[str, tuple[int, ...]]) -> dict[str, jax.ShapeDtypeStruct]:
            wanted = {name: abstract_like(leaf) for name, leaf in leaves.items()}
            for router, layer in layers.items():
                old, new = theirs.get(router, (0, 0))[-1], leaves[router].shape[-1]
                if old < new:
                    have = f"{self.path} has {old} experts in {layer}"
                    raise UserError(f"ReduceExperts: {have}, fewer than the {new} wanted")
                for name in kernels[router]:
                    wanted[name] = _whole((old, *leaves[name].shape[1:]), leaves[name])
                wanted[router] = _whole((leaves[router].shape[0], old), leaves[router])
            return wanted

        restored = read_parameters("ReduceExperts", self.path, self.step, like)
        loads = _loads(self.path, list(layers.values()))
        for router, layer in layers.items():
            columns = np.asarray(restored[router])
            shares = self.reduction(loads[layer], columns, leaves[router].shape[-1])
            restored[router] = jnp.asarray(columns @ shares.T)
            for name in kernels[router]:
                restored[name] = jnp.tensordot(shares, restored[name], axes=1)
        return replace_leaves(params, {name: jax.device_put(x, leaves[name].sharding) for name, x in restored.items()})


def _loads(path: str, layers: list[str]) -> dict[str, np.ndarray]:
    """What share of tokens each expert of each layer took of late."""
    file = Path(path) / "metrics" / "metrics.jsonl"
    rows = [row.vectors for row in read_rows(file)] if file.exists() else []
    loads = {}
    for layer in layers:
        logged = [row[f"router/{layer}/load"] for row in rows if f"router/{layer}/load" in row][-LOGGED_ROWS:]
        if not logged:
            raise UserError(f"ReduceExperts: {file} does not log the load of {layer}'s experts; train a few steps")
        loads[layer] = np.mean(np.array(logged, np.float32), axis=0)
    return loads


def _whole(shape: tuple[int, ...], leaf: jax.Array) -> jax.ShapeDtypeStruct:
    """An array of another shape on the devices of `leaf`, split over none of them."""
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)
