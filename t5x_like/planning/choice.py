"""What is left to choose when model, data and devices are given: mesh, rematerialisation, microbatches, FSDP."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from t5x_like.architectures.stack import REMAT_POLICIES
from t5x_like.errors import UserError, nearest
from t5x_like.recipe import Recipe
from t5x_like.sharding import MESH_AXES, fsdp_rules, meshes

MESH_FILE = "runs/mesh.gin"


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to run a training job; None leaves what its gin files say.

    Attributes:
      mesh: sizes of `sharding.MESH_AXES`.
      remat: a name of `REMAT_POLICIES`, or "none".
      microbatches: parts of the batch, one after another.
      fsdp: see `sharding.fsdp_rules`.
    """

    mesh: tuple[int, ...] | None = None
    remat: str | None = None
    microbatches: int | None = None
    fsdp: bool = True

    @property
    def keeps_on_host(self) -> bool:
        """Whether what the backward pass needs leaves the device."""
        return (self.remat or "").startswith("offload")

    def of(self, recipe: Recipe) -> Recipe:
        """The job run this way. A recipe that has a partitioner of its own keeps its rules."""
        bindings = [*recipe.bindings]
        files = [*recipe.files]
        if not recipe.binds("partitioner"):
            files.append(MESH_FILE)
            bindings.append(f"SPLIT_EMBED={fsdp_rules().embed if self.fsdp else None}")
            if self.mesh is not None:
                bindings += [f"MESH_{axis.upper()}={size}" for axis, size in zip(MESH_AXES, self.mesh, strict=True)]
        elif self.mesh is not None:
            bindings += [f"sharding.make_mesh.{axis}={size}" for axis, size in zip(MESH_AXES, self.mesh, strict=True)]
        if self.remat is not None:
            bindings.append(f"REMAT={None if self.remat == 'none' else self.remat}")
        if self.microbatches is not None:
            bindings.append(f"trainer.Trainer.microbatches={self.microbatches}")
        return dataclasses.replace(recipe, files=files, bindings=bindings)

    def __str__(self) -> str:
        sizes = [f"{axis} {n}" for axis, n in zip(MESH_AXES, self.mesh or (), strict=False) if n > 1]
        parts = [" x ".join(sizes), self.remat and f"remat {self.remat}"]
        parts.append(f"{self.microbatches} microbatches" if (self.microbatches or 1) > 1 else None)
        return ", ".join([*filter(None, parts), "FSDP" if self.fsdp else "whole parameters"])


def parse_mesh(text: str, devices: int) -> tuple[int, ...]:
    """`data=16,model=4` as sizes of `MESH_AXES`; an axis that is not named has size 1, or what is left if it is `data`.

    Raises:
      UserError: no such axis, no number, or another number of devices.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES or not size.isdigit() or int(size) < 1:
            hint = nearest(axis, MESH_AXES) if axis not in MESH_AXES else ""
            raise UserError(f"--mesh={text}: {part!r} is not AXIS=SIZE with one of {', '.join(MESH_AXES)}.{hint}")
        sizes[axis] = int(size)
    others = math.prod(size for axis, size in sizes.items() if axis != "data")
    sizes.setdefault("data", max(devices // others, 1))
    if math.prod(sizes.values()) != devices:
        raise UserError(
            f"--mesh={text}: {' x '.join(map(str, sizes.values()))} is not {devices}, the number of devices; "
            f"try data={max(devices // others, 1)}"
        )
    return tuple(sizes.get(axis, 1) for axis in MESH_AXES)


def choices(
    devices: int,
    slices: int,
    experts: int,
    given: Choice,
    microbatches: Sequence[int] = (1, 2, 4, 8),
) -> Iterator[Choice]:
    """Every way to run a job on so many devices in so many slices, within what is `given`.

    What is kept on the host is tried only if it is given: how fast that is reached is not published.
    """
    policies = [remat for remat in ("none", *REMAT_POLICIES) if not Choice(remat=remat).keeps_on_host]
    for mesh in meshes(devices, slices):
        sizes = tuple(mesh.shape[axis] for axis in MESH_AXES)
        if (given.mesh or sizes) != sizes or (given.mesh is None and experts % sizes[2]):
            continue
        for remat in [given.remat] if given.remat else policies:
            for parts in [given.microbatches] if given.microbatches else microbatches:
                for fsdp in (True, False):
                    yield Choice(sizes, remat, parts, fsdp)
