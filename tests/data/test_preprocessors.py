import pytest
import tensorflow as tf

from t5x_like.data import preprocessors

VERSES = tf.data.Dataset.from_tensor_slices(
    {"id": ["Gen.1.3"], "english": ["Let there be light"], "spanish": ["Sea la luz: ¡así!"]}
)


def rows(dataset: tf.data.Dataset) -> list[dict[str, str]]:
    return [{key: value.decode() for key, value in row.items()} for row in dataset.as_numpy_iterator()]


@pytest.mark.parametrize(
    ("source", "target", "inputs", "targets"),
    [
        ("English", "Spanish", "translate English to Spanish: Let there be light", "Sea la luz: ¡así!"),
        ("Spanish", "English", "translate Spanish to English: Sea la luz: ¡así!", "Let there be light"),
    ],
)
def test_translation_has_t5s_prefix(source: str, target: str, inputs: str, targets: str) -> None:
    assert rows(preprocessors.translate(VERSES, source, target)) == [{"inputs": inputs, "targets": targets}]


def test_classification_joins_the_fields_after_the_prefix() -> None:
    senses = tf.data.Dataset.from_tensor_slices(
        {"word": ["elk"], "definition": ["large northern deer"], "supersense": ["animal"]}
    )
    classified = preprocessors.classify(senses, "supersense", ("word", "definition"), "supersense")
    assert rows(classified) == [{"inputs": "supersense: elk: large northern deer", "targets": "animal"}]
    plain = preprocessors.classify(senses, None, ("word", "definition"), "supersense")
    assert rows(plain) == [{"inputs": "elk: large northern deer", "targets": "animal"}]


def test_sentences_end_where_a_word_does() -> None:
    text = """Mr. Knightley saw it. "Is it so?" said Mrs. Elton!--_No!_ It was so no. 3 (it seemed.) He had"""
    assert rows(preprocessors.sentences(tf.data.Dataset.from_tensors({"text": text}))) == [
        {"targets": 'Mr. Knightley saw it. "Is it so?" said Mrs. Elton!--_No!_ It was so no. 3 (it seemed.)'},
        {"targets": "He had"},
    ]
    text = "They went. Who came? Nobody!_ _Really."
    assert [row["targets"] for row in rows(preprocessors.sentences(tf.data.Dataset.from_tensors({"text": text})))] == [
        "They went.",
        "Who came?",
        "Nobody!_",
        "_Really.",
    ]


def test_language_modelling_keeps_the_text_alone() -> None:
    assert rows(preprocessors.language_modelling(VERSES, "english")) == [{"targets": "Let there be light"}]
