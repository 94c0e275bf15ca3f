"""Task examples -> rows of a batch: which examples share a row, and how each row is laid out (NumPy only)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np

from t5x_like.errors import UserError
from t5x_like.typing import Int

Example = Mapping[str, np.ndarray]
"""One example as a seqio task gives it: token ids `[length]` by feature name, unpadded."""

Row = Sequence[Example]
"""The examples that share one row of a batch; an empty row is all padding."""


@runtime_checkable
class FeatureConverter(Protocol):
    """What a family of networks reads: the task features it needs and the arrays it makes of them."""

    @property
    def task_features(self) -> tuple[str, ...]:
        """Names of the task features that a task must give, e.g. `("inputs", "targets")`."""
        ...

    @property
    def optional_features(self) -> tuple[str, ...]:
        """Names of the task features that are read where a task gives them, e.g. `("segment_ids",)`."""
        ...

    @property
    def min_lengths(self) -> Mapping[str, int]:
        """The names in `lengths` that it needs, and the least each may be; other features are as long as these."""
        ...

    def pack(self, examples: Sequence[Example], lengths: Mapping[str, int]) -> list[list[int]]:
        """Groups `examples` into rows: the indices of the examples of each row, every index exactly once."""
        ...

    def convert(self, rows: Sequence[Row], lengths: Mapping[str, int], packed: bool) -> dict[str, np.ndarray]:
        """Lays rows out.

        Args:
          rows: one list of examples per row of the batch.
          lengths: maximum length of each task feature; longer examples are cut, as seqio does.
          packed: add segment ids and positions, and keep the examples of a row apart.

        Returns:
          int32 arrays `[rows, length]` under seqio's names, 0 where there is no token.
        """
        ...


@dataclasses.dataclass(frozen=True)
class EncoderDecoderFeatures:
    """`inputs` for the encoder, `targets` for the decoder, laid out as by `seqio.EncDecFeatureConverter`.

    Attributes:
      pad_id: fills rows of tokens; T5's is 0.
      start_id: what `decoder_input_tokens` begin with; T5's is its padding.
    """

    pad_id: int = 0
    start_id: int = 0

    task_features: ClassVar[tuple[str, ...]] = ("inputs", "targets")
    optional_features: ClassVar[tuple[str, ...]] = ()
    min_lengths: ClassVar[Mapping[str, int]] = {"inputs": 1, "targets": 1}

    def pack(self, examples: Sequence[Example], lengths: Mapping[str, int]) -> list[list[int]]:
        """First-fit: see `pack`."""
        return pack(examples, {feature: lengths[feature] for feature in self.task_features})

    def convert(self, rows: Sequence[Row], lengths: Mapping[str, int], packed: bool) -> dict[str, np.ndarray]:
        """Lays rows out as encoder and decoder arrays.

        Args:
          rows: one list of examples per row of the batch; at most one example in each unless `packed`.
          lengths: maximum length of `inputs` and `targets`; longer examples are cut.
          packed: add `*_segment_ids` (1 for the first example of a row, 0 for padding) and `*_positions`.

        Returns:
          int32 `[rows, length]`: `encoder_input_tokens`, `decoder_target_tokens`, `decoder_input_tokens`
          (targets shifted right, each example starting with `start_id`), `decoder_loss_weights` (1 on targets), and
          what `packed` adds.

        Raises:
          ValueError: the examples of a row are longer than it, or several share a row that is not `packed`.
        """
        if not packed:
            check_one_each(rows, "pass packed=True")
        encoder = lay_out(rows, "inputs", lengths["inputs"])
        decoder = lay_out(rows, "targets", lengths["targets"])
        inputs, targets = (np.where(x.segment_ids == 0, np.int32(self.pad_id), x.tokens) for x in (encoder, decoder))
        shifted = np.pad(targets, ((0, 0), (1, 0)), constant_values=self.start_id)[:, :-1]
        batch = {
            "encoder_input_tokens": inputs,
            "decoder_target_tokens": targets,
            "decoder_input_tokens": shifted,
            "decoder_loss_weights": (targets != self.pad_id).astype(np.int32),
        }
        if packed:
            batch |= {
                # Position 0 starts an example or is padding: neither gets the end of the example before it.
                "decoder_input_tokens": np.where(decoder.positions == 0, np.int32(self.start_id), shifted),
                "encoder_segment_ids": encoder.segment_ids,
                "encoder_positions": encoder.positions,
                "decoder_segment_ids": decoder.segment_ids,
                "decoder_positions": decoder.positions,
            }
        return batch


def pack(examples: Sequence[Example], lengths: Mapping[str, int]) -> list[list[int]]:
    """First-fit packing: each example, in order, joins the first row that has room for all its features.

    Args:
      examples: one block of examples; an example longer than a row counts as cut to it.
      lengths: room of one row, by feature name; no other features are looked at.

    Returns:
      The rows, in the order they were opened: the indices of their examples, each index in exactly one row.
    """
    room = np.array(list(lengths.values()))
    sizes = np.array([[len(example[feature]) for feature in lengths] for example in examples], dtype=int)
    rows: list[list[int]] = []
    free = np.tile(room, (len(examples), 1))  # of every row that could be needed, opened or not
    for index, size in enumerate(np.minimum(sizes.reshape(-1, len(room)), room)):
        fits = (free[: len(rows) + 1] >= size).all(axis=1)  # always true of the last, which is not opened yet
        row = int(fits.argmax())
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        free[row] -= size
    return rows


def check_lengths(converter: FeatureConverter, lengths: Mapping[str, int]) -> None:
    """Raises `UserError` where `lengths`, of a `DatasetConfig`, lacks what `converter` needs or has it too short."""
    reader = type(converter).__name__
    for feature, least in converter.min_lengths.items():
        if feature not in lengths:
            known = ", ".join(lengths)
            raise UserError(f"DatasetConfig.task_feature_lengths has {known}; {reader} reads {feature!r}")
        if lengths[feature] < least:
            name = f"DatasetConfig.task_feature_lengths[{feature!r}]"
            raise UserError(f"{name} is {lengths[feature]}; {reader} needs at least {least}")


def check_one_each(rows: Sequence[Row], remedy: str) -> None:
    """Raises `ValueError`, with the remedy, where several examples share a row."""
    if any(len(row) > 1 for row in rows):
        raise ValueError(f"convert: several examples share a row; {remedy}")


class Layout(NamedTuple):
    """One feature of all rows: its tokens, the example each is of (from 1), and its place there (from 0)."""

    tokens: Int[np.ndarray, "rows length"]
    segment_ids: Int[np.ndarray, "rows length"]
    positions: Int[np.ndarray, "rows length"]


def lay_out(rows: Sequence[Row], feature: str, length: int) -> Layout:
    """Writes `feature` of every row's examples one behind the other, all rows at once, each cut to `length`.

    Raises:
      ValueError: the examples of a row are longer than it.
    """
    examples = [example[feature][:length] for row in rows for example in row]
    row_of_example = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    segment_of_example = np.array([place for row in rows for place in range(1, len(row) + 1)], dtype=int)
    sizes = np.array([len(example) for example in examples], dtype=int)
    row_sizes = np.bincount(row_of_example, weights=sizes, minlength=len(rows)).astype(int)
    if row_sizes.max(initial=0) > length:
        raise ValueError(f"convert: {row_sizes.max()} tokens of {feature!r} in one row, whose length is {length}")
    layout = Layout(*(np.zeros((len(rows), length), np.int32) for _ in Layout._fields))
    row = np.repeat(row_of_example, sizes)
    column = _count_up(row_sizes)
    layout.tokens[row, column] = np.concatenate(examples) if examples else 0
    layout.segment_ids[row, column] = np.repeat(segment_of_example, sizes)
    layout.positions[row, column] = _count_up(sizes)
    return layout


def _count_up(sizes: np.ndarray) -> np.ndarray:
    """0, 1, ... `size - 1` for each of `sizes`, joined: `[2, 3]` gives `[0, 1, 0, 1, 2]`."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
