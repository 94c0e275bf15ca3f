"""A repeated pattern of layers. The only place that knows loop, scan and rematerialisation."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5x_like.errors import UserError
from t5x_like.layers.moe import REPORTS
from t5x_like.typing import Array, Float, Int, PyTree

_QKV = ("query", "key", "value")
_PROJECTIONS = (*_QKV, "wi", "wi_0", "wi_1")

REMAT_POLICIES: dict[str, Callable[..., bool]] = {  # what they answer may say where to keep it, too
    "full": jax.checkpoint_policies.nothing_saveable,  # keep layer inputs only, compute everything again
    "save_qkv": jax.checkpoint_policies.save_only_these_names(*_QKV),  # redo attention and the MLP
    "save_projections": jax.checkpoint_policies.save_only_these_names(*_PROJECTIONS),  # redo attention and its output
    "offload_projections": jax.checkpoint_policies.save_and_offload_only_these_names(  # that, in the host's memory
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(_PROJECTIONS),
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "minimal": jax.checkpoint_policies.save_any_names_but_these(),  # keep all that weights made, and what they mixed
    "dots": jax.checkpoint_policies.dots_saveable,  # keep every product, in float32 too; redo what is elementwise
}
"""From the leanest to the fastest. Tensors are named by the modules that make them, see `layers.products.kept`."""


@dataclasses.dataclass(frozen=True)
class LayerStack:
    """`pattern` of layers, `repeats` times over.

    A plain object, not a module, so that its layers belong to whoever calls it and keep T5X's names: `layers_0`,
    `layers_1`, ... in a loop; one `layers` with a layer axis (second, as T5X's scalable_t5) under scan.

    Attributes:
      pattern: layers, called as `layer(x, *context) -> x`; several alternate, such as dense and sparse ones.
      repeats: how often; `len(pattern) * repeats` layers in all.
      scan: compile one repetition and loop over it (`jax.lax.scan`): compile time no longer grows with depth.
      remat: None keeps all activations for the backward pass; the names in `REMAT_POLICIES` recompute.
    """

    pattern: tuple[nn.Module, ...]
    repeats: int
    scan: bool = False
    remat: str | None = None

    def __post_init__(self) -> None:
        if self.remat is not None and self.remat not in REMAT_POLICIES:
            raise UserError(f"LayerStack.remat: {self.remat!r} is not one of {', '.join(REMAT_POLICIES)} or None")
        if self.repeats < 1 or not self.pattern:
            raise UserError(
                f"LayerStack: needs a pattern and repeats >= 1, got {len(self.pattern)} layers x {self.repeats}"
            )

    def __call__(
        self, parent: nn.Module, x: Float[Array, "batch length embed"], *context: PyTree
    ) -> Float[Array, "batch length embed"]:
        """Runs the stack inside `parent`'s compact method; every layer sees the same `context`."""
        if self.scan:
            block = _Block(self.pattern) if len(self.pattern) > 1 else self.pattern[0]
            scanned = nn.scan(
                lambda layer, x, *context: (self._checkpointed(layer, x, *context), None),
                variable_axes={"params": 1, "cache": 0, REPORTS: 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=self.repeats,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return scanned(fresh_copy(block, parent=parent, name="layers"), x, *context)[0]
        for i in range(self.repeats * len(self.pattern)):
            layer = fresh_copy(self.pattern[i % len(self.pattern)], parent=parent, name=f"layers_{i}")
            x = self._checkpointed(layer, x, *context)
        return x

    def _checkpointed(self, layer: nn.Module, x: Array, *context: PyTree) -> Array:
        if self.remat is None:
            return layer(x, *context)
        policy = REMAT_POLICIES[self.remat]
        call = nn.remat(lambda layer, x, *context: layer(x, *context), policy=policy, prevent_cse=not self.scan)
        return call(layer, x, *context)


class _Block(nn.Module):
    """One repetition of a pattern with several layers, as scan's body."""

    pattern: tuple[nn.Module, ...]

    @nn.compact
    def __call__(self, x: Array, *context: PyTree) -> Array:
        for i, layer in enumerate(self.pattern):
            x = fresh_copy(layer, parent=self, name=f"layers_{i}")(x, *context)
        return x


def fresh_copy(module: nn.Module, parent: nn.Module | None = None, name: str | None = None) -> nn.Module:
    """A module like `module` that shares no parameters with it, neither its own nor its children's.

    `Module.clone` keeps the children themselves, and Linen gives one child under two parents one set of parameters.
    """

    def copy(value: object) -> object:
        return fresh_copy(value) if isinstance(value, nn.Module) else value

    fields = [field.name for field in dataclasses.fields(module) if field.init and field.name not in ("parent", "name")]
    values = {field: getattr(module, field) for field in fields}
    values = {field: tuple(map(copy, v)) if isinstance(v, tuple) else copy(v) for field, v in values.items()}
    return type(module)(**values, parent=parent, name=name)


def reorder_cache(cache: PyTree, rows: Int[Array, " rows"]) -> PyTree:
    """Picks rows of every leaf of a decoding cache, whose batch comes first, or second behind scan's layer axis."""

    def pick(path: tuple[jax.tree_util.DictKey, ...], leaf: Array) -> Array:
        scanned = any(entry.key == "layers" for entry in path)
        return jnp.take(leaf, rows, axis=1 if scanned else 0, mode="clip")

    return jax.tree_util.tree_map_with_path(pick, cache)


def reorder_beams(cache: PyTree, rows: Int[Array, " rows"]) -> PyTree:
    """`reorder_cache` where every row stays with its example: what those share, `context...`, stays as it is."""
    picked = reorder_cache(cache, rows)
    return jax.tree_util.tree_map_with_path(
        lambda path, old, new: old if path[-1].key.startswith("context") else new, cache, picked
    )
