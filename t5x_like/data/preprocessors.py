"""From a corpus's own fields to the text-to-text form of T5: one string of inputs, one of targets; and to plain text.

Each function maps a `tf.data.Dataset` of examples to another one, as seqio asks of a task's preprocessors.
"""

from collections.abc import Sequence

import tensorflow as tf


def translate(dataset: tf.data.Dataset, source_language: str, target_language: str) -> tf.data.Dataset:
    """Translation with T5's prefix: `translate English to Spanish: ...` (Raffel et al. 2020, appendix D).

    Args:
        dataset: examples with one text per language, keyed by the language's name in lower case.
        source_language: the name of the language to translate from, as in the prefix: `English`.
        target_language: the name of the language to translate to: `Spanish`.

    Returns:
        Examples with `inputs` and `targets`, scalar strings.
    """
    prefix = f"translate {source_language} to {target_language}: "
    return dataset.map(
        lambda example: {
            "inputs": prefix + example[source_language.lower()],
            "targets": example[target_language.lower()],
        },
        num_parallel_calls=tf.data.AUTOTUNE,
    )


def classify(dataset: tf.data.Dataset, prefix: str | None, fields: Sequence[str], label: str) -> tf.data.Dataset:
    """Classification as text: inputs `prefix: field: field ...`, targets the name of the class.

    Args:
        dataset: examples with the keys `fields` and `label`, all scalar strings.
        prefix: the name of the task that inputs begin with; None for none.
        fields: the keys of the texts to classify, in order.
        label: the key of the class name.

    Returns:
        Examples with `inputs` and `targets`, scalar strings.
    """
    start = [] if prefix is None else [prefix]
    return dataset.map(
        lambda example: {
            "inputs": tf.strings.join([*start, *(example[field] for field in fields)], separator=": "),
            "targets": example[label],
        },
        num_parallel_calls=tf.data.AUTOTUNE,
    )


def language_modelling(dataset: tf.data.Dataset, field: str = "text") -> tf.data.Dataset:
    """Unlabelled text: the key `field` becomes `targets`, from which an objective makes its inputs."""
    return dataset.map(lambda example: {"targets": example[field]}, num_parallel_calls=tf.data.AUTOTUNE)


def sentences(dataset: tf.data.Dataset, field: str = "text") -> tf.data.Dataset:
    """Sentences as `targets`, cut off after `.`, `!` or `?` behind three small letters: not after `Mrs.`."""

    def split(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        marked = tf.strings.regex_replace(example[field], r"""([a-z]{3}[.!?][_)"']*) +""", "\\1\n")
        return {"targets": tf.strings.split(marked, "\n")}

    return dataset.map(split, num_parallel_calls=tf.data.AUTOTUNE).unbatch()
