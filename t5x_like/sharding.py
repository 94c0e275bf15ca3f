"""From logical axes to devices: which mesh axis splits which array dimension.

Layers name their dimensions (`batch length embed heads ...`); `ShardingRules` says, in one place, which mesh axis
splits each name; nothing else in the library knows a mesh axis by name.
"""

import contextlib
import contextvars
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from t5x_like.errors import UserError
from t5x_like.typing import Array, PyTree

MESH_AXES = ("replica", "data", "expert", "model")
LogicalAxes = tuple[str | None, ...]
MeshAxes = str | tuple[str, ...] | None


def _as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Which mesh axes split each logical axis; None replicates it. One field per word of the vocabulary.

    A mesh axis splits an array at most once: the first dimension that asks for it gets it, and `length` what is left.
    So `embed="data"` shards parameters over `data` (FSDP) and leaves activations `[batch, length, embed]` alone, whose
    batch has taken `data`; and `length="model"` shards the residual stream between tensor-parallel blocks, within which
    heads or mlp take `model` (sequence parallelism; Korthikanti et al. 2022, section 4.2.2).
    Context parallelism, for inputs too long for one device: `batch=("replica", "expert"), length=("data", "model")`.
    """

    batch: MeshAxes = ("replica", "data", "expert")
    length: MeshAxes = "model"
    embed: MeshAxes = None
    heads: MeshAxes = "model"
    head_dim: MeshAxes = None
    mlp: MeshAxes = "model"
    vocab: MeshAxes = "model"
    experts: MeshAxes = "expert"
    group: MeshAxes = ("replica", "data", "expert")
    capacity: MeshAxes = None
    layers: MeshAxes = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            for name in _as_tuple(getattr(self, field.name)):
                if name not in MESH_AXES:
                    raise UserError(
                        f"ShardingRules.{field.name}: {name!r} is no mesh axis; use {', '.join(MESH_AXES)} or None"
                    )

    @property
    def rows(self) -> tuple[str, ...]:
        """What splits the tokens of a batch where they have a vocabulary: context parallelism, as well as `batch`."""
        taken = {*_as_tuple(self.batch), *_as_tuple(self.vocab)}
        return *(axis for axis in _as_tuple(self.length) if axis not in taken), *_as_tuple(self.batch)

    def spec(self, axes: LogicalAxes, mesh: Mesh | AbstractMesh) -> PartitionSpec:
        """The partition of an array whose dimensions are named `axes` (None: replicated); axes of 1 are left out."""
        used: set[str] = set()
        parts: list[MeshAxes] = [None] * len(axes)
        for dim, axis in sorted(enumerate(axes), key=lambda item: item[1] == "length"):
            wanted = _as_tuple(getattr(self, axis)) if axis else ()
            free = tuple(name for name in wanted if name not in used and mesh.shape.get(name, 1) > 1)
            used.update(free)
            parts[dim] = free[0] if len(free) == 1 else free or None
        return PartitionSpec(*parts)


def fsdp_rules() -> ShardingRules:
    """Fully sharded data parallelism: parameters and optimiser state are split over all that split the batch.

    But for `replica`, whose parts are far from each other; and experts are over `expert` already.
    """
    return ShardingRules(embed=("data", "expert"))


_target: contextvars.ContextVar[tuple[jax.Device, ...]] = contextvars.ContextVar("target", default=())


@contextlib.contextmanager
def building_for(devices: Sequence[jax.Device]) -> Iterator[None]:
    """Within it, meshes and layers are made for `devices`, which may not be there: a program is compiled, never run."""
    token = _target.set(tuple(devices))
    try:
        yield
    finally:
        _target.reset(token)


def target_devices() -> tuple[jax.Device, ...]:
    """Those that work is built for: every device of every process, unless `building_for` says otherwise."""
    return _target.get() or tuple(jax.devices())


def make_mesh(
    replica: int = 1,
    data: int = -1,
    expert: int = 1,
    model: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of `MESH_AXES` over all devices; -1 (at most one) means whatever is left.

    Args:
      replica: slices joined by the data-centre network; the batch is split over it, parameters never.
      data: batch, and parameters where FSDP is on.
      expert: experts of sparse layers (and batch).
      model: heads, mlp and vocabulary.
      devices: defaults to `target_devices`.

    Raises:
      UserError: the axes do not multiply up to the number of devices.
    """
    devices = list(target_devices() if devices is None else devices)
    sizes = dict(zip(MESH_AXES, (replica, data, expert, model), strict=True))
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < -1 or size == 0 for size in sizes.values()):
        raise UserError(f"make_mesh: sizes are positive, and at most one is -1 (whatever is left); got {sizes}")
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if np.prod(list(sizes.values())) != len(devices):
        raise UserError(
            f"make_mesh: {' x '.join(f'{name} {size}' for name, size in sizes.items())} "
            f"does not make {len(devices)} devices; "
            f"let the product be {len(devices)}, or set one axis to -1"
        )
    axis_types = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)  # JAX's default refuses with_sharding_constraint
    return Mesh(_wired(tuple(sizes.values()), devices), MESH_AXES, axis_types=axis_types)


