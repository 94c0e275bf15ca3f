"""The devices that a plan is made for: TPU topologies that need not be there, and what is here."""

import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.errors import UserError, nearest
from t5x_like.training.flops import matmul_peak
from t5x_like.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do at most: a chip, or one of the two halves that JAX sees of a TPU7x.

    Attributes:
      name: as in `v5p:4x4x4`.
      peak_flops: of bfloat16 products, FLOP/s.
      memory_gib: what the compiler lets a program use, GiB.
      memory_bandwidth: bytes/s.
      link_bandwidth: bytes/s that one link to a neighbour sends.
      dcn_bandwidth: bytes/s to other slices.
      ring: a dimension of a topology of a multiple of so many chips closes to a ring.
      dims: of a topology.
      config: what libtpu calls the way its cores are used, where that is not its default.
    """

    name: str
    peak_flops: float
    memory_gib: float
    memory_bandwidth: float
    link_bandwidth: float = math.inf
    dcn_bandwidth: float = math.inf
    ring: int = 1
    dims: int = 0
    config: str | None = None


# Peaks, bandwidths: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, read on 2026-11-22. Links: the published
# bandwidth of all links both ways, by links and directions; v4's is from Jouppi et al. 2023, table 4, and its share of
# the data-centre network, which is not published, v5p's. Memory: what libtpu 0.0.52 says is available to a program.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 30.75, 1200e9, 50e9, 6.25e9, ring=4, dims=3, config="megacore"),
        Chip("v5e", 197e12, 15.75, 819e9, 50e9, 3.125e9, ring=16, dims=2),
        Chip("v5p", 459e12, 95.73, 2765e9, 100e9, 6.25e9, ring=4, dims=3),
        Chip("v6e", 918e12, 31.24, 1638e9, 100e9, 12.5e9, ring=16, dims=2),
        Chip("tpu7x", 2307e12 / 2, 94.74, 7380e9 / 2, 50e9, 6.25e9, ring=4, dims=3),
    )
}
"""Per device. A TPU7x chip is two."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices that programs are compiled for.

    Attributes:
      name: `v5p:4x4x4`, two slices `v5p:4x4x4*2`; or the platform that is here.
      chip: what each of them is.
      devices: as JAX knows them.
    """

    name: str
    chip: Chip
    devices: tuple[PyTree, ...]  # jax.Device, or what has its coordinates

    @property
    def slices(self) -> int:
        """How many there are, joined by the data-centre network."""
        return len({getattr(device, "slice_index", None) for device in self.devices})

    def crosses_slices(self, group: Sequence[PyTree]) -> bool:
        """Whether these devices reach each other over the data-centre network only."""
        return len({getattr(device, "slice_index", None) for device in group}) > 1

    def bandwidth(self, group: Sequence[PyTree]) -> float:
        """Bytes/s that each device of a group sends to the others at most.

        Along every dimension of the torus in which they differ there is a link, or two where it closes to a ring.
        """
        if self.crosses_slices(group):
            return self.chip.dcn_bandwidth
        if math.isinf(self.chip.link_bandwidth):
            return math.inf
        places, all_places = (np.array([d.coords for d in devices]) for devices in (group, self.devices))
        links = 0
        for along, extent in zip(places.T, all_places.max(axis=0) + 1, strict=True):
            spread = len(set(along.tolist()))
            if spread > 1:
                links += 2 if spread == extent and extent % self.chip.ring == 0 else 1
        return self.chip.link_bandwidth * (links or 2)  # the halves of a chip are closer still


def topology(name: str) -> Target:
    """TPUs that need not be there, by a name such as `v5p:4x4x4` or, two slices, `v5p:4x4x4*2`.

    Raises:
      UserError: no such topology, with the nearest name; or PyPI's libtpu is missing.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", name)
    if not found or found[1] not in CHIPS:
        hint = nearest(found[1] if found else name.partition(":")[0], CHIPS)
        raise UserError(
            f"--topology={name}:{hint} Say CHIP:SHAPE, such as v5e:8x8 or v5p:4x4x4 (two slices: v5e:8x8*2)"
        )
    chip, shape, slices = CHIPS[found[1]], found[2], int(found[3] or 1)
    dims = [int(n) for n in shape.split("x")]
    if len(dims) != chip.dims or any(size > 2 and size % 2 for size in dims):
        fixed = [size + size % 2 if size > 1 else 1 for size in (*dims, 1, 1)[: chip.dims]]
        raise UserError(
            f"--topology={name}: a {chip.name} has {chip.dims} dimensions, each 1 or even; "
            f"try {chip.name}:{'x'.join(map(str, fixed))}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={name}: compiling for a TPU needs PyPI's libtpu: pip install 't5x_like[tpu]'")
    try:
        devices = _described(f"{chip.name}:{shape}", slices, chip.config)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--topology={name}: {reason[:300]}") from error
    return Target(name, chip, devices)


def _described(name: str, slices: int, config: str | None) -> tuple[jax.Device, ...]:
    # Nobody is asked over the network which TPU this machine has, and compilers may run side by side: none is used.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    options: dict[str, object] = {"num_slices": slices} if slices > 1 else {}
    if config is not None:
        options["chip_config_name"] = config
    describe: Callable[..., topologies.TopologyDescription] = topologies.get_topology_desc
    return tuple(describe(name, platform="tpu", **options).devices)


def present() -> Target:
    """The devices that are here; what they can do is measured now."""
    devices = tuple(jax.devices())
    platform = devices[0].platform
    sharing = len(devices) if platform == "cpu" else 1  # virtual CPU devices share one processor
    dtype = "float32" if platform == "cpu" else "bfloat16"
    chip = Chip(devices[0].device_kind, matmul_peak(dtype) / sharing, _memory_gib() / sharing, _bandwidth() / sharing)
    return Target(platform, chip, devices)


def _memory_gib() -> float:
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"]) / 2**30
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 2**30


@functools.cache
def _bandwidth(size: int = 2**26) -> float:
    """Bytes/s that a device reads and writes, measured: the best of a few copies of 256 MiB."""
    x = jnp.ones(size, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    copy(x).block_until_ready()
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        copy(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * 4 * size / min(seconds)
