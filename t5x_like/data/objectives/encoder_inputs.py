"""What encoders are fine-tuned on: [CLS] text [SEP], or [CLS] text [SEP] text [SEP], as BERT has them.

Each function is a seqio preprocessor from a task's own fields, all strings, to `inputs` and `targets` and what goes
along with them, int32 vectors.
"""

from collections.abc import Mapping

import seqio
import tensorflow as tf

from t5x_like.data.objectives.masked_lm import length_of
from t5x_like.data.vocabularies import SpecialTokens, special_tokens

Example = dict[str, tf.Tensor]
Features = Mapping[str, seqio.Feature]
Lengths = Mapping[str, int] | None


def frame(dataset: tf.data.Dataset, sequence_length: Lengths, output_features: Features) -> tf.data.Dataset:
    """After `seqio.preprocessors.tokenize`: puts `inputs`, cut to its length, between [CLS] and [SEP]."""
    special = special_tokens(output_features["inputs"].vocabulary)
    room = length_of(sequence_length, "inputs", 3) - 2

    def wrap(example: Example) -> Example:
        return example | {"inputs": tf.concat([[special.cls], example["inputs"][:room], [special.sep]], axis=0)}

    return dataset.map(wrap, num_parallel_calls=tf.data.AUTOTUNE)


def label_words(dataset: tf.data.Dataset, sequence_length: Lengths, output_features: Features) -> tf.data.Dataset:
    """Labels for words: the first piece of each word has its label, as in BERT (Devlin et al. 2019, section 5.3).

    Args:
        dataset: examples with `inputs`, words, and `targets`, as many labels, each joined by spaces.
        sequence_length: of `inputs`, and the most `targets`; words beyond either are left out.
        output_features: `inputs` and `targets`, for their vocabularies.

    Returns:
        Examples with `inputs`, `targets`, the labels, and `target_positions`, where in `inputs` their words begin.

    Raises:
        UserError: a length is missing or too short.
    """
    text, labels = (output_features[name].vocabulary for name in ("inputs", "targets"))
    special, room = special_tokens(text), length_of(sequence_length, "inputs", 3) - 2
    most = length_of(sequence_length, "targets", 1)

    def label(example: Example) -> Example:
        words = tf.strings.split(example["inputs"])
        pieces = tf.map_fn(text.encode_tf, words, fn_output_signature=tf.RaggedTensorSpec([None], tf.int32, 0))
        starts = tf.cast(pieces.row_starts(), tf.int32)
        kept = tf.minimum(tf.reduce_sum(tf.cast(starts < room, tf.int32)), most)
        return {
            "inputs": tf.concat([[special.cls], pieces.flat_values[:room], [special.sep]], axis=0),
            "inputs_pretokenized": example["inputs"],
            "targets": labels.encode_tf(example["targets"])[:kept],
            "target_positions": starts[:kept] + 1,
        }

    return dataset.map(label, num_parallel_calls=tf.data.AUTOTUNE)


def locate_answer(dataset: tf.data.Dataset, sequence_length: Lengths, output_features: Features) -> tf.data.Dataset:
    """Span questions: `targets` are the positions of the first and the last token of the answer (section 4.2).

    Args:
        dataset: examples with `question`, `before`, `answer` and `after`; the last three make up the passage.
        sequence_length: of `inputs`; a passage is cut to fit, and examples that then lack their answer are left out.
        output_features: `inputs`, for its vocabulary.

    Returns:
        Examples with `inputs`, `segment_ids` and `targets`, `[2]`.

    Raises:
        UserError: the length of `inputs` is missing or too short.
    """
    vocabulary = output_features["inputs"].vocabulary
    special, length = special_tokens(vocabulary), length_of(sequence_length, "inputs", 5)

    def locate(example: Example) -> Example:
        texts = [example[name] for name in ("question", "before", "answer", "after")]
        question, before, answer, after = (vocabulary.encode_tf(text) for text in texts)
        start = tf.size(question) + tf.size(before) + 2
        return _pair(question, tf.concat([before, answer, after], axis=0), special, length) | {
            "inputs_pretokenized": tf.strings.join([texts[0], " | ", *texts[1:]]),
            "targets": tf.stack([start, start + tf.size(answer) - 1]),
        }

    located = dataset.map(locate, num_parallel_calls=tf.data.AUTOTUNE)
    return located.filter(lambda example: example["targets"][1] < length - 1)


def choose(dataset: tf.data.Dataset, sequence_length: Lengths, output_features: Features) -> tf.data.Dataset:
    """Multiple choice: the question with each of the choices, one behind the other (see `MultipleChoiceFeatures`).

    Args:
        dataset: examples with `question`, `choices`, `[choices]`, and `targets`, the label of the right one.
        sequence_length: of `inputs`, all choices together; each is cut, and padded, to an equal share of it.
        output_features: `inputs` and `targets`, for their vocabularies.

    Returns:
        Examples with `inputs`, `segment_ids` and `targets`, `[1]`.

    Raises:
        UserError: the length of `inputs` is missing or too short.
    """
    text, labels = (output_features[name].vocabulary for name in ("inputs", "targets"))
    special = special_tokens(text)
    num_choices = dataset.element_spec["choices"].shape[0]
    length = length_of(sequence_length, "inputs", 5 * num_choices) // num_choices

    def choices(example: Example) -> Example:
        question = text.encode_tf(example["question"])
        texts = tf.unstack(example["choices"], num_choices)
        pairs = [_pair(question, text.encode_tf(choice), special, length) for choice in texts]
        padding = {"inputs": text.pad_id, "segment_ids": 0}
        padded = {
            name: [tf.pad(pair[name], [[0, length - tf.size(pair[name])]], constant_values=pad) for pair in pairs]
            for name, pad in padding.items()
        }
        return {name: tf.concat(parts, axis=0) for name, parts in padded.items()} | {
            "inputs_pretokenized": tf.strings.reduce_join([example["question"], *texts], separator=" | "),
            "targets": labels.encode_tf(example["targets"]),
            "targets_pretokenized": example["targets"],
        }

    return dataset.map(choices, num_parallel_calls=tf.data.AUTOTUNE)


def _pair(first: tf.Tensor, second: tf.Tensor, special: SpecialTokens, length: int) -> Example:
    """[CLS] first [SEP] second [SEP], of which the end is cut, and which of the two each token is of."""
    first = first[: length - 3]
    second = second[: length - 3 - tf.size(first)]
    return {
        "inputs": tf.concat([[special.cls], first, [special.sep], second, [special.sep]], axis=0),
        "segment_ids": tf.repeat([0, 1], [tf.size(first) + 2, tf.size(second) + 1]),
    }
