"""Pre-training encoders: what BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019) read, and what is hidden of it.

A task joins two preprocessors. The first frames text: `sentence_pairs` (BERT) or `full_sentences` (RoBERTa). The second
hides tokens: `masked_lm` or `whole_word_masked_lm`. Every draw is a function of the example's seed.

    [CLS] my dog [MASK] [SEP] he likes play ##ing [SEP]       inputs
    0     0  0   0      0     1  1     1    1     1           segment_ids
    3 -> is                                                   target_positions -> targets
"""

from collections.abc import Mapping

import numpy as np
import seqio
import tensorflow as tf

from t5x_like.data.objectives.span_corruption import concatenate_and_split
from t5x_like.data.vocabularies import special_tokens, text_tokens, word_starts
from t5x_like.errors import UserError

_GROUP = 64  # chunks, among which a second sentence from elsewhere is found

Seed = tuple[tf.Tensor, tf.Tensor]


def masked_lm(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int] | None,
    output_features: Mapping[str, seqio.Feature],
    mask_rate: float = 0.15,
) -> tf.data.Dataset:
    """A seqio preprocessor that hides tokens of `inputs`: 80 % become [MASK], 10 % a random token, 10 % stay.

    Args:
        dataset: examples with `inputs`, `[length]` int32 token ids, special ones in place.
        sequence_length: the most `targets` of an example.
        output_features: `inputs`, for its vocabulary.
        mask_rate: the share of tokens to predict, special ones neither counted nor chosen; at least one is.

    Returns:
        The examples with changed `inputs`, and `targets` and `target_positions`, `[targets]` int32: the true tokens,
        and where in `inputs` they belong, in ascending order.

    Raises:
        UserError: if the length of `targets` is missing, or the vocabulary has no mask token.
    """
    starts = np.ones(output_features["inputs"].vocabulary.vocab_size, bool)  # every token is a word
    return _mask(dataset, sequence_length, output_features, mask_rate, starts)


def whole_word_masked_lm(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int] | None,
    output_features: Mapping[str, seqio.Feature],
    mask_rate: float = 0.15,
) -> tf.data.Dataset:
    """`masked_lm`, except that all pieces of a word are chosen together; each is then changed or kept by itself.

    Words are chosen until the next one would be too much. One that is too much by itself is never chosen.

    Raises:
        UserError: also if the vocabulary has no pieces of words.
    """
    starts = word_starts(output_features["inputs"].vocabulary)
    return _mask(dataset, sequence_length, output_features, mask_rate, starts)


def _mask(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int] | None,
    output_features: Mapping[str, seqio.Feature],
    mask_rate: float,
    starts: np.ndarray,
) -> tf.data.Dataset:
    if not 0 < mask_rate <= 1:
        raise UserError(f"mask_rate is {mask_rate}; it must lie between 0 and 1")
    most = length_of(sequence_length, "targets", 1)
    vocabulary = output_features["inputs"].vocabulary
    is_text, mask_id = text_tokens(vocabulary), special_tokens(vocabulary).mask

    @seqio.map_over_dataset(num_seeds=3)
    def mask(example: dict[str, tf.Tensor], seeds: tuple[Seed, ...]) -> dict[str, tf.Tensor]:
        tokens = example["inputs"]
        maskable = tf.gather(is_text, tokens)
        # A special token is a word, and so is what follows it.
        first = tf.gather(starts, tokens) | ~maskable | tf.concat([[True], ~maskable[:-1]], axis=0)
        share = mask_rate * tf.cast(tf.reduce_sum(tf.cast(maskable, tf.int32)), tf.float64)
        budget = tf.clip_by_value(tf.cast(tf.round(share), tf.int32), 1, most)
        positions = choose_words(tf.cumsum(tf.cast(first, tf.int32)) - 1, maskable, budget, seeds[0])
        targets = tf.gather(tokens, positions)
        hidden = corrupt_tokens(targets, mask_id, np.flatnonzero(is_text).astype(np.int32), seeds[1:])
        inputs = tf.tensor_scatter_nd_update(tokens, positions[:, tf.newaxis], hidden)
        return example | {"inputs": inputs, "targets": targets, "target_positions": positions}

    return mask(dataset)


