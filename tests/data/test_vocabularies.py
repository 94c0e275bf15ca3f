import copy
import pickle
from pathlib import Path

import pytest
import seqio
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from t5x_like.data.vocabularies import (
    SHIPPED_MODEL,
    byte_vocabulary,
    labels_vocabulary,
    numbers_vocabulary,
    sentencepiece_vocabulary,
)
from t5x_like.errors import UserError

PIECES = sentencepiece_vocabulary()
BYTES = byte_vocabulary()
SEQIO = seqio.SentencePieceVocabulary(SHIPPED_MODEL, extra_ids=100)  # an oracle, on harmless text

SPANISH = "Y apartó Dios la luz: ¿«qué» dijo el niño, Chêdorlaomer? ¡Güero!"
HARMLESS = [SPANISH, "", " ", "Emma Woodhouse, handsome,\tclever\nand rich", "日本語 עברית 👩‍👧 ﬁ ①", "a\0b"]
HOSTILE = [
    "<extra_id_0>",
    "fill <extra_id_0> and <extra_id_99> in",
    "▁<extra_id_1>▁<extra_id_2>",
    "</s>",
    "the end</s> of <pad> it <unk> <s>",
    "<0x00><0x41>",
]
TEXTS = st.text(st.characters(codec="utf-8"), max_size=30) | st.lists(
    st.sampled_from(["<extra_id_7>", "</s>", "<pad>", "▁", " ", "\u200b", "😀", "e\u0301", "ñ", "a"]),
    max_size=8,
).map("".join)
IDS = st.lists(st.integers(0, 8110), max_size=12)


def write_model(path: Path, sentinels: list[str]) -> str:
    """The shipped model with pieces of its own at its end."""
    proto = ModelProto.FromString(Path(SHIPPED_MODEL).read_bytes())
    for name in sentinels:
        proto.pieces.add(piece=name, score=0.0, type=ModelProto.SentencePiece.USER_DEFINED)
    path.write_bytes(proto.SerializeToString())
    return str(path)


def test_the_shipped_model_has_t5s_layout() -> None:
    assert (PIECES.pad_id, PIECES.eos_id, PIECES.unk_id, PIECES.bos_id) == (0, 1, 2, None)
    assert (PIECES.vocab_size, PIECES.extra_ids) == (8100, 100)
    assert PIECES.decode([8099]) == "<extra_id_0>"
    assert PIECES.decode([8000]) == "<extra_id_99>"


def test_bytes_have_byt5s_layout() -> None:
    assert (BYTES.pad_id, BYTES.eos_id, BYTES.unk_id) == (0, 1, 2)
    assert (BYTES.vocab_size, BYTES.extra_ids) == (384, 125)
    assert BYTES.encode("A\0ñ") == [0x41 + 3, 3, 0xC3 + 3, 0xB1 + 3]
    assert BYTES.decode([383, 0x41 + 3, 259]) == "<extra_id_0>A<extra_id_124>"


@pytest.mark.parametrize("text", HARMLESS)
def test_pieces_agree_with_seqio_on_text_without_sentinels(text: str) -> None:
    ids = SEQIO.encode(text)
    assert PIECES.encode(text) == ids
    assert PIECES.encode_tf(tf.constant(text)).numpy().tolist() == ids
    assert PIECES.decode(ids) == SEQIO.decode(ids)


def test_decoding_shows_sentinels_as_seqio_does() -> None:
    ids = [*SEQIO.encode("Thank you"), 8099, *SEQIO.encode("me to"), 8098, 1, *SEQIO.encode("after the end")]
    assert PIECES.decode(ids) == SEQIO.decode(ids) == "Thank you <extra_id_0> me to <extra_id_1>"
    assert PIECES.decode_tf(tf.constant(ids)).numpy().decode() == "Thank you <extra_id_0> me to <extra_id_1>"


