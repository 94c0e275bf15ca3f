import jax.numpy as jnp
import numpy as np

from t5x_like.layers import masks


def test_key_mask() -> None:
    mask = masks.key_mask(jnp.asarray([[True, True, False], [False, True, True]]))
    assert mask.tolist() == [[[[True, True, False]]], [[[False, True, True]]]]


def test_causal_mask_sees_itself_and_what_is_before() -> None:
    assert masks.causal_mask(jnp.arange(3), jnp.arange(3))[0, 0].tolist() == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
    step = masks.causal_mask(jnp.asarray([2]), jnp.arange(5))
    assert step[0, 0].tolist() == [[True, True, True, False, False]]


def test_segment_mask() -> None:
    mask = masks.segment_mask(jnp.asarray([[1, 2, 0]]), jnp.asarray([[1, 1, 2, 0]]))
    assert mask[0, 0].tolist() == [
        [True, True, False, False],
        [False, False, True, False],
        [False, False, False, True],
    ]


def test_combine_allows_what_all_allow() -> None:
    keys = masks.key_mask(jnp.asarray([[True, False], [True, True]]))
    causal = masks.causal_mask(jnp.arange(2), jnp.arange(2))
    both = masks.combine(keys, causal)
    assert both[:, 0].tolist() == [[[True, False], [True, False]], [[True, False], [True, True]]]
    np.testing.assert_array_equal(masks.combine(causal, keys), both)
