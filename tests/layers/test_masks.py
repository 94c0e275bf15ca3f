import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.layers.masks import Mask, within

SEGMENTS = jnp.asarray([[1, 1, 2, 2, 0]])


def picture(mask: Mask) -> list[str]:
    """One row of the batch, a string per query: x where it sees the key."""
    return ["".join("x" if seen else "." for seen in row) for row in np.asarray(mask.allowed())[0, 0]]


def test_nothing_said_hides_nothing() -> None:
    assert picture(within(2)) == ["xx", "xx"]


def test_causal_sees_itself_and_what_is_before() -> None:
    assert picture(within(3, causal=True)) == ["x..", "xx.", "xxx"]
    assert picture(Mask(jnp.asarray([2]), jnp.arange(5), causal=True)) == ["xxx.."]


def test_segments_see_their_own_and_nobody_sees_padding() -> None:
    assert picture(within(5, SEGMENTS)) == ["xx...", "xx...", "..xx.", "..xx.", "....."]
    assert picture(within(5, SEGMENTS, causal=True)) == ["x....", "xx...", "..x..", "..xx.", "....."]
    assert picture(Mask(jnp.arange(2), jnp.arange(5), key_segments=SEGMENTS)) == ["xxxx.", "xxxx."]


def test_radius_and_what_all_see() -> None:
    mask = dataclasses.replace(within(5), radius=1)
    assert picture(mask) == ["xx...", "xxx..", ".xxx.", "..xxx", "...xx"]
    everywhere = jnp.asarray([[False, False, False, True, True]])
    near = dataclasses.replace(mask, causal=True, seen_by_all=everywhere, key_segments=SEGMENTS)
    assert picture(near) == ["x..x.", "xx.x.", ".xxx.", "..xx.", "...x."]


def test_prefix_is_seen_from_before_it_ends() -> None:
    prefix = jnp.asarray([[True, True, False, True, False]])
    mask = dataclasses.replace(within(5, SEGMENTS, causal=True), seen_by_all=prefix)
    assert picture(mask) == ["xx...", "xx...", "..xx.", "..xx.", "....."]


def test_any_block_is_that_block_of_the_whole() -> None:
    mask = dataclasses.replace(within(5, SEGMENTS, causal=True), radius=2, seen_by_all=SEGMENTS == 2)
    whole = np.asarray(mask.allowed())
    block = jax.jit(lambda mask, start: mask.queries(start, 2).keys(2, 3))(mask, jnp.asarray(1))
    np.testing.assert_array_equal(block.allowed(), whole[:, :, 1:3, 2:5])
