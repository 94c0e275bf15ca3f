"""Packing and layout against numbers written by hand, a naive first-fit and seqio's converters."""

import numpy as np
import pytest
import seqio
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.data.packing import EncoderDecoderFeatures, Example, FeatureConverter, pack

CONVERTER: FeatureConverter = EncoderDecoderFeatures()


def example(inputs: list[int], targets: list[int]) -> Example:
    return {"inputs": np.array(inputs, np.int32), "targets": np.array(targets, np.int32)}


def random_examples(sizes: list[tuple[int, int]]) -> list[Example]:
    tokens = np.random.default_rng(0)
    return [example(*(tokens.integers(2, 100, size).tolist() for size in pair)) for pair in sizes]


def seqio_rows(examples: list[Example], lengths: dict[str, int], pack: bool) -> dict[str, np.ndarray]:
    """What `seqio.EncDecFeatureConverter` makes of `examples`, rows stacked."""
    dataset = tf.data.Dataset.from_generator(
        lambda: iter(examples),
        output_signature={name: tf.TensorSpec([None], tf.int32) for name in ("inputs", "targets")},
    )
    converter = seqio.EncDecFeatureConverter(pack=pack, apply_length_check=False)  # trims, and forbids, the same
    rows = list(converter(dataset, lengths).as_numpy_iterator())
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype == np.int32, name
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_two_examples_in_a_row_by_hand() -> None:
    rows = [[example([7, 8, 5, 1], [3, 9, 1]), example([8, 4, 9, 3, 1], [4, 1])], []]
    batch = CONVERTER.convert(rows, {"inputs": 10, "targets": 7}, packed=True)
    first = {
        "encoder_input_tokens": [7, 8, 5, 1, 8, 4, 9, 3, 1, 0],
        "encoder_segment_ids": [1, 1, 1, 1, 2, 2, 2, 2, 2, 0],
        "encoder_positions": [0, 1, 2, 3, 0, 1, 2, 3, 4, 0],
        "decoder_target_tokens": [3, 9, 1, 4, 1, 0, 0],
        "decoder_input_tokens": [0, 3, 9, 0, 4, 0, 0],
        "decoder_loss_weights": [1, 1, 1, 1, 1, 0, 0],
        "decoder_segment_ids": [1, 1, 1, 2, 2, 0, 0],
        "decoder_positions": [0, 1, 2, 0, 1, 0, 0],
    }
    assert_same(batch, {name: np.array([row, [0] * len(row)], np.int32) for name, row in first.items()})


def test_segment_ids_agree_where_an_example_has_no_inputs() -> None:
    rows = [[example([], [3, 1]), example([6, 1], [5, 1])]]
    batch = CONVERTER.convert(rows, {"inputs": 3, "targets": 5}, packed=True)
    np.testing.assert_array_equal(batch["encoder_segment_ids"], [[2, 2, 0]])
    np.testing.assert_array_equal(batch["decoder_segment_ids"], [[1, 1, 2, 2, 0]])


def test_unpacked_arrays_are_those_of_seqio_also_where_examples_are_cut() -> None:
    examples = random_examples([(5, 3), (1, 6), (12, 9), (8, 6), (0, 2)])
    lengths = {"inputs": 8, "targets": 6}
    ours = CONVERTER.convert([[item] for item in examples], lengths, packed=False)
    assert_same(ours, seqio_rows(examples, lengths, pack=False))


def test_packed_arrays_are_those_of_seqio_where_first_fit_only_ever_looks_at_the_last_row() -> None:
    examples = random_examples([(4, 3), (3, 2), (2, 2), (6, 1), (3, 5), (9, 7), (15, 2)])
    lengths = {"inputs": 10, "targets": 7}
    groups = CONVERTER.pack(examples, lengths)
    assert groups == [[0, 1, 2], [3, 4], [5], [6]]
    ours = CONVERTER.convert([[examples[i] for i in group] for group in groups], lengths, packed=True)
    assert_same(ours, seqio_rows(examples, lengths, pack=True))


def test_an_example_joins_the_first_row_with_room_for_all_its_features() -> None:
    examples = random_examples([(6, 1), (6, 1), (4, 9), (4, 2), (2, 1), (1, 1)])
    assert pack(examples, {"inputs": 10, "targets": 10}) == [[0, 2], [1, 3], [4, 5]]
    assert pack(examples, {"inputs": 10, "targets": 9}) == [[0, 3], [1, 4, 5], [2]]
    assert pack([], {"inputs": 10}) == []


@settings(deadline=None, max_examples=60, database=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40),
    st.integers(1, 25),
    st.integers(1, 25),
)
def test_no_example_is_lost_split_or_mixed_up(sizes: list[tuple[int, int]], inputs: int, targets: int) -> None:
    examples, lengths = random_examples(sizes), {"inputs": inputs, "targets": targets}
    groups = CONVERTER.pack(examples, lengths)

    naive: list[list[int]] = []
    for index, item in enumerate(examples):
        for group in naive:
            if all(sum(len(examples[i][f][:n]) for i in group) + len(item[f][:n]) <= n for f, n in lengths.items()):
                group.append(index)
                break
        else:
            naive.append([index])
    assert groups == naive

    batch = CONVERTER.convert([[examples[i] for i in group] for group in groups], lengths, packed=True)
    for feature, prefix, tokens in (("inputs", "encoder", "input"), ("targets", "decoder", "target")):
        tokens_of_rows, segments = batch[f"{prefix}_{tokens}_tokens"], batch[f"{prefix}_segment_ids"]
        np.testing.assert_array_equal(segments != 0, tokens_of_rows != 0)
        for row, group in enumerate(groups):
            for segment, index in enumerate(group, start=1):
                place = segments[row] == segment
                expected = examples[index][feature][: lengths[feature]]
                np.testing.assert_array_equal(tokens_of_rows[row][place], expected)
                np.testing.assert_array_equal(batch[f"{prefix}_positions"][row][place], np.arange(len(expected)))
                if feature == "targets":
                    shifted = [0, *expected[:-1]] if len(expected) else []
                    np.testing.assert_array_equal(batch["decoder_input_tokens"][row][place], shifted)
            assert segments[row].max(initial=0) <= len(group)


def test_rows_that_do_not_fit_are_refused() -> None:
    pair = random_examples([(3, 2), (3, 2)])
    with pytest.raises(ValueError, match="6 tokens of 'inputs' in one row, whose length is 5"):
        CONVERTER.convert([pair], {"inputs": 5, "targets": 5}, packed=True)
    with pytest.raises(ValueError, match="several examples share a row; pass packed=True"):
        CONVERTER.convert([pair], {"inputs": 9, "targets": 9}, packed=False)


def test_padding_and_start_of_models_that_are_not_t5() -> None:
    rows = [[{"inputs": np.array([5]), "targets": np.array([0, 7])}]]
    batch = EncoderDecoderFeatures(pad_id=9, start_id=8).convert(rows, {"inputs": 2, "targets": 4}, packed=False)
    assert {name: array.tolist() for name, array in batch.items()} == {
        "encoder_input_tokens": [[5, 9]],
        "decoder_target_tokens": [[0, 7, 9, 9]],
        "decoder_input_tokens": [[8, 0, 7, 9]],
        "decoder_loss_weights": [[1, 1, 0, 0]],
    }
