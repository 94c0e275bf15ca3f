import zlib

import numpy as np
import pytest

from t5x_like.training.heatmap import EVEN, LEVELS, NOT_FINITE, History, encode_png, levels, palette, ratios_to_mean


def test_a_history_keeps_every_step_until_its_columns_run_out_and_then_means() -> None:
    history = History(2, 4)
    assert history.means().shape == (2, 0)
    for step, value in ((10, 1.0), (11, 3.0), (13, 5.0)):
        history.add(step, [value, -value])
    np.testing.assert_array_equal(history.means(), [[1, 3, 3, 5], [-1, -3, -3, -5]])  # nothing came of step 12
    history.add(17, [9.0, None])
    assert (history.first_step, history.last_step, history.stretch) == (10, 17, 2)
    np.testing.assert_array_equal(history.means(), [[2, 5, 5, 9], [-2, -5, -5, np.nan]])


def test_levels_tell_dead_even_and_overloaded_experts_apart() -> None:
    ratios = ratios_to_mean(np.array([[0.0, 0.0], [0.5, 0.0], [1.0, 0.0], [np.nan, 0.0], [2.5, 0.0]]))
    np.testing.assert_allclose(ratios[:, 0], [0, 0.5, 1, np.nan, 2.5])
    np.testing.assert_array_equal(ratios[:, 1], np.zeros(5))
    expected = [0, EVEN / 2, EVEN, NOT_FINITE, round(EVEN * (1 + np.log2(2.5) / 2))]
    np.testing.assert_array_equal(levels(ratios)[:, 0], expected)
    assert levels(np.array([[4.0, 400.0]])).tolist() == [[LEVELS - 1, LEVELS - 1]]
    dark_blue, white, dark_red, grey = palette()[[0, EVEN, LEVELS - 1, NOT_FINITE]].tolist()
    assert dark_blue == [0x06, 0x12, 0x3A]
    assert min(white) > 230
    assert dark_red == [0xA0, 0x0B, 0x16]
    assert grey == [0x8A, 0x93, 0xA0]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5)])
def test_a_png_holds_the_levels(shape: tuple[int, int]) -> None:
    import tensorflow as tf

    cells = np.arange(np.prod(shape)).reshape(shape).astype(np.uint8)
    png = encode_png(cells)
    np.testing.assert_array_equal(tf.io.decode_png(png, channels=3).numpy(), palette()[cells])
    assert zlib.crc32(b"IEND") == int.from_bytes(png[-4:], "big")
