"""Span corruption, T5's pre-training objective (Raffel et al. 2020, section 3.1.4).

Spans are cut out, each leaving a sentinel; the targets are the spans, each after its sentinel:

    Thank you <extra_id_0> me to your party <extra_id_1> .        inputs
    <extra_id_0> for inviting <extra_id_1> last week              targets

Both then get an EOS. (The paper's figure ends the targets with one more sentinel; T5 was trained without it.)
"""

from collections.abc import Mapping

import numpy as np
import seqio
import tensorflow as tf

from t5x_like.errors import UserError


def span_corruption(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int] | None,
    output_features: Mapping[str, seqio.Feature],
    noise_density: float = 0.15,
    mean_noise_span_length: float = 3.0,
) -> tf.data.Dataset:
    """A seqio preprocessor from tokenised text to span-corrupted inputs and targets, without EOS.

    Documents are joined and cut into chunks that fill `sequence_length["inputs"]` once corrupted. Where the
    noise falls is a function of the example's seed alone.

    Args:
        dataset: examples with `targets`, `[length]` int32 token ids without EOS.
        sequence_length: the most `inputs` and `targets` tokens of an example, EOS included.
        output_features: `inputs` and `targets`, which must share one vocabulary.
        noise_density: the share of tokens that are cut out.
        mean_noise_span_length: in tokens.

    Returns:
        Examples with `inputs` and `targets`, both `[length]` int32.

    Raises:
        UserError: if the lengths are missing or too short, or need more sentinels than the vocabulary has.
    """
    vocabulary = output_features["targets"].vocabulary
    if output_features["inputs"].vocabulary != vocabulary:
        raise UserError("span_corruption needs one vocabulary, but those of inputs and targets differ")
    raw_length = _raw_length(sequence_length, vocabulary.extra_ids, noise_density, mean_noise_span_length)
    # Looked up by the length of a chunk, so that TensorFlow rounds as `raw_length_and_targets` does.
    lengths = range(1, raw_length + 1)
    counts = np.array([noise_counts(n, noise_density, mean_noise_span_length) for n in lengths], np.int32)

    @seqio.map_over_dataset(num_seeds=2)
    def corrupt(tokens: tf.Tensor, seeds: tuple[tuple[tf.Tensor, tf.Tensor], ...]) -> dict[str, tf.Tensor]:
        num_noise_tokens, num_spans = tf.unstack(tf.gather(counts, tf.size(tokens) - 1))
        return corrupt_spans(tokens, num_noise_tokens, num_spans, vocabulary.vocab_size - 1, seeds)

    return corrupt(concatenate_and_split(dataset, "targets", raw_length))


def raw_length_and_targets(
    inputs_length: int, noise_density: float = 0.15, mean_noise_span_length: float = 3.0
) -> tuple[int, int]:
    """The raw tokens that fill `inputs_length` once corrupted, and their targets' length: 512 -> (568, 114).

    Args:
        inputs_length: the most tokens of corrupted inputs, sentinels and EOS included.
        noise_density: the share of tokens that are cut out.
        mean_noise_span_length: in tokens.

    Returns:
        The greatest fitting raw length, and the length of its targets, sentinels and EOS included.

    Raises:
        UserError: if the noise is not well defined, or `inputs_length` has no room for a sentinel and EOS.
    """
    if not 0 < noise_density < 1:
        raise UserError(f"noise_density is {noise_density}; it must lie between 0 and 1")
    if mean_noise_span_length < 1:
        raise UserError(f"mean_noise_span_length is {mean_noise_span_length}; a span has at least 1 token")
    if inputs_length < 2:
        raise UserError(f"span corruption needs inputs of at least 2 tokens, not {inputs_length}")

    def corrupted_lengths(raw_length: int) -> tuple[int, int]:
        num_noise_tokens, num_spans = noise_counts(raw_length, noise_density, mean_noise_span_length)
        return raw_length - num_noise_tokens + num_spans + 1, num_noise_tokens + num_spans + 1

    raw_length = 1
    while corrupted_lengths(raw_length + 1)[0] <= inputs_length:  # one token more never makes inputs shorter
        raw_length += 1
    return raw_length, corrupted_lengths(raw_length)[1]


