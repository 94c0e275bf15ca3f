import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_like.data.objectives import masked_lm
from t5x_like.data.vocabularies import (
    byte_vocabulary,
    sentencepiece_vocabulary,
    special_tokens,
    text_tokens,
    word_starts,
)
from t5x_like.errors import UserError

VOCABULARY = sentencepiece_vocabulary()
FEATURES = {name: seqio.Feature(VOCABULARY, add_eos=False) for name in ("inputs", "targets")}
CLS, SEP, MASK = 8098, 1, 8099
Example = dict[str, np.ndarray]
Preprocessor = Callable[..., tf.data.Dataset]


def seed(number: int) -> tuple[tf.Tensor, tf.Tensor]:
    return tf.constant(number), tf.constant(7)


def run(
    preprocessor: Preprocessor, field: str, rows: list[list[int]], lengths: dict[str, int], number: int = 0
) -> list[Example]:
    dataset = tf.data.Dataset.from_generator(
        lambda: ({field: row} for row in rows), output_signature={field: tf.TensorSpec([None], tf.int32)}
    )
    with seqio.utils.map_seed_manager(number):
        return list(preprocessor(dataset, lengths, FEATURES).as_numpy_iterator())


def restored(example: Example) -> list[int]:
    tokens = example["inputs"].copy()
    tokens[example["target_positions"]] = example["targets"]
    return tokens.tolist()


def test_hidden_tokens_are_a_share_of_the_text_and_can_be_put_back() -> None:
    rows = [[CLS, *range(300, 300 + size), SEP, *range(3000, 3000 + size), SEP] for size in (1, 5, 20, 50)]
    for row, example in zip(rows, run(masked_lm.masked_lm, "inputs", rows, {"targets": 99}), strict=True):
        positions = example["target_positions"].tolist()
        assert positions == sorted(set(positions))
        assert len(positions) == max(1, round(0.15 * (len(row) - 3)))  # 0.3 -> 1, 1.5 -> 2, 6, 15
        assert restored(example) == row
        assert not {CLS, SEP} & set(example["targets"].tolist())
        assert example["inputs"].dtype == example["targets"].dtype == example["target_positions"].dtype == np.int32


def test_no_more_tokens_are_hidden_than_targets_may_have() -> None:
    (example,) = run(masked_lm.masked_lm, "inputs", [[CLS, *range(300, 400), SEP]], {"targets": 7})
    assert len(example["targets"]) == 7


def test_other_features_pass_through() -> None:
    dataset = tf.data.Dataset.from_tensors({"inputs": [CLS, 300, SEP], "segment_ids": [0, 0, 0], "next_sentence": [1]})
    (example,) = masked_lm.masked_lm(dataset, {"targets": 3}, FEATURES).as_numpy_iterator()
    assert example["segment_ids"].tolist() == [0, 0, 0]
    assert example["next_sentence"].tolist() == [1]


def test_every_token_is_as_likely_to_be_hidden() -> None:
    row = [CLS, *range(300, 310), SEP]
    places = Counter(
        place
        for example in run(masked_lm.masked_lm, "inputs", [row] * 2000, {"targets": 9})
        for place in example["target_positions"].tolist()
    )
    assert places.keys() == set(range(1, 11))
    assert all(abs(count - 400) < 72 for count in places.values())  # 2 of 10: four standard deviations of 2000 draws


def test_of_hidden_tokens_8_in_10_are_masked_1_is_random_and_1_is_kept() -> None:
    tokens = tf.fill([20000], 500)
    noise_ids = np.arange(1000, 1010, dtype=np.int32)
    found = masked_lm.corrupt_tokens(tokens, MASK, noise_ids, (seed(1), seed(2))).numpy()
    counts = Counter(found.tolist())
    assert counts.keys() == {MASK, 500, *noise_ids.tolist()}
    assert abs(counts[MASK] - 16000) < 227  # four standard deviations
    assert abs(counts[500] - 2000) < 170
    assert all(abs(counts[noise] - 200) < 57 for noise in noise_ids.tolist())


def naive_choice(words: list[int], maskable: list[bool], order: list[int], budget: int) -> list[int]:
    """Words in `order`, as long as they fit; a word that is too long by itself does not end it."""
    chosen: list[int] = []
    for word in order:
        places = [place for place, other in enumerate(words) if other == word and maskable[place]]
        if len(places) > budget:
            continue
        if len(chosen) + len(places) > budget:
            break
        chosen += places
    return sorted(chosen)


@pytest.mark.parametrize("number", range(5))
def test_whole_words_are_chosen_until_the_next_is_too_much(number: int) -> None:
    random = np.random.default_rng(number)
    words = np.cumsum(random.random(40) < 0.5)
    words -= words[0]
    maskable, budget = random.random(40) < 0.8, int(random.integers(1, 9))
    order = tf.random.experimental.stateless_shuffle(tf.range(words[-1] + 1), seed(number)).numpy().tolist()
    found = masked_lm.choose_words(
        tf.constant(words, tf.int32), tf.constant(maskable), tf.constant(budget), seed(number)
    )
    assert found.numpy().tolist() == naive_choice(words.tolist(), maskable.tolist(), order, budget)


def test_pieces_of_a_word_are_hidden_together() -> None:
    words = [VOCABULARY.encode(word) for word in ("unhandsomely", "backgammon", "Nebuchadnezzar", "Emma", "so")] * 4
    row = [CLS, *(piece for word in words for piece in word), SEP]
    bounds = np.cumsum([1, *map(len, words)]).tolist()
    spans = [set(range(start, end)) for start, end in itertools.pairwise(bounds)]
    assert max(map(len, spans)) > 2
    for example in run(masked_lm.whole_word_masked_lm, "inputs", [row] * 20, {"targets": 99}):
        hidden = set(example["target_positions"].tolist())
        assert restored(example) == row
        assert 0 < len(hidden) <= round(0.15 * (len(row) - 2))
        assert all(span <= hidden or not span & hidden for span in spans)


