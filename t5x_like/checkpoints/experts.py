"""From dense to sparse and to fewer experts: a run's first parameters made from another run's."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

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


@dataclasses.dataclass(frozen=True)
class PruneExperts:
    """Keeps the experts of every layer that took most tokens, and their router columns.

    Attributes:
      path: the `MODEL_DIR` of a run with more experts; its log says what each of them took.
      step: which checkpoint; None takes the newest.
    """

    path: str
    step: int | None = None

    def __call__(self, params: Params) -> Params:
        """See `restore.Restore`; how many experts stay, the model says."""
        return _mixed("PruneExperts", params, self.path, self.step, _keep)


@dataclasses.dataclass(frozen=True)
class MergeExperts:
    """As `PruneExperts`, but every other expert is averaged into the kept one whose router column is most like its own.

    Kernels and columns are averaged by load, so that a busy expert counts for more (Li et al. 2024).

    Attributes:
      path: the `MODEL_DIR` of a run with more experts; its log says what each of them took.
      step: which checkpoint; None takes the newest.
    """

    path: str
    step: int | None = None

    def __call__(self, params: Params) -> Params:
        """See `restore.Restore`; how many experts are made, the model says."""
        return _mixed("MergeExperts", params, self.path, self.step, _merge)


Mix = Callable[[Float[np.ndarray, " old"], Float[np.ndarray, "embed old"], int], Float[np.ndarray, "new old"]]
"""From the experts' load and router columns and how many are wanted, to the share of each old one in each new one."""


def _keep(load: Float[np.ndarray, " old"], columns: Float[np.ndarray, "embed old"], count: int) -> np.ndarray:
    kept = np.sort(np.argsort(-load, kind="stable")[:count])
    return np.eye(len(load), dtype=np.float32)[kept]


def _merge(load: Float[np.ndarray, " old"], columns: Float[np.ndarray, "embed old"], count: int) -> np.ndarray:
    kept = _keep(load, columns, count)
    directions = columns / np.linalg.norm(columns, axis=0).clip(1e-9)
    nearest = (kept @ directions.T @ directions).argmax(axis=0)
    nearest[kept.argmax(axis=1)] = np.arange(count)  # a kept expert stays where it is
    shares = (nearest == np.arange(count)[:, None]) * load.clip(1e-6)
    return (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)


def _mixed(owner: str, params: Params, path: str, step: int | None, mix: Mix) -> Params:
    """`params` from a run with more experts, which `mix` makes into as many as there are."""
    leaves: dict[str, jax.Array] = dict(named_leaves(params))
    routers = [name for name in leaves if name.endswith(ROUTER)]
    if not routers or any("/layers/" in name for name in routers):
        raise UserError(f"{owner}: needs sparse layers that are not scanned (SCAN_LAYERS = False)")
    layers = {name: name.removesuffix(f"/mlp{ROUTER}") for name in routers}
    kernels = {name: [k for k in leaves if k.startswith(f"{layers[name]}/mlp/expert/")] for name in routers}

    def like(theirs: Mapping[str, tuple[int, ...]]) -> dict[str, jax.ShapeDtypeStruct]:
        wanted = {name: abstract_like(leaf) for name, leaf in leaves.items()}
        for router in routers:
            old, new = theirs.get(router, (0, 0))[-1], leaves[router].shape[-1]
            if old < new:
                raise UserError(f"{owner}: {path} has {old} experts in {layers[router]}, fewer than the {new} wanted")
            for name in kernels[router]:
                wanted[name] = _whole((old, *leaves[name].shape[1:]), leaves[name])
            wanted[router] = _whole((leaves[router].shape[0], old), leaves[router])
        return wanted

    restored = read_parameters(owner, path, step, like)
    loads = _loads(owner, path, list(layers.values()))
    for router, layer in layers.items():
        columns = np.asarray(restored[router])
        shares = mix(loads[layer], columns, leaves[router].shape[-1])
        restored[router] = jnp.asarray(columns @ shares.T)
        for name in kernels[router]:
            restored[name] = jnp.tensordot(shares, restored[name], axes=1)
    return replace_leaves(params, {name: jax.device_put(x, leaves[name].sharding) for name, x in restored.items()})


def _loads(owner: str, path: str, layers: list[str]) -> dict[str, np.ndarray]:
    """What share of tokens each expert of each layer took of late."""
    file = Path(path) / "metrics" / "metrics.jsonl"
    rows = [row.vectors for row in read_rows(file)] if file.exists() else []
    loads = {}
    for layer in layers:
        logged = [row[f"router/{layer}/load"] for row in rows if f"router/{layer}/load" in row][-LOGGED_ROWS:]
        if not logged:
            raise UserError(f"{owner}: {file} does not log the load of the experts of {layer}; train a few steps")
        loads[layer] = np.mean(np.array(logged, np.float32), axis=0)
    return loads


def _whole(shape: tuple[int, ...], leaf: jax.Array) -> jax.ShapeDtypeStruct:
    """An array of another shape on the devices of `leaf`, split over none of them."""
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)
