"""Digests of arrays that are split over devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.checkpoints import integrity


def test_digests_of_many_split_arrays_do_not_wait_for_each_other() -> None:
    """Each needs all devices, which share the threads of one processor; and they are those of one device."""
    arrays = {f"a{index}": np.arange(index, index + 64, dtype=np.float32).reshape(8, 8) for index in range(100)}
    split = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    one = {name: jnp.asarray(array) for name, array in arrays.items()}
    expected = integrity.digests(one)
    assert integrity.digests(jax.device_put(arrays, split)) == expected