def test_a_row_is_filled_with_running_text() -> None:
    documents = [list(range(300, 309)), [], list(range(400, 405))]
    examples = run(masked_lm.full_sentences, "targets", documents, {"inputs": 8})
    assert [example["inputs"].tolist() for example in examples] == [
        [CLS, 300, 301, 302, 303, 304, 305, SEP],
        [CLS, 306, 307, 308, 400, 401, 402, SEP],
        [CLS, 403, 404, SEP],
    ]


def sentences(count: int) -> list[list[int]]:
    """Sentences of 1 to 9 tokens, all tokens different; 10 times a sentence's number, then counting up."""
    random = np.random.default_rng(5)
    return [list(range(10 * i, 10 * i + random.integers(1, 10))) for i in range(30, 30 + count)]


def test_pairs_are_neighbours_or_strangers() -> None:
    text = sentences(700)
    stream = [token for sentence in text for token in sentence]
    examples = run(masked_lm.sentence_pairs, "targets", text, {"inputs": 32})
    chunks = [stream[i : i + 29] for i in range(0, len(stream) - 28, 29)]
    assert len(examples) == len(chunks) > 64  # more than one group
    labels = []
    for chunk, example in zip(chunks, examples, strict=True):
        tokens, segments, (label,) = (example[name].tolist() for name in ("inputs", "segment_ids", "next_sentence"))
        end = tokens.index(SEP)
        first, second = tokens[1:end], tokens[end + 1 : -1]
        assert (tokens[0], tokens[-1], len(tokens)) == (CLS, SEP, 32)
        assert segments == [0] * (end + 1) + [1] * (31 - end)
        assert first == chunk[: len(first)]
        assert second[0] % 10 == 0  # a sentence's beginning
        start = stream.index(second[0])
        assert second == stream[start : start + len(second)]
        assert (second == chunk[len(first) :]) == (label == 0)
        assert label == 0 or second[0] not in chunk
        labels.append(label)
    assert abs(np.mean(labels) - 0.5) < 4 * 0.5 / len(labels) ** 0.5


def test_pairs_where_there_is_little_to_choose_from() -> None:
    one_sentence = [list(range(300, 340))]
    (example,) = run(masked_lm.sentence_pairs, "targets", one_sentence, {"inputs": 40})
    middle = [*range(300, 318), SEP, *range(318, 337)]  # 37 tokens, nowhere else to go
    assert example["inputs"].tolist() == [CLS, *middle, SEP]
    assert example["next_sentence"].tolist() == [0]
    assert run(masked_lm.sentence_pairs, "targets", one_sentence, {"inputs": 44}) == []


@pytest.mark.parametrize("preprocessor", [masked_lm.masked_lm, masked_lm.whole_word_masked_lm])
def test_masks_are_a_function_of_the_seed(preprocessor: Preprocessor) -> None:
    row = [CLS, *VOCABULARY.encode("Emma Woodhouse, handsome, clever, and rich, with a comfortable home" * 3), SEP]

    def masks(number: int) -> list[list[int]]:
        return [e["inputs"].tolist() for e in run(preprocessor, "inputs", [row] * 4, {"targets": 20}, number)]

    assert masks(1) == masks(1) != masks(2)
    assert len(set(map(tuple, masks(1)))) == 4  # each example has a seed of its own


def test_lengths_and_vocabularies_that_cannot_work_are_explained() -> None:
    dataset = tf.data.Dataset.from_tensors({"inputs": [CLS, 300, SEP], "targets": [300]})
    with pytest.raises(UserError, match="a length of 'targets' of at least 1, not None"):
        masked_lm.masked_lm(dataset, {"inputs": 8}, FEATURES)
    with pytest.raises(UserError, match="a length of 'inputs' of at least 3, not 2"):
        masked_lm.full_sentences(dataset, {"inputs": 2}, FEATURES)
    with pytest.raises(UserError, match="a length of 'inputs' of at least 5, not 4"):
        masked_lm.sentence_pairs(dataset, {"inputs": 4}, FEATURES)
    with pytest.raises(UserError, match=r"mask_rate is 1\.5"):
        masked_lm.masked_lm(dataset, {"targets": 8}, FEATURES, mask_rate=1.5)
    in_bytes = {"inputs": seqio.Feature(byte_vocabulary())}
    with pytest.raises(UserError, match=r"Bytes\(extra_ids=125\) has no pieces of words"):
        masked_lm.whole_word_masked_lm(dataset, {"targets": 8}, in_bytes)
    with pytest.raises(UserError, match=r"Bytes\(extra_ids=1\) has no cls, sep and mask tokens"):
        masked_lm.masked_lm(dataset, {"targets": 8}, {"inputs": seqio.Feature(byte_vocabulary(1))})


def test_special_tokens_are_sentinels_where_a_vocabulary_has_no_others() -> None:
    assert special_tokens(VOCABULARY) == (CLS, SEP, MASK)
    assert special_tokens(byte_vocabulary()) == (382, 1, 383)
    assert np.flatnonzero(~text_tokens(VOCABULARY)).tolist() == [0, 1, 2, *range(8000, 8100)]
    assert np.flatnonzero(text_tokens(byte_vocabulary())).tolist() == list(range(3, 259))
    pieces = VOCABULARY.encode("Nebuchadnezzar")
    assert word_starts(VOCABULARY)[pieces].tolist() == [True] + [False] * (len(pieces) - 1)
