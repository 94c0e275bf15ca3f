"""Rows of decoders and encoders against numbers written by hand and seqio's converters."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_like.data.features import (
    ClassificationFeatures,
    DecoderFeatures,
    MaskedLMFeatures,
    MultipleChoiceFeatures,
    PermutationFeatures,
    TokenLabelFeatures,
)
from t5x_like.data.packing import Example, FeatureConverter
from t5x_like.errors import UserError


def example(**features: list[int]) -> Example:
    return {name: np.array(values, np.int32) for name, values in features.items()}


def pairs(sizes: list[tuple[int, int]]) -> list[Example]:
    tokens = np.random.default_rng(0)
    return [
        example(inputs=tokens.integers(2, 100, inputs).tolist(), targets=tokens.integers(2, 100, targets).tolist())
        for inputs, targets in sizes
    ]


def seqio_rows(
    examples: list[Example], lengths: dict[str, int], pack: bool, loss_on_inputs: bool
) -> dict[str, np.ndarray]:
    """What seqio's task and `PrefixLMFeatureConverter` make of `examples`: the task cuts each feature, first of all."""
    cut = [{name: item[name][:length] for name, length in lengths.items()} for item in examples]
    dataset = tf.data.Dataset.from_generator(
        lambda: iter(cut),
        output_signature={name: tf.TensorSpec([None], tf.int32) for name in ("inputs", "targets")},
    )
    converter = seqio.PrefixLMFeatureConverter(
        loss_on_targets_only=not loss_on_inputs, pack=pack, apply_length_check=False
    )
    rows = list(converter(dataset, lengths).as_numpy_iterator())
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def assert_same(ours: dict[str, np.ndarray], expected: dict[str, list[object] | np.ndarray]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert value.dtype == np.int32, name
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.parametrize("loss_on_inputs", [False, True])
class TestDecoderIsAsInSeqio:
    def test_unpacked_also_where_examples_are_cut_or_empty(self, loss_on_inputs: bool) -> None:
        examples, lengths = (
            pairs([(5, 3), (1, 6), (12, 9), (8, 6), (0, 4), (3, 0), (8, 0)]),
            {"inputs": 8, "targets": 6},
        )
        ours = DecoderFeatures(loss_on_inputs).convert([[item] for item in examples], lengths, packed=False)
        assert_same(ours, seqio_rows(examples, lengths, pack=False, loss_on_inputs=loss_on_inputs))

    def test_packed_where_first_fit_only_ever_looks_at_the_last_row(self, loss_on_inputs: bool) -> None:
        examples, lengths = (
            pairs([(4, 3), (3, 2), (0, 5), (10, 6), (9, 6), (12, 9), (2, 1)]),
            {"inputs": 10, "targets": 7},
        )
        converter = DecoderFeatures(loss_on_inputs)
        groups = converter.pack(examples, lengths)
        assert groups == [[0, 1, 2], [3], [4], [5], [6]]
        ours = converter.convert([[examples[i] for i in group] for group in groups], lengths, packed=True)
        assert_same(ours, seqio_rows(examples, lengths, pack=True, loss_on_inputs=loss_on_inputs))


def test_a_decoder_s_packed_row_by_hand() -> None:
    rows = [[example(inputs=[9, 4, 6], targets=[3, 1]), example(inputs=[], targets=[5, 1])], []]
    batch = DecoderFeatures(start_id=7).convert(rows, {"inputs": 3, "targets": 6}, packed=True)
    first = {
        "decoder_target_tokens": [9, 4, 6, 3, 1, 5, 1, 0, 0],
        "decoder_input_tokens": [7, 9, 4, 6, 3, 7, 5, 0, 0],
        "decoder_loss_weights": [0, 0, 0, 1, 1, 1, 1, 0, 0],
        "decoder_causal_attention": [1, 1, 1, 1, 0, 1, 0, 0, 0],
        "decoder_segment_ids": [1, 1, 1, 1, 1, 2, 2, 0, 0],
        "decoder_positions": [0, 1, 2, 3, 4, 0, 1, 0, 0],
    }
    assert_same(batch, {name: [row, [0] * 9] for name, row in first.items()})


def test_inputs_of_a_causal_model_may_have_no_length_at_all() -> None:
    lengths = {"inputs": 0, "targets": 3}
    rows = [[example(inputs=[8, 8], targets=[3, 0, 5])]]  # token 0 is as real as any: GPT-2's is an exclamation mark
    assert_same(
        DecoderFeatures().convert(rows, lengths, packed=False),
        {
            "decoder_target_tokens": [[3, 0, 5]],
            "decoder_input_tokens": [[0, 3, 0]],
            "decoder_loss_weights": [[1, 1, 1]],
            "decoder_causal_attention": [[1, 0, 0]],
        },
    )
    assert DecoderFeatures().pack([row[0] for row in rows * 2], lengths) == [[0], [1]]


def test_masked_tokens_by_hand() -> None:
    rows = [
        [example(inputs=[8, 5, 9, 9, 7, 9], targets=[6, 4], target_positions=[2, 3], segment_ids=[0, 0, 0, 0, 1, 1])],
        [example(inputs=[8, 9], targets=[3], target_positions=[1], segment_ids=[0, 0])],
        [],
    ]
    lengths = {"inputs": 6, "targets": 3}
    expected = {
        "encoder_input_tokens": [[8, 5, 9, 9, 7, 9], [8, 9, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
        "segment_ids": [[0, 0, 0, 0, 1, 1], [0] * 6, [0] * 6],
        "target_positions": [[2, 3, 0], [1, 0, 0], [0, 0, 0]],
        "target_tokens": [[6, 4, 0], [3, 0, 0], [0, 0, 0]],
        "target_weights": [[1, 1, 0], [1, 0, 0], [0, 0, 0]],
    }
    assert_same(MaskedLMFeatures(pad_id=1).convert(rows, lengths, packed=False), expected)
    plain = [
        [{name: row[0][name] for name in ("inputs", "targets", "target_positions")}] if row else [] for row in rows
    ]
    expected["segment_ids"] = np.zeros((3, 6), np.int32)  # a task that gives none
    assert_same(MaskedLMFeatures(pad_id=1).convert(plain, lengths, packed=False), expected)


def test_next_sentence_labels_are_read_where_a_model_wants_them() -> None:
    converter = MaskedLMFeatures(next_sentence=True)
    assert converter.task_features == ("inputs", "targets", "target_positions", "next_sentence")
    assert MaskedLMFeatures().task_features == ("inputs", "targets", "target_positions")
    items = [example(inputs=[8], targets=[5], target_positions=[0], next_sentence=[label]) for label in (1, 0)]
    batch = converter.convert([[item] for item in items], {"inputs": 2, "targets": 1}, packed=False)
    np.testing.assert_array_equal(batch["next_sentence_labels"], [[1], [0]])


def test_permutations_by_hand() -> None:
    row = example(inputs=[8, 5, 6, 9, 4], targets=[5, 6], target_positions=[1, 2], order=[0, 2, 1, 0, 0])
    assert_same(
        PermutationFeatures().convert([[row], []], {"inputs": 6, "targets": 3}, packed=False),
        {
            "input_tokens": [[8, 5, 6, 9, 4, 0], [0] * 6],
            "order": [[0, 2, 1, 0, 0, 0], [0] * 6],
            "target_positions": [[1, 2, 0], [0] * 3],
            "target_tokens": [[5, 6, 0], [0] * 3],
            "target_weights": [[1, 1, 0], [0] * 3],
        },
    )


def test_label_0_is_a_label() -> None:
    rows = [[example(inputs=[8, 5, 9], targets=[0], segment_ids=[0, 1, 1])], [example(inputs=[8], targets=[3])], []]
    assert_same(
        ClassificationFeatures().convert(rows, {"inputs": 4, "targets": 1}, packed=False),
        {
            "encoder_input_tokens": [[8, 5, 9, 0], [8, 0, 0, 0], [0] * 4],
            "segment_ids": [[0, 1, 1, 0], [0] * 4, [0] * 4],
            "target_tokens": [[0], [3], [0]],
            "target_weights": [[1], [1], [0]],
        },
    )


def test_labels_of_tokens_lie_where_their_tokens_do() -> None:
    rows = [[example(inputs=[8, 5, 6, 7, 9], targets=[0, 2], target_positions=[1, 3])], []]
    batch = TokenLabelFeatures().convert(rows, {"inputs": 6, "targets": 3}, packed=False)
    np.testing.assert_array_equal(batch["target_tokens"], [[0, 0, 0, 2, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch["target_weights"], [[0, 1, 0, 1, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch["encoder_input_tokens"], [[8, 5, 6, 7, 9, 0], [0] * 6])


def test_choices_have_a_dimension_of_their_own() -> None:
    row = example(inputs=[8, 5, 0, 8, 6, 7, 8, 4, 0], segment_ids=[0, 1, 0, 0, 1, 1, 0, 1], targets=[2])
    converter = MultipleChoiceFeatures(num_choices=3)
    assert_same(
        converter.convert([[row], []], {"inputs": 9, "targets": 1}, packed=False),
        {
            "encoder_input_tokens": [[[8, 5, 0], [8, 6, 7], [8, 4, 0]], [[0] * 3] * 3],
            "segment_ids": [[[0, 1, 0], [0, 1, 1], [0, 1, 0]], [[0] * 3] * 3],
            "target_tokens": [[2], [0]],
            "target_weights": [[1], [0]],
        },
    )
    with pytest.raises(UserError, match=r"\['inputs'\] is 10; for all choices .* a multiple of 3"):
        converter.convert([[row]], {"inputs": 10, "targets": 1}, packed=False)


@pytest.mark.parametrize(
    "converter",
    [
        MaskedLMFeatures(),
        PermutationFeatures(),
        ClassificationFeatures(),
        TokenLabelFeatures(),
        MultipleChoiceFeatures(),
    ],
)
def test_encoders_read_one_example_a_row(converter: FeatureConverter) -> None:
    item = example(inputs=[8], targets=[5], target_positions=[0], order=[0])
    lengths = {"inputs": 8, "targets": 2}
    assert converter.pack([item] * 3, lengths) == [[0], [1], [2]]
    with pytest.raises(ValueError, match="several examples share a row; encoders read one a row"):
        converter.convert([[item, item]], lengths, packed=True)


@pytest.mark.parametrize("converter", [MaskedLMFeatures(), PermutationFeatures(), TokenLabelFeatures()])
def test_a_position_outside_of_the_inputs_is_refused(converter: FeatureConverter) -> None:
    item = example(inputs=[8, 8, 8], targets=[5], target_positions=[2], order=[0, 0, 1])
    with pytest.raises(ValueError, match="target_positions has 2, outside of the 2 tokens of 'inputs'"):
        converter.convert([[item]], {"inputs": 2, "targets": 1}, packed=False)
