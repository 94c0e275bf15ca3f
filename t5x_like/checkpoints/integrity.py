"""Digests of arrays, so that a checkpoint whose bytes have changed is found out and named (Orbax checks none)."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from t5x_like.architectures.variables import named_leaves
from t5x_like.typing import Array, PyTree, UInt


def digest(x: Array) -> UInt[Array, ""]:
    """A 32-bit sum of the array's bits, each word weighted by its place.

    Integer sums wrap and do not depend on their order: every mesh and every number of hosts gives the same digest, and
    no array leaves its devices.
    """
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    words = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, width)
    place = sum(
        (jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(2 * 1000003**axis % 2**32)
         for axis in range(words.ndim)),
        start=jnp.uint32(1),
    )  # fmt: skip
    return jnp.sum(words.astype(jnp.uint32) * place, dtype=jnp.uint32)


_digest = jax.jit(digest)  # a program for every shape: one for all arrays takes seconds to compile


def computing(tree: PyTree) -> dict[str, UInt[Array, ""]]:
    """The digest of every array, by name, while the devices may still be at it; the arrays may be donated meanwhile."""
    computed = {}
    for name, leaf in named_leaves(tree):
        computed[name] = _digest(leaf)
        if len(computed[name].devices()) > 1 and jax.default_backend() == "cpu":
            computed[name].block_until_ready()  # XLA's collectives between CPU devices deadlock when too many are due
    return computed


def digests(tree: PyTree) -> dict[str, int]:
    """The digest of every array, by name."""
    return {name: int(value) for name, value in jax.device_get(computing(tree)).items()}


def differences(tree: PyTree, saved: dict[str, int]) -> list[str]:
    """Names of the arrays of `tree` that are not what was saved."""
    return [name for name, value in digests(tree).items() if saved.get(name, value) != value]


class DigestsHandler(ocp.JsonCheckpointHandler):
    """Writes digests as JSON, and waits for them in the thread that writes, not in the one that trains."""

    async def async_save(
        self, directory: epath.Path, item: None = None, args: "DigestsSave | None" = None
    ) -> list[ocp.future.Future]:
        """Starts writing; part of the same commit as the arrays."""
        assert args is not None  # the signature is Orbax's

        async def write() -> None:
            values = {name: int(value) for name, value in jax.device_get(args.digests).items()}
            if jax.process_index() == 0:
                (directory / "metadata").write_text(json.dumps(values))

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="digests")]


@ocp.args.register_with_handler(DigestsHandler, for_save=True)
@dataclasses.dataclass
class DigestsSave(ocp.args.CheckpointArgs):
    """What `computing` returned."""

    digests: dict[str, Array]


@ocp.args.register_with_handler(DigestsHandler, for_restore=True)
@dataclasses.dataclass
class DigestsRestore(ocp.args.CheckpointArgs):
    """Reads digests."""
