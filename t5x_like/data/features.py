"""Rows for decoders and for encoders; `packing` has those for encoder-decoders. All arrays are int32, padded with 0.

Encoders read one example a row. Beside the tokens of `inputs`, theirs have what BERT calls token types: `segment_ids`,
0 for the first text and 1 for the second, all 0 where a task gives none. `pad_id` fills the rest of a row of tokens.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from t5x_like.data.packing import Example, Row, check_one_each, lay_out, pack
from t5x_like.errors import UserError
from t5x_like.typing import Int

_NOTHING = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True)
class DecoderFeatures:
    """`inputs`, then `targets`, in one row, laid out as by `seqio.PrefixLMFeatureConverter`.

    A row is as long as both lengths together. `inputs` may be empty, and its length 0, as in causal language modelling.

    Attributes:
      loss_on_inputs: whether the tokens of `inputs` are to be predicted too.
      start_id: what `decoder_input_tokens` begins with.
    """

    loss_on_inputs: bool = False
    start_id: int = 0

    task_features: ClassVar[tuple[str, ...]] = ("inputs", "targets")
    optional_features: ClassVar[tuple[str, ...]] = ()
    min_lengths: ClassVar[Mapping[str, int]] = {"inputs": 0, "targets": 1}

    def pack(self, examples: Sequence[Example], lengths: Mapping[str, int]) -> list[list[int]]:
        """First-fit by the joined length: see `packing.pack`."""
        return pack([self._join(example, lengths) for example in examples], {"tokens": _row_length(lengths)})

    def convert(self, rows: Sequence[Row], lengths: Mapping[str, int], packed: bool) -> dict[str, np.ndarray]:
        """Lays rows out.

        Args:
          rows: one list of examples per row of the batch; at most one example in each unless `packed`.
          lengths: maximum length of `inputs` and `targets`; longer ones are cut, each by its own.
          packed: add `decoder_segment_ids` and `decoder_positions`.

        Returns:
          int32 `[rows, inputs + targets]`: `decoder_target_tokens`, `decoder_input_tokens` (shifted right, each example
          starting with `start_id`), `decoder_loss_weights`, `decoder_causal_attention` (1 where the token read belongs
          to `inputs`, or starts the example), and what `packed` adds.

        Raises:
          ValueError: the examples of a row are longer than it, or several share a row that is not `packed`.
        """
        if not packed:
            check_one_each(rows, "pass packed=True")
        joined = [[self._join(example, lengths) for example in row] for row in rows]
        names, length = ("tokens", "weights", "prefix"), _row_length(lengths)
        tokens, weights, prefix = (lay_out(joined, name, length) for name in names)
        shifted = np.pad(tokens.tokens, ((0, 0), (1, 0)))[:, :-1]
        starts = (tokens.segment_ids != 0) & (tokens.positions == 0)
        if packed:  # padding does not get the end of the last example
            shifted = np.where(tokens.segment_ids == 0, np.int32(0), shifted)
        batch = {
            "decoder_target_tokens": tokens.tokens,
            "decoder_input_tokens": np.where(starts, np.int32(self.start_id), shifted),
            "decoder_loss_weights": weights.tokens,
            "decoder_causal_attention": prefix.tokens,
        }
        if packed:
            batch |= {"decoder_segment_ids": tokens.segment_ids, "decoder_positions": tokens.positions}
        return batch

    def _join(self, example: Example, lengths: Mapping[str, int]) -> Example:
        inputs, targets = (example[name][: lengths[name]] for name in ("inputs", "targets"))
        weights = np.repeat([self.loss_on_inputs, True], [len(inputs), len(targets)])
        if len(targets) == 0:  # a place to predict the first one in, as in seqio
            targets, weights = np.zeros(1, np.int32), np.append(weights, False)
        prefix = np.arange(len(weights)) <= len(inputs)
        return {"tokens": np.concatenate([inputs, targets]), "weights": weights, "prefix": prefix}


@dataclasses.dataclass(frozen=True)
class _EncoderFeatures:
    """What all that follow have in common: a row has one example.

    Attributes:
      pad_id: fills the rest of a row of tokens.
    """

    pad_id: int = 0

    optional_features: ClassVar[tuple[str, ...]] = ("segment_ids",)

    @property
    def min_lengths(self) -> Mapping[str, int]:
        """A token of each."""
        return {"inputs": 1, "targets": 1}

    def pack(self, examples: Sequence[Example], lengths: Mapping[str, int]) -> list[list[int]]:
        """A row each."""
        return [[index] for index in range(len(examples))]


@dataclasses.dataclass(frozen=True)
class MaskedLMFeatures(_EncoderFeatures):
    """Corrupted `inputs` for an encoder, and `targets`, the true tokens at `target_positions` of it.

    Attributes:
      next_sentence: whether tasks also give `next_sentence`, for a second loss.
    """

    next_sentence: bool = False

    @property
    def task_features(self) -> tuple[str, ...]:
        """What a task must give."""
        return ("inputs", "targets", "target_positions", *(["next_sentence"] if self.next_sentence else []))

    def convert(self, rows: Sequence[Row], lengths: Mapping[str, int], packed: bool) -> dict[str, np.ndarray]:
        """Lays rows out; `packed` changes nothing.

        Returns:
          `encoder_input_tokens` and `segment_ids` `[rows, inputs]`; `target_positions`, `target_tokens` and
          `target_weights` (1 on targets) `[rows, targets]`; with `next_sentence` also `next_sentence_labels`
          `[rows, 1]`, 0 where the second text is the next, 1 where it is from elsewhere, 0 too in a row of padding.

        Raises:
          ValueError: several examples share a row, or a position is outside of `inputs`.
        """
        batch = _encoder(rows, lengths["inputs"], self.pad_id) | _targets(rows, lengths["targets"])
        batch["target_positions"] = _positions(rows, lengths)
        if self.next_sentence:
            batch["next_sentence_labels"] = lay_out(rows, "next_sentence", 1).tokens
        return batch


@dataclasses.dataclass(frozen=True)
class PermutationFeatures(_EncoderFeatures):
    """Whole `inputs`, the `order` in which XLNet reads them, and the `targets` at `target_positions` to predict."""

    task_features: ClassVar[tuple[str, ...]] = ("inputs", "targets", "target_positions", "order")
    optional_features: ClassVar[tuple[str, ...]] = ()

    def convert(self, rows: Sequence[Row], lengths: Mapping[str, int], packed: bool) -> dict[str, np.ndarray]:
        """Lays rows out; `packed` changes nothing.

        Returns:
          `input_tokens` and `order` `[rows, inputs]`, the rank of each position (see
          `autoregressive.permutation_lm`); `target_positions`, `target_tokens` and `target_weights`
          `[rows, targets]`.

        Raises:
          ValueError: several examples share a row, or a position is outside of `inputs`.
        """
        batch = {
            "input_tokens": _encoder(rows, lengths["inputs"], self.pad_id)["encoder_input_tokens"],
            "order": lay_out(rows, "order", lengths["inputs"]).tokens,
            "target_positions": _positions(rows, lengths),
        }
        return batch | _targets(rows, lengths["targets"])


@dataclasses.dataclass(frozen=True)
class ClassificationFeatures(_EncoderFeatures):
    """`inputs` for an encoder, and in `targets` one label id, or more: for a span the positions of its two ends."""

    task_features: ClassVar[tuple[str, ...]] = ("inputs", "targets")

    def convert(self, rows: Sequence[Row], lengths: Mapping[str, int], packed: bool) -> dict[str, np.ndarray]:
        """Lays rows out; `packed` changes nothing.

        Returns:
          `encoder_input_tokens` and `segment_ids` `[rows, inputs]`; `target_tokens` and `target_weights`
          `[rows, targets]`, weights being 0 in a row of padding.

        Raises:
          ValueError: several examples share a row.
        """
        return _encoder(rows, lengths["inputs"], self.pad_id) | _targets(rows, lengths["targets"])


@dataclasses.dataclass(frozen=True)
class TokenLabelFeatures(_EncoderFeatures):
    """`inputs` for an encoder, and a label for some of its tokens: `targets` are those at `target_positions`."""

    task_features: ClassVar[tuple[str, ...]] = ("inputs", "targets", "target_positions")

    def convert(self, rows: Sequence[Row], lengths: Mapping[str, int], packed: bool) -> dict[str, np.ndarray]:
        """Lays rows out; `packed` changes nothing.

        Returns:
          `encoder_input_tokens`, `segment_ids`, `target_tokens` and `target_weights` `[rows, inputs]`: weights are 1
          on the tokens that have a label.

        Raises:
          ValueError: several examples share a row, or a position is outside of `inputs`.
        """
        batch = _encoder(rows, lengths["inputs"], self.pad_id)
        labels, positions = _targets(rows, lengths["targets"]), _positions(rows, lengths)
        row, place = np.nonzero(labels["target_weights"])
        for name, values in labels.items():
            batch[name] = np.zeros((len(rows), lengths["inputs"]), np.int32)
            batch[name][row, positions[row, place]] = values[row, place]
        return batch


@dataclasses.dataclass(frozen=True)
class MultipleChoiceFeatures(_EncoderFeatures):
    """A few texts in each example, and in `targets` which of them is right, from 0.

    `inputs`, and `segment_ids` where given, hold all choices one behind the other, each padded to the same length: that
    of `inputs` divided by `num_choices`.

    Attributes:
      num_choices: of each example.
    """

    num_choices: int = 4
    task_features: ClassVar[tuple[str, ...]] = ("inputs", "targets")

    @property
    def min_lengths(self) -> Mapping[str, int]:
        """A token for each choice."""
        return {"inputs": self.num_choices, "targets": 1}

    def convert(self, rows: Sequence[Row], lengths: Mapping[str, int], packed: bool) -> dict[str, np.ndarray]:
        """Lays rows out; `packed` changes nothing.

        Returns:
          `encoder_input_tokens` and `segment_ids` `[rows, num_choices, inputs / num_choices]`; `target_tokens` and
          `target_weights` `[rows, 1]`.

        Raises:
          UserError: the length of `inputs` is no multiple of `num_choices`.
          ValueError: several examples share a row.
        """
        length, rest = divmod(lengths["inputs"], self.num_choices)
        if rest:
            raise UserError(
                f"DatasetConfig.task_feature_lengths['inputs'] is {lengths['inputs']}; for all choices to get as much "
                f"of it, take a multiple of {self.num_choices}"
            )
        texts = _encoder(rows, lengths["inputs"], self.pad_id)
        choices = {name: tokens.reshape(len(rows), self.num_choices, length) for name, tokens in texts.items()}
        return choices | _targets(rows, 1)


def _row_length(lengths: Mapping[str, int]) -> int:
    return lengths["inputs"] + lengths["targets"]


def _encoder(rows: Sequence[Row], length: int, pad_id: int) -> dict[str, Int[np.ndarray, "rows length"]]:
    check_one_each(rows, "encoders read one a row")
    inputs = lay_out(rows, "inputs", length)
    segments = [[{"segment_ids": example.get("segment_ids", _NOTHING)} for example in row] for row in rows]
    return {
        "encoder_input_tokens": np.where(inputs.segment_ids == 0, np.int32(pad_id), inputs.tokens),
        "segment_ids": lay_out(segments, "segment_ids", length).tokens,
    }


def _targets(rows: Sequence[Row], length: int) -> dict[str, Int[np.ndarray, "rows length"]]:
    targets = lay_out(rows, "targets", length)
    return {"target_tokens": targets.tokens, "target_weights": targets.segment_ids}  # a row's only example is its 1st


def _positions(rows: Sequence[Row], lengths: Mapping[str, int]) -> Int[np.ndarray, "rows length"]:
    positions = lay_out(rows, "target_positions", lengths["targets"]).tokens
    if positions.max(initial=0) >= lengths["inputs"]:
        raise ValueError(
            f"convert: target_positions has {positions.max()}, outside of the {lengths['inputs']} tokens of 'inputs'"
        )
    return positions
