"""Pre-training models that predict one token after another: from left to right, after a prefix, or in random order."""

from collections.abc import Mapping

import seqio
import tensorflow as tf

from t5x_like.data.objectives.masked_lm import Seed, length_of
from t5x_like.data.objectives.span_corruption import concatenate_and_split
from t5x_like.data.vocabularies import special_tokens


def causal_lm(dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None) -> tf.data.Dataset:
    """A seqio preprocessor to language modelling (GPT: Radford et al. 2019): `targets` filled with running text.

    Args:
        dataset: examples with `targets`, `[length]` int32 token ids, with EOS where a model is to learn it.
        sequence_length: the most `targets`.

    Returns:
        Examples with `targets`, `[length]` int32, and empty `inputs`; only the last is shorter than it may be.

    Raises:
        UserError: if the length of `targets` is missing.
    """
    chunks = concatenate_and_split(dataset, "targets", length_of(sequence_length, "targets", 1))
    return chunks.map(
        lambda chunk: {"inputs": tf.zeros([0], chunk.dtype), "targets": chunk}, num_parallel_calls=tf.data.AUTOTUNE
    )


def prefix_lm(dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None) -> tf.data.Dataset:
    """A seqio preprocessor to prefix language modelling (Raffel et al. 2020, section 3.2.3): text cut in two anywhere.

    A chunk is as long as the shorter of both lengths, so that no cut, all being equally likely, makes a part too long.

    Args:
        dataset: examples with `targets`, `[length]` int32 token ids, with EOS where a model is to learn it.
        sequence_length: the most `inputs` and `targets`.

    Returns:
        Examples with `inputs`, what comes first, and `targets`, what follows, both `[length]` int32 and not empty
        (unless the last chunk is a single token: then `inputs` is).

    Raises:
        UserError: if a length is missing or below 2.
    """

    @seqio.map_over_dataset(num_seeds=1)
    def cut(tokens: tf.Tensor, seed: Seed) -> dict[str, tf.Tensor]:
        size = tf.size(tokens)
        place = tf.random.stateless_uniform([], seed, 1, tf.maximum(size, 2), tf.int32)
        place = tf.minimum(place, size - 1)
        return {"inputs": tokens[:place], "targets": tokens[place:]}

    length = min(length_of(sequence_length, feature, 2) for feature in ("inputs", "targets"))
    return cut(concatenate_and_split(dataset, "targets", length))


def permutation_lm(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int] | None,
    output_features: Mapping[str, seqio.Feature],
    tokens_per_target: int = 6,
) -> tf.data.Dataset:
    """A seqio preprocessor to XLNet's objective (Yang et al. 2019): text in random order, whose end is predicted.

    Inputs are running text, [SEP] and [CLS], as XLNet has them at the end. Tokens that are not predicted have rank 0:
    they see each other, as in the authors' code. Those that are have ranks 1, 2, ...: each sees what has a lower rank.

    Args:
        dataset: examples with `targets`, `[length]` int32 token ids without EOS.
        sequence_length: the most `inputs` and `targets`.
        output_features: `inputs`, for its vocabulary.
        tokens_per_target: K of the paper: one token in so many is predicted.

    Returns:
        Examples with `inputs` and `order`, `[length]` int32, the rank of each position in the order of factorisation;
        `targets` and `target_positions`, `[targets]` int32: the tokens to predict and their positions, ascending.

    Raises:
        UserError: if a length is missing or too short.
    """
    special = special_tokens(output_features["inputs"].vocabulary)
    length, most = length_of(sequence_length, "inputs", 3), length_of(sequence_length, "targets", 1)

    @seqio.map_over_dataset(num_seeds=1)
    def permute(tokens: tf.Tensor, seed: Seed) -> dict[str, tf.Tensor]:
        size = tf.size(tokens)
        count = tf.clip_by_value(size // tokens_per_target, 1, most)
        chosen = tf.random.experimental.stateless_shuffle(tf.range(size), seed)[-count:]
        positions = tf.sort(chosen)
        return {
            "inputs": tf.concat([tokens, [special.sep, special.cls]], axis=0),
            "order": tf.scatter_nd(chosen[:, tf.newaxis], tf.range(1, count + 1), [size + 2]),
            "targets": tf.gather(tokens, positions),
            "target_positions": positions,
        }

    return permute(concatenate_and_split(dataset, "targets", length - 2))