def choose_words(words: tf.Tensor, maskable: tf.Tensor, budget: tf.Tensor, seed: Seed) -> tf.Tensor:
    """Draws words in random order until the next one's tokens would exceed `budget`; longer ones are passed over.

    Args:
        words: `[length]` int32, the word of each token, counting up from 0.
        maskable: `[length]` bool, the tokens that count and may be chosen.
        budget: scalar int32, the most tokens.
        seed: a pair of integer scalars.

    Returns:
        The positions of the tokens chosen, `[chosen]` int32, ascending.
    """
    count = words[-1] + 1
    sizes = tf.math.unsorted_segment_sum(tf.cast(maskable, tf.int32), words, count)
    order = tf.random.experimental.stateless_shuffle(tf.range(count), seed)
    sizes = tf.gather(sizes, order)
    fits = sizes <= budget
    taken = tf.boolean_mask(order, fits & (tf.cumsum(tf.where(fits, sizes, 0)) <= budget))
    is_taken = tf.scatter_nd(taken[:, tf.newaxis], tf.ones_like(taken), [count])
    return tf.cast(tf.where(maskable & (tf.gather(is_taken, words) > 0))[:, 0], tf.int32)


def corrupt_tokens(tokens: tf.Tensor, mask_id: int, noise_ids: np.ndarray, seeds: tuple[Seed, ...]) -> tf.Tensor:
    """80 % of `tokens` become `mask_id`, 10 % any of `noise_ids` (perhaps the same again), 10 % stay.

    Args:
        tokens: `[chosen]` int32.
        mask_id: of the mask token.
        noise_ids: `[ids]` int32.
        seeds: two pairs of integer scalars.

    Returns:
        `[chosen]` int32.
    """
    draws = tf.random.stateless_uniform(tf.shape(tokens), seeds[0])
    noise = tf.random.stateless_uniform(tf.shape(tokens), seeds[1], 0, len(noise_ids), tf.int32)
    return tf.where(draws < 0.8, mask_id, tf.where(draws < 0.9, tf.gather(noise_ids, noise), tokens))


def full_sentences(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int] | None,
    output_features: Mapping[str, seqio.Feature],
) -> tf.data.Dataset:
    """A seqio preprocessor to RoBERTa's inputs: running text that fills a row, between [CLS] and [SEP].

    Documents are joined in their order and cut by length alone, so a row may begin and end in mid-sentence.

    Args:
        dataset: examples with `targets`, `[length]` int32 token ids without EOS.
        sequence_length: the most `inputs`.
        output_features: `inputs`, for its vocabulary.

    Returns:
        Examples with `inputs`, `[length]` int32; only the last is shorter than it may be.

    Raises:
        UserError: if the length of `inputs` is missing or below 3.
    """
    special = special_tokens(output_features["inputs"].vocabulary)
    chunks = concatenate_and_split(dataset, "targets", length_of(sequence_length, "inputs", 3) - 2)
    return chunks.map(
        lambda chunk: {"inputs": tf.concat([[special.cls], chunk, [special.sep]], axis=0)},
        num_parallel_calls=tf.data.AUTOTUNE,
    )


