"""Pictures of a vector over training, such as the share of tokens that each expert of a sparse layer took.

A value is coloured by its ratio to the mean over the vector at that step, for experts an even share: dark blue is
nothing, near white an even share, dark red four times that or more. Ratios do not depend on how many experts there are
or how many of them a token goes to.
"""

import struct
import zlib
from collections.abc import Sequence

import numpy as np

COLOUR_STOPS = ((0x06, 0x12, 0x3A), (0x4F, 0x8F, 0xDB), (0xF4, 0xF3, 0xEF), (0xF5, 0x82, 0x31), (0xA0, 0x0B, 0x16))
"""Red, green, blue at 0, 1/2, 1, 2 and 4 times the mean; between them colours are interpolated."""

LEVELS = 33
"""Colours of the scale, `EVEN` of them the mean's; one more, grey, stands for values that were not finite."""

EVEN, NOT_FINITE = LEVELS // 2, LEVELS
GREY = (0x8A, 0x93, 0xA0)


class History:
    """A vector over training in bounded memory: means over stretches of steps, which grow with the run.

    Attributes:
      first_step: of the first value.
      last_step: of the last value.
      stretch: steps in each column; it doubles whenever the columns run out.
    """

    def __init__(self, size: int, max_columns: int) -> None:
        """Starts empty; vectors have `size` entries, and `max_columns` is even."""
        self.first_step, self.last_step, self.stretch = 0, 0, 1
        self._sums = np.zeros((max_columns, size))
        self._counts = np.zeros((max_columns, size), np.int32)
        self._rows = np.zeros(max_columns, np.int32)

    def add(self, step: int, values: Sequence[float | None]) -> None:
        """Takes the vector of a step; steps come in order. None and numbers that are not finite are left out."""
        if not self._rows.any():
            self.first_step = step
        self.last_step = step
        while (column := (step - self.first_step) // self.stretch) >= len(self._rows):
            self.stretch *= 2
            self._sums, self._counts = _add_pairs(self._sums), _add_pairs(self._counts)
            self._rows = _add_pairs(self._rows)
        row = np.array(values, np.float64)
        finite = np.isfinite(row)
        self._sums[column] += np.where(finite, row, 0)
        self._counts[column] += finite
        self._rows[column] += 1

    def means(self) -> np.ndarray:
        """[size, columns]: the means of every stretch so far, or of the one before where no step was reported in it.

        NaN where a step was reported and its value was not finite. Empty before the first `add`.
        """
        columns = (self.last_step - self.first_step) // self.stretch + 1 if self._rows.any() else 0
        filled = np.maximum.accumulate(np.where(self._rows > 0, np.arange(len(self._rows)), 0))[:columns]
        with np.errstate(invalid="ignore"):
            return (self._sums[filled] / self._counts[filled]).T


def _add_pairs(columns: np.ndarray) -> np.ndarray:
    """Neighbours summed into the first half of the columns, zeros after them."""
    pairs = columns[0::2] + columns[1::2]
    return np.concatenate([pairs, np.zeros_like(pairs)])


def ratios_to_mean(values: np.ndarray) -> np.ndarray:
    """[size, columns]: each value over the mean of its column's finite values; 0 in a column of zeros."""
    finite = np.isfinite(values)
    mean = np.where(finite, values, 0).sum(axis=0) / np.maximum(finite.sum(axis=0), 1)
    return values / np.where(mean == 0, 1, mean)


def levels(ratios: np.ndarray) -> np.ndarray:
    """uint8 indices into `palette`: evenly spaced from 0 to 1 times the mean, and in doublings from 1 to 4 times."""
    finite = np.where(np.isfinite(ratios), ratios, 1)
    below, above = finite, 1 + np.log2(np.maximum(finite, 1)) / 2
    level = np.rint(EVEN * np.clip(np.where(finite < 1, below, above), 0, 2))
    return np.where(np.isfinite(ratios), level, NOT_FINITE).astype(np.uint8)


def palette() -> np.ndarray:
    """[LEVELS + 1, 3] uint8: red, green and blue of every level, and the grey of `NOT_FINITE`."""
    stops = np.linspace(0, LEVELS - 1, len(COLOUR_STOPS))
    channels = (np.interp(np.arange(LEVELS), stops, channel) for channel in zip(*COLOUR_STOPS, strict=True))
    return np.concatenate([np.rint(np.stack([*channels], axis=1)), [GREY]]).astype(np.uint8)


def encode_png(level: np.ndarray) -> bytes:
    """A picture of [height, width] levels, one pixel each, as a PNG file with a palette.

    Source: PNG specification, third edition (W3C, 2025), sections 5 and 11.
    """
    height, width = level.shape
    header = struct.pack(">2I5B", width, height, 8, 3, 0, 0, 0)  # 8 bits a pixel, of colour type 3: a palette
    rows = np.pad(level.astype(np.uint8), ((0, 0), (1, 0)))  # each row opens with its filter: 0, none
    chunks = (
        (b"IHDR", header),
        (b"PLTE", palette().tobytes()),
        (b"IDAT", zlib.compress(rows.tobytes())),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