@pytest.mark.parametrize("text", HOSTILE)
def test_text_cannot_become_a_sentinel_or_a_control_piece(text: str) -> None:
    for vocabulary, base_size in [(PIECES, 8000), (BYTES, 259)]:
        ids = vocabulary.encode(text)
        assert vocabulary.encode_tf(tf.constant(text)).numpy().tolist() == ids
        assert all(2 < i < base_size for i in ids)
        assert vocabulary.decode(ids) == text.replace("▁", " " if vocabulary is PIECES else "▁").strip()
    assert SEQIO.encode("<extra_id_0>") == [8099]  # the trap which this avoids


@given(TEXTS)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_tensorflow_encodes_as_python_does(text: str) -> None:
    for vocabulary, base_size in [(PIECES, 8000), (BYTES, 259)]:
        ids = vocabulary.encode(text)
        assert vocabulary.encode_tf(tf.constant(text)).numpy().tolist() == ids
        assert all(2 < i < base_size for i in ids)
    assert BYTES.decode(BYTES.encode(text)) == text


@given(IDS)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_tensorflow_decodes_as_python_does(ids: list[int]) -> None:
    assert PIECES.decode_tf(tf.constant(ids, tf.int32)).numpy().decode() == PIECES.decode(ids)
    ids = [i % 390 for i in ids]
    assert BYTES.decode_tf(tf.constant(ids, tf.int32)).numpy().decode() == BYTES.decode(ids)


@pytest.mark.parametrize("vocabulary", [PIECES, BYTES])
def test_round_trip_of_accents_and_of_what_no_piece_covers(vocabulary: seqio.Vocabulary) -> None:
    for text in [SPANISH, "niño 😀 日本語 👩‍👧"]:
        assert vocabulary.decode(vocabulary.encode(text)) == text
        assert vocabulary.decode_tf(vocabulary.encode_tf(tf.constant(text))).numpy().decode() == text


def test_what_is_no_text_decodes_to_nothing_or_unknown() -> None:
    assert PIECES.decode([*PIECES.encode("light"), 1, 300, 8099]) == "light"  # nothing after EOS
    assert PIECES.decode([8100]) == PIECES.decode([2]) == " ⁇ "  # an embedding table is often longer
    assert BYTES.decode([0, 2, 384, 0x41 + 3, 1, 0x42 + 3]) == "A"
    assert BYTES.decode([0xC3 + 3, 383]) == "<extra_id_0>"  # half a letter
    batch = tf.constant([[*PIECES.encode("the light"), 1], [*PIECES.encode("the day"), 0]])
    assert PIECES.decode_tf(batch).numpy().tolist() == [b"the light", b"the day"]
    replacement = [byte + 3 for byte in "\ufffd".encode()]  # what is no UTF-8
    assert PIECES.encode_tf(tf.constant(b"\xff")).numpy().tolist()[1:] == replacement  # after the piece "▁"


def test_vocabularies_are_compared_by_content_and_copied_cheaply(tmp_path: Path) -> None:
    elsewhere = sentencepiece_vocabulary(write_model(tmp_path / "moved.model", []))
    different = [sentencepiece_vocabulary(extra_ids=99), byte_vocabulary(99), BYTES, SEQIO]
    assert elsewhere == PIECES
    assert hash(PIECES) == hash(elsewhere)
    assert all(other != PIECES for other in different)
    assert byte_vocabulary() == BYTES
    assert hash(byte_vocabulary()) == hash(BYTES)
    assert byte_vocabulary() != seqio.ByteVocabulary(125)
    for vocabulary in (PIECES, BYTES):
        for twin in (copy.deepcopy(vocabulary), pickle.loads(pickle.dumps(vocabulary))):
            assert twin == vocabulary
            assert twin.encode(SPANISH) == vocabulary.encode(SPANISH)


