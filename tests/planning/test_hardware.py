"""Targets: what their names may be, and how fast a group of their devices talks. None of it needs libtpu."""

import dataclasses

import jax
import pytest

from t5x_like.errors import UserError
from t5x_like.planning import hardware
from t5x_like.planning.hardware import CHIPS, Target


@dataclasses.dataclass(frozen=True)
class Device:
    coords: tuple[int, int, int]
    slice_index: int = 0


def target(chip: str, shape: tuple[int, int, int], slices: int = 1) -> Target:
    x, y, z = (range(size) for size in shape)
    devices = tuple(Device((i, j, k), s) for s in range(slices) for i in x for j in y for k in z)
    return Target("made up", CHIPS[chip], devices)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5q:4x4x4", r"--topology=v5q:4x4x4: Did you mean '\w+'\?"),
        ("v5p", "Say CHIP:SHAPE, such as v5e:8x8"),
        ("v5p:4x4", "a v5p has 3 dimensions, each 1 or even; try v5p:4x4x1"),
        ("v5e:5x8", "a v5e has 2 dimensions, each 1 or even; try v5e:6x8"),
    ],
)
def test_a_topology_that_is_none_is_explained(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        hardware.topology(name)


def test_bandwidth_follows_the_links_of_the_torus() -> None:
    cube, link = target("v5p", (4, 4, 4)), CHIPS["v5p"].link_bandwidth
    at = {device.coords: device for device in cube.devices}

    def bandwidth(*places: tuple[int, int, int]) -> float:
        return cube.bandwidth([at[place] for place in places])

    assert bandwidth((0, 0, 0), (1, 0, 0)) == link  # two neighbours
    assert bandwidth(*((i, 0, 0) for i in range(4))) == 2 * link  # a ring
    assert bandwidth(*((i, j, 0) for i in range(4) for j in range(4))) == 4 * link  # two of them
    assert bandwidth(*((i, j, 0) for i in range(4) for j in range(2))) == 3 * link
    square = target("v5e", (8, 8, 1))
    line = [device for device in square.devices if device.coords[1] == 0]
    assert square.bandwidth(line) == CHIPS["v5e"].link_bandwidth  # closes to a ring from 16 chips on


def test_slices_reach_each_other_over_the_data_centre_network() -> None:
    two = target("v5e", (2, 2, 1), slices=2)
    assert two.slices == 2
    assert two.crosses_slices(two.devices)
    assert two.bandwidth(two.devices) == CHIPS["v5e"].dcn_bandwidth
    assert not two.crosses_slices(two.devices[:4])


def test_what_is_here_is_measured() -> None:
    here = hardware.present()
    assert here.name == "cpu"
    assert here.devices == tuple(jax.devices())
    # Eight virtual devices share what one processor does: between a toy's and a pod's figures.
    assert 1e8 < here.chip.peak_flops < 1e13
    assert 1e7 < here.chip.memory_bandwidth < 1e12
    assert here.bandwidth(here.devices) == float("inf")