def _wired(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices in the order that suits the wiring of a TPU torus; slices, which are far apart, along `replica`."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise UserError(
            f"make_mesh: the devices are {slices} slices; let replica, now {shape[0]}, be a multiple of that"
        )
    within = (shape[0] // slices, *shape[1:])
    across = (slices, *(1 for _ in shape[1:]))
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


_active: contextvars.ContextVar["Partitioner | None"] = contextvars.ContextVar("partitioner", default=None)


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """A mesh and the rules by which arrays are split over it. The default serves a laptop: all devices, data parallel.

    Attributes:
      mesh: its axes are `MESH_AXES`.
      rules: from logical to mesh axes.
    """

    mesh: Mesh = dataclasses.field(default_factory=make_mesh)
    rules: ShardingRules = ShardingRules()

    @classmethod
    def single_device(cls) -> "Partitioner":
        """Everything on this process's first device: what a notebook uses."""
        return cls(make_mesh(data=1, devices=jax.local_devices()[:1]))

    def sharding(self, *axes: str | None) -> NamedSharding:
        """How an array is split whose dimensions are named `axes`; none: replicated."""
        return NamedSharding(self.mesh, self.rules.spec(axes, self.mesh))

    def tree_shardings(self, axes: PyTree) -> PyTree:
        """`sharding` for every tuple of logical axes in a tree."""
        return jax.tree.map(lambda names: self.sharding(*names), axes, is_leaf=lambda x: isinstance(x, tuple))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within it, `constrain` knows mesh and rules; outside, it does nothing and code runs on one device."""
        token = _active.set(self)
        try:
            with jax.set_mesh(self.mesh):
                yield
        finally:
            _active.reset(token)


def constrain(x: Array, *axes: str | None) -> Array:
    """Tells the compiler how an activation whose dimensions are named `axes` is split; the identity without a mesh.

    A `length` that has fewer positions than there are devices, as in cached decoding, stays whole.
    """
    axes = tuple(None if axis == "length" and x.shape[dim] < ways(axis) else axis for dim, axis in enumerate(axes))
    sharding = active_sharding(*axes)
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def active_partitioner() -> Partitioner | None:
    """The one whose `active()` this is called within."""
    return _active.get()


def active_sharding(*axes: str | None) -> NamedSharding | None:
    """How the active mesh splits an array whose dimensions are named `axes`; None where nothing is to be split."""
    partitioner = _active.get()
    if partitioner is None or partitioner.mesh.size == 1:
        return None
    return partitioner.sharding(*axes)


def ways(axis: str) -> int:
    """Into how many parts the active mesh splits a dimension named `axis`; 1 without a mesh."""
    partitioner = _active.get()
    if partitioner is None:
        return 1
    return int(np.prod([partitioner.mesh.shape[name] for name in _as_tuple(getattr(partitioner.rules, axis))]))


Split = LogicalAxes | PartitionSpec


def per_shard(function: Callable[..., Array], in_axes: Sequence[PyTree], out_axes: Split) -> Callable[..., Array]:
    """`function` applied by every device to its own part of the arguments; to the whole of them without a mesh.

    Args:
      function: from trees of arrays to an array, for what the compiler cannot split by itself.
      in_axes: of every argument, in trees like them, logical axes or which mesh axes split it; what they leave whole is
        gathered.
      out_axes: of the result.
    """
    partitioner = _active.get()
    if partitioner is None or partitioner.mesh.size == 1:
        return function

    def on_one_device(*arguments: PyTree) -> Array:
        token = _active.set(None)  # nothing is left to split
        try:
            return function(*arguments)
        finally:
            _active.reset(token)

    def spec(split: Split) -> PartitionSpec:
        return split if isinstance(split, PartitionSpec) else partitioner.sharding(*split).spec

    specs = jax.tree.map(spec, tuple(in_axes), is_leaf=_is_split)
    # Unchecked, since JAX's TPU kernels do not say over which axes their results vary.
    return jax.shard_map(
        on_one_device, mesh=partitioner.mesh, in_specs=specs, out_specs=spec(out_axes), check_vma=False
    )


def _is_split(x: object) -> bool:
    axes = isinstance(x, tuple) and all(isinstance(axis, str | None) for axis in x)
    return axes or isinstance(x, PartitionSpec)


def divides(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    """Whether all devices get equal parts of an array."""
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True


def check_divisible(arrays: Mapping[str, tuple[tuple[int, ...], LogicalAxes]], partitioner: Partitioner) -> None:
    """Raises one `UserError` that lists every dimension which its mesh axes do not divide, before anything is compiled.

    It names the nearest mesh of as many devices that divides them all.

    Args:
      arrays: name -> shape, and the logical names of its dimensions.
      partitioner: the mesh and its rules.
    """
    wrong = list(_undivided(arrays, partitioner.rules, partitioner.mesh))
    if not wrong:
        return
    mesh, distinct = partitioner.mesh, {str(array): array for array in arrays.values()}
    sparse = any("experts" in axes for _, axes in arrays.values())
    fits = (
        other
        for replica in range(mesh.shape["replica"], mesh.size + 1, mesh.shape["replica"])
        if mesh.size % replica == 0
        for other in meshes(mesh.size, replica)
        if (sparse or other.shape["expert"] == mesh.shape["expert"])
        and not any(_undivided(distinct, partitioner.rules, other))
    )
    nearest = min(fits, key=lambda other: _distance(mesh, other), default=None)
    hint = f"no mesh of {mesh.size} devices does: change the sizes or the rules"
    if nearest is not None:
        hint = "the nearest that does: " + ",".join(f"{axis}={size}" for axis, size in nearest.shape.items())
    shown = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    raise UserError(f"the mesh {shown} does not divide these arrays; {hint}\n" + "\n".join(wrong))


def meshes(devices: int, replica: int = 1) -> Iterator[AbstractMesh]:
    """Every mesh of so many devices with this `replica` axis, without the devices."""
    rest = devices // replica
    divisors = [n for n in range(1, rest + 1) if rest % n == 0]
    for data, expert in itertools.product(divisors, repeat=2):
        if rest % (data * expert) == 0:
            yield AbstractMesh((replica, data, expert, rest // (data * expert)), MESH_AXES)


def _undivided(
    arrays: Mapping[str, tuple[tuple[int, ...], LogicalAxes]], rules: ShardingRules, mesh: Mesh | AbstractMesh
) -> Iterator[str]:
    for name, (shape, axes) in arrays.items():
        for dim, part in enumerate(rules.spec(axes, mesh)):
            ways = math.prod(mesh.shape[axis] for axis in _as_tuple(part))
            if shape[dim] % ways:
                over = " x ".join(_as_tuple(part))
                yield f"  {name}: dimension {dim} ({axes[dim]}) of {shape} is split {ways} ways over {over}"


def _distance(mesh: Mesh | AbstractMesh, other: Mesh | AbstractMesh) -> tuple[float, int]:
    """How often axes were doubled or halved; of equals, the one that uses fewer axes is nearer."""
    doubled = sum(abs(math.log2(size / other.shape[axis])) for axis, size in mesh.shape.items())
    return doubled, sum(size > 1 for size in other.shape.values())