def test_a_models_own_sentinels_keep_their_ids_and_cannot_be_typed(tmp_path: Path) -> None:
    path = write_model(tmp_path / "own.model", ["▁<extra_id_2>", "▁<extra_id_1>", "▁<extra_id_0>"])
    vocabulary = sentencepiece_vocabulary(path, extra_ids=3)
    assert (vocabulary.vocab_size, vocabulary.extra_ids) == (8003, 3)
    assert max(vocabulary.encode("a <extra_id_0>")) < 8000
    assert vocabulary.decode([8002, 8000]) == "<extra_id_0> <extra_id_2>"
    with pytest.raises(UserError, match="3 sentinels of its own, <extra_id_2> to <extra_id_0>; extra_ids, now 100,"):
        sentencepiece_vocabulary(path)
    ascending = write_model(tmp_path / "ascending.model", ["<extra_id_0>", "<extra_id_1>"])
    with pytest.raises(UserError, match="<extra_id_0> the last"):
        sentencepiece_vocabulary(ascending, extra_ids=2)


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    garbage, empty = tmp_path / "garbage", tmp_path / "empty"
    garbage.write_bytes(b"no model at all" * 9)
    empty.write_bytes(b"")
    for path in (tmp_path / "missing.model", tmp_path, garbage, empty):
        with pytest.raises(UserError, match=f"cannot read the SentencePiece model '{path}'"):
            sentencepiece_vocabulary(str(path))
    for field, message in [
        ("pad_piece", "padding id -1 and EOS id 1"),
        ("eos_piece", "padding id 0 and EOS id -1"),
    ]:
        proto = ModelProto.FromString(Path(SHIPPED_MODEL).read_bytes())
        setattr(proto.trainer_spec, field, "nothing")
        (tmp_path / field).write_bytes(proto.SerializeToString())
        with pytest.raises(UserError, match=message):
            sentencepiece_vocabulary(str(tmp_path / field))
    for build in (sentencepiece_vocabulary, byte_vocabulary):
        with pytest.raises(UserError, match="extra_ids is -1"):
            build(extra_ids=-1)


def test_labels_are_their_places() -> None:
    seasons = labels_vocabulary(["spring", "summer", "fall"])
    assert (seasons.vocab_size, seasons.pad_id, seasons.eos_id) == (3, -1, None)
    assert seasons.encode("fall") == [2]
    assert seasons.encode("spring  fall ") == seasons.encode_tf(tf.constant("spring  fall ")).numpy().tolist() == [0, 2]
    assert seasons.encode("") == seasons.encode_tf(tf.constant("")).numpy().tolist() == []
    assert seasons.decode([2, 0]) == "fall spring"
    assert seasons.decode_tf(tf.constant([[2, 0], [1, 1]])).numpy().tolist() == [b"fall spring", b"summer summer"]
    assert copy.deepcopy(seasons) == seasons == labels_vocabulary(("spring", "summer", "fall"))
    assert hash(copy.deepcopy(seasons)) == hash(seasons)
    assert seasons != labels_vocabulary(["summer", "spring", "fall"])
    assert seasons != seqio.PassThroughVocabulary(3)
    dataset = tf.data.Dataset.from_tensor_slices(["summer", "fall"]).map(seasons.encode_tf)
    assert [ids.tolist() for ids in dataset.as_numpy_iterator()] == [[1], [2]]


def test_a_label_that_is_none_is_named() -> None:
    seasons = labels_vocabulary(["spring", "summer", "fall"])
    with pytest.raises(UserError, match=r"label 'sumer' is unknown; Did you mean 'summer'\? Labels\(spring, summer, f"):
        seasons.encode("spring sumer")
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"unknown label; Labels\(spring, summer, fall\)"):
        seasons.encode_tf(tf.constant("winter"))
    with pytest.raises(UserError, match="label id 3 is none of 3: has the model as many classes"):
        seasons.decode([0, 3])
    for names in ([], ["a", "a"], ["a b"], [""], ["a "]):
        with pytest.raises(UserError, match="names without white space, each once"):
            labels_vocabulary(names)


def test_numbers_are_themselves() -> None:
    places = numbers_vocabulary(100)
    assert (places.vocab_size, places.pad_id, places.eos_id) == (100, -1, None)
    assert places.encode("3 7") == places.encode_tf(tf.constant("3 7")).numpy().tolist() == [3, 7]
    assert places.encode_tf(tf.constant([0, 7])).numpy().tolist() == [0, 7]
    assert places.decode([0, 7]) == places.decode_tf(tf.constant([0, 7])).numpy().decode() == "0 7"
    assert places == numbers_vocabulary(100) != numbers_vocabulary(99)
    assert hash(places) == hash(numbers_vocabulary(100))