def noise_counts(length: int, noise_density: float, mean_noise_span_length: float) -> tuple[int, int]:
    """The number of noise tokens and of the spans they form, for a chunk of `length` >= 1 tokens.

    At least one token is noise and, of two or more, at least one is not: one that is not precedes each span.
    """
    num_noise_tokens = min(max(round(length * noise_density), 1), max(length - 1, 1))
    num_spans = min(round(num_noise_tokens / mean_noise_span_length), length - num_noise_tokens)
    return num_noise_tokens, max(num_spans, 1)


def corrupt_spans(
    tokens: tf.Tensor,
    num_noise_tokens: tf.Tensor,
    num_spans: tf.Tensor,
    first_sentinel: int,
    seeds: tuple[tuple[tf.Tensor, tf.Tensor], ...],
) -> dict[str, tf.Tensor]:
    """Cuts `num_spans` spans out of one chunk. It begins with text and ends with noise, as in T5.

    Args:
        tokens: `[length]` int32.
        num_noise_tokens: scalar int32.
        num_spans: scalar int32, at most the number of noise tokens and of the others.
        first_sentinel: the id of `<extra_id_0>`, from which the sentinels count down.
        seeds: two pairs of int64 scalars, for the lengths of the noise and of the text between it.

    Returns:
        `inputs`, `[length - num_noise_tokens + num_spans]`, `targets`, `[num_noise_tokens + num_spans]`.
    """
    noise_lengths = random_segmentation(num_noise_tokens, num_spans, seeds[0])
    text_lengths = random_segmentation(tf.size(tokens) - num_noise_tokens, num_spans, seeds[1])
    alternating = tf.reshape(tf.stack([text_lengths, noise_lengths], axis=1), [-1])
    segments = tf.RaggedTensor.from_row_lengths(tokens, alternating)
    sentinels = (first_sentinel - tf.range(num_spans))[:, tf.newaxis]
    return {
        "inputs": tf.concat([segments[0::2], sentinels], axis=1).flat_values,
        "targets": tf.concat([sentinels, segments[1::2]], axis=1).flat_values,
    }


def random_segmentation(num_items: tf.Tensor, num_segments: tf.Tensor, seed: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
    """Divides items into non-empty segments, every way to do so being equally likely.

    Args:
        num_items: scalar int32.
        num_segments: scalar int32, at most `num_items`, or 1 where there are no items.
        seed: a pair of int64 scalars.

    Returns:
        The lengths of the segments, `[num_segments]` int32, whose sum is `num_items`.
    """
    # num_segments - 1 of the num_items - 1 gaps between items, drawn anywhere.
    gaps = tf.random.experimental.stateless_shuffle(tf.range(1, tf.maximum(num_items, 1)), seed)
    boundaries = tf.concat([[0], tf.sort(gaps[: num_segments - 1]), [num_items]], axis=0)
    return boundaries[1:] - boundaries[:-1]


def concatenate_and_split(dataset: tf.data.Dataset, key: str, length: int) -> tf.data.Dataset:
    """Joins all documents in their order and cuts the stream every `length` tokens.

    As in T5, nothing marks where documents meet. (T5 joins 128 documents at a time; here only the very last
    chunk is shorter. It is kept, even if it has a single token: no token is lost.)

    Args:
        dataset: examples with `key`, `[document_length]` token ids.
        key: the feature to join.
        length: of a chunk, in tokens.

    Returns:
        A dataset of chunks, `[length]`.
    """
    documents = dataset.map(lambda example: example[key], num_parallel_calls=tf.data.AUTOTUNE)
    return documents.rebatch(length)


def _raw_length(
    sequence_length: Mapping[str, int] | None,
    extra_ids: int,
    noise_density: float,
    mean_noise_span_length: float,
) -> int:
    if not sequence_length or "inputs" not in sequence_length or "targets" not in sequence_length:
        raise UserError(f"span_corruption needs the lengths of inputs and targets, not {sequence_length}")
    inputs_length = sequence_length["inputs"]
    raw_length, targets_length = raw_length_and_targets(inputs_length, noise_density, mean_noise_span_length)
    if sequence_length["targets"] < targets_length:
        raise UserError(
            f"inputs of {inputs_length} tokens stand for {raw_length} raw ones, whose targets need a length "
            f"of {targets_length}; it is {sequence_length['targets']}"
        )
    _, num_spans = noise_counts(raw_length, noise_density, mean_noise_span_length)
    if num_spans > extra_ids:
        raise UserError(
            f"inputs of {inputs_length} tokens need {num_spans} sentinels; the vocabulary has {extra_ids}: "
            "shorten the inputs, raise mean_noise_span_length, or give the vocabulary more extra_ids"
        )
    return raw_length
