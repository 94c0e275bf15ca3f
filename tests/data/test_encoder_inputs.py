import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_like.data.objectives import encoder_inputs
from t5x_like.data.vocabularies import byte_vocabulary, labels_vocabulary, sentencepiece_vocabulary
from t5x_like.errors import UserError

VOCABULARY = sentencepiece_vocabulary()
CLS, SEP = 8098, 1
FEATURES = {
    "inputs": seqio.Feature(VOCABULARY, add_eos=False),
    "targets": seqio.Feature(labels_vocabulary(["none", "comma", "period"]), add_eos=False),
}
WORDS = "and Nebuchadnezzar went unhandsomely home"


def rows(dataset: tf.data.Dataset) -> list[dict[str, np.ndarray | bytes]]:
    return list(dataset.as_numpy_iterator())


def test_text_is_framed() -> None:
    dataset = tf.data.Dataset.from_tensors({"inputs": [5, 6, 7], "targets": [2]})
    assert rows(encoder_inputs.frame(dataset, {"inputs": 9}, FEATURES))[0]["inputs"].tolist() == [CLS, 5, 6, 7, SEP]
    assert rows(encoder_inputs.frame(dataset, {"inputs": 4}, FEATURES))[0]["inputs"].tolist() == [CLS, 5, 6, SEP]
    with pytest.raises(UserError, match="a length of 'inputs' of at least 3, not 2"):
        encoder_inputs.frame(dataset, {"inputs": 2}, FEATURES)


@pytest.mark.parametrize("vocabulary", [VOCABULARY, byte_vocabulary()])
def test_the_first_piece_of_each_word_has_its_label(vocabulary: seqio.Vocabulary) -> None:
    dataset = tf.data.Dataset.from_tensors({"inputs": WORDS, "targets": "none comma none none period"})
    features = FEATURES | {"inputs": seqio.Feature(vocabulary, add_eos=False)}
    pieces = [vocabulary.encode(word) for word in WORDS.split()]
    flat = [piece for word in pieces for piece in word]
    starts = np.cumsum([1, *map(len, pieces[:-1])]).tolist()
    for length, most, kept in [
        (99, 9, 5),
        (len(flat) + 2, 5, 5),
        (starts[3] + 2, 9, 4),
        (starts[3] + 1, 9, 3),
        (99, 2, 2),
    ]:
        (example,) = rows(encoder_inputs.label_words(dataset, {"inputs": length, "targets": most}, features))
        cls, sep = vocabulary.vocab_size - 2, 1
        assert example["inputs"].tolist() == [cls, *flat[: length - 2], sep]
        assert example["target_positions"].tolist() == starts[:kept]
        assert example["targets"].tolist() == [0, 1, 0, 0, 2][:kept]
        assert example["inputs_pretokenized"].decode() == WORDS


def test_an_answer_is_found_by_the_positions_of_its_ends() -> None:
    texts = {"question": "Who?", "before": "He saw ", "answer": "Nebuchadnezzar the king", "after": " and fled."}
    question, before, answer, after = (VOCABULARY.encode(text) for text in texts.values())
    dataset = tf.data.Dataset.from_tensors(texts)
    (example,) = rows(encoder_inputs.locate_answer(dataset, {"inputs": 99}, FEATURES))
    inputs, (first, last) = example["inputs"].tolist(), example["targets"].tolist()
    assert inputs == [CLS, *question, SEP, *before, *answer, *after, SEP]
    assert inputs[first : last + 1] == answer
    assert example["segment_ids"].tolist() == [0] * (len(question) + 2) + [1] * (len(inputs) - len(question) - 2)
    assert example["inputs_pretokenized"] == b"Who? | He saw Nebuchadnezzar the king and fled."

    (cut,) = rows(encoder_inputs.locate_answer(dataset, {"inputs": last + 2}, FEATURES))
    assert cut["inputs"].tolist() == [*inputs[: last + 1], SEP]
    assert rows(encoder_inputs.locate_answer(dataset, {"inputs": last + 1}, FEATURES)) == []


def test_each_choice_has_an_equal_share_of_the_row() -> None:
    texts = {"question": "elk", "choices": ["a large deer", "salt", WORDS], "targets": "comma"}
    question, choices = VOCABULARY.encode("elk"), [VOCABULARY.encode(text) for text in texts["choices"]]
    (example,) = rows(
        encoder_inputs.choose(tf.data.Dataset.from_tensors(texts), {"inputs": 30, "targets": 1}, FEATURES)
    )
    for number, choice in enumerate(choices):
        place = slice(10 * number, 10 * number + 10)
        full = [CLS, *question, SEP, *choice[: 7 - len(question)], SEP]
        second = len(full) - len(question) - 2
        assert example["inputs"][place].tolist() == full + [0] * (10 - len(full))
        assert example["segment_ids"][place].tolist() == [0] * (10 - second - (10 - len(full))) + [1] * second + [0] * (
            10 - len(full)
        )
    assert example["targets"].tolist() == [1]
    assert example["inputs_pretokenized"].decode() == f"elk | a large deer | salt | {WORDS}"
    with pytest.raises(UserError, match="a length of 'inputs' of at least 15, not 14"):
        encoder_inputs.choose(tf.data.Dataset.from_tensors(texts), {"inputs": 14}, FEATURES)