def sentence_pairs(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int] | None,
    output_features: Mapping[str, seqio.Feature],
) -> tf.data.Dataset:
    """A seqio preprocessor to BERT's inputs and next-sentence prediction: [CLS] A [SEP] B [SEP].

    Running text is cut into chunks that fill a row, and each where one of its sentences begins (the middle if none
    does). In half of them, what follows is exchanged for as many tokens from another sentence's beginning in another of
    64 neighbouring chunks, so that neither lengths nor mid-sentence cuts tell the two apart. (BERT's A and B are cut to
    fit, at sentences' ends where possible, and a tenth of its rows is shorter on purpose; here all are full.)

    Args:
        dataset: sentences with `targets`, `[length]` int32 token ids without EOS, in reading order.
        sequence_length: the most `inputs`.
        output_features: `inputs`, for its vocabulary.

    Returns:
        Examples with `inputs` and `segment_ids`, `[length]` int32, 1 on B and its [SEP]; and `next_sentence`, `[1]`
        int32, 0 where B follows A and 1 where it is from elsewhere. What does not fill a last row is left out.

    Raises:
        UserError: if the length of `inputs` is missing or below 5.
    """
    special = special_tokens(output_features["inputs"].vocabulary)
    size = length_of(sequence_length, "inputs", 5) - 3

    @seqio.map_over_dataset(num_seeds=3)
    def pair(group: dict[str, tf.Tensor], seeds: tuple[Seed, ...]) -> dict[str, tf.Tensor]:
        splits, seconds, elsewhere = draw_pairs(tf.where(group["start"])[:, 0], tf.size(group["start"]), size, seeds)
        own, place = tf.range(tf.size(splits))[:, tf.newaxis] * size, tf.range(size)
        is_first = place < splits[:, tf.newaxis]
        sources = tf.where(is_first, own + place, (seconds - splits)[:, tf.newaxis] + place)
        return {"text": tf.gather(group["token"], sources), "split": splits, "elsewhere": elsewhere}

    def frame(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        text, split = example["text"], example["split"]
        parts = [[special.cls], text[:split], [special.sep], text[split:], [special.sep]]
        return {
            "inputs": tf.concat(parts, axis=0),
            "segment_ids": tf.repeat([0, 1], [split + 2, size - split + 1]),
            "next_sentence": tf.cast(example["elsewhere"], tf.int32)[tf.newaxis],
        }

    tokens = dataset.map(
        lambda example: {"token": example["targets"], "start": tf.range(tf.size(example["targets"])) == 0},
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    return pair(tokens.rebatch(_GROUP * size)).unbatch().map(frame, num_parallel_calls=tf.data.AUTOTUNE)


def draw_pairs(
    starts: tf.Tensor, total: tf.Tensor, size: int, seeds: tuple[Seed, ...]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """For each chunk of a stretch of text, where to split it and where its second part begins.

    Args:
        starts: `[sentences]`, where in the text sentences begin, ascending.
        total: scalar int32, the tokens of the text.
        size: of a chunk, in tokens.
        seeds: three pairs of integer scalars.

    Returns:
        Of each chunk: the length of its first part, between 1 and `size - 1`; where in the text its second part begins;
        and whether that is elsewhere. int32, int32 and bool `[chunks]`.
    """
    chunks = total // size
    starts, begins = tf.cast(starts, tf.int32), tf.range(chunks) * size

    def draw(counts: tf.Tensor, seed: Seed) -> tf.Tensor:
        """A number below each count; 0 where the count is 0."""
        return tf.cast(tf.random.stateless_uniform([chunks], seed) * tf.cast(counts, tf.float32), tf.int32)

    low, high = tf.searchsorted(starts, begins + 1), tf.searchsorted(starts, begins + size)
    inner = tf.pad(starts, [[0, 1]])  # a place to look where there is none
    splits = tf.where(high > low, tf.gather(inner, low + draw(high - low, seeds[0])) - begins, size // 2)

    # Second parts from elsewhere: sentences with enough text behind them, but for those of the chunk itself.
    far = tf.boolean_mask(starts, starts <= total - size)
    low, high = tf.searchsorted(far, begins), tf.searchsorted(far, begins + size)
    others = tf.size(far) - (high - low)
    choice = draw(others, seeds[1])
    choice += tf.where(choice >= low, high - low, 0)
    elsewhere = (tf.random.stateless_uniform([chunks], seeds[2]) < 0.5) & (others > 0)
    seconds = tf.where(elsewhere, tf.gather(tf.pad(far, [[0, 1]]), choice), begins + splits)
    return splits, seconds, elsewhere


def length_of(sequence_length: Mapping[str, int] | None, feature: str, least: int) -> int:
    """The length of a feature.

    Raises:
        UserError: if it is missing or below `least`.
    """
    length = (sequence_length or {}).get(feature)
    if length is None or length < least:
        raise UserError(f"this objective needs a length of {feature!r} of at least {least}, not {length}")
    return length
