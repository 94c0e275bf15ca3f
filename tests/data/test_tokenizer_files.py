import copy
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import seqio
import tensorflow as tf
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from t5x_like.data.tokenizer_files import tokenizer_vocabulary
from t5x_like.data.vocabularies import special_tokens, text_tokens, word_starts
from t5x_like.errors import UserError

PIECES = [
    "[PAD]",
    "the",
    "un",
    "##aff",
    "##able",
    ",",
    "##s",
    "[",
    "]",
    "mask",
    "É",
    "e",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
]
TEXT = "The unaffables, [MASK] Éxé the"


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wordpiece") / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As RoBERTa's: <s> is 0 and <pad> 1. It was saved with truncation and padding on."""
    names = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "th", "Ġth", "<mask>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "t"), ("Ġt", "h"), ("t", "h")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("lowercase", [True, False])
def test_wordpieces_are_those_of_hugging_face(wordpiece: Path, lowercase: bool) -> None:
    ours = tokenizer_vocabulary(str(wordpiece), lowercase)
    theirs = transformers.BertTokenizer(str(wordpiece), do_lower_case=lowercase)
    for text in ("The unaffables, É the e", "", "e\u0301 the"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert special_tokens(ours) == (theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id) == (13, 14, 15)
    assert (ours.pad_id, ours.unk_id, ours.eos_id, ours.vocab_size, ours.extra_ids) == (0, 12, 14, 16, 0)


def test_text_cannot_become_a_special_token(wordpiece: Path, byte_level: Path) -> None:
    assert tokenizer_vocabulary(str(wordpiece)).encode("[MASK] the") == [7, 9, 8, 1]
    ours = tokenizer_vocabulary(str(byte_level))
    ids = ours.encode("<mask></s>")
    assert not {0, 1, 2, ours.mask_id} & set(ids)
    assert ours.decode(ids) == "<mask></s>"


def test_tensorflow_reads_and_writes_as_python_does(wordpiece: Path, byte_level: Path) -> None:
    for path in (wordpiece, byte_level):
        vocabulary = tokenizer_vocabulary(str(path))
        ids = vocabulary.encode(TEXT)
        dataset = tf.data.Dataset.from_tensors(TEXT).map(vocabulary.encode_tf)
        assert dataset.element_spec == tf.TensorSpec([None], tf.int32)
        assert (
            next(dataset.as_numpy_iterator()).tolist()
            == vocabulary.encode_tf(tf.constant(TEXT)).numpy().tolist()
            == ids
        )
        assert vocabulary.decode_tf(tf.constant(ids)).numpy().decode() == vocabulary.decode(ids)
        assert vocabulary.decode_tf(tf.constant([ids, ids])).numpy()[1].decode() == vocabulary.decode(ids)


def test_roberta_s_padding_is_1_and_what_the_file_remembers_of_its_last_use_is_forgotten(byte_level: Path) -> None:
    vocabulary = tokenizer_vocabulary(str(byte_level))
    assert (vocabulary.pad_id, vocabulary.eos_id, *special_tokens(vocabulary)) == (1, 2, 0, 2, 263)
    assert len(vocabulary.encode("the thing")) == 2 + 4  # th e, Ġth i n g
    assert vocabulary.decode(vocabulary.encode(TEXT)) == TEXT
    assert np.flatnonzero(~text_tokens(vocabulary)).tolist() == [0, 1, 2, 3, 263]
    assert word_starts(vocabulary)[vocabulary.encode("the thing")].tolist() == [False, False, True, False, False, False]


def test_pieces_begin_a_word_or_do_not(wordpiece: Path) -> None:
    starts = word_starts(tokenizer_vocabulary(str(wordpiece)))
    assert [piece for piece, start in zip(PIECES, starts, strict=True) if not start] == ["##aff", "##able", "##s"]
    is_text = text_tokens(tokenizer_vocabulary(str(wordpiece)))
    assert [piece for piece, text in zip(PIECES, is_text, strict=True) if not text] == [PIECES[0], *PIECES[-4:]]


def test_a_vocabulary_without_padding_or_mask_says_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "<|endoftext|>": 1}, []))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = tokenizer_vocabulary(str(tmp_path / "tokenizer.json"))
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.mask_id, vocabulary.unk_id) == (-1, 1, None, None)
    with pytest.raises(UserError, match="has no cls, sep and mask tokens"):
        special_tokens(vocabulary)


def test_vocabularies_are_compared_by_content(wordpiece: Path, byte_level: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(wordpiece.read_bytes())
    vocabulary = tokenizer_vocabulary(str(wordpiece))
    assert vocabulary == tokenizer_vocabulary(str(tmp_path / "vocab.txt"))
    assert hash(vocabulary) == hash(tokenizer_vocabulary(str(tmp_path / "vocab.txt")))
    assert vocabulary not in (tokenizer_vocabulary(str(wordpiece), lowercase=False), seqio.ByteVocabulary())
    assert vocabulary != tokenizer_vocabulary(str(byte_level))
    for twin in (copy.deepcopy(vocabulary), pickle.loads(pickle.dumps(vocabulary))):
        assert twin == vocabulary


def test_what_cannot_be_read_is_named(tmp_path: Path, wordpiece: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"missing.json: no such file; a tokenizer.json or a vocab.txt is wanted"):
        tokenizer_vocabulary(str(tmp_path / "missing.json"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json: cannot be read as a tokenizer: "):
        tokenizer_vocabulary(str(tmp_path / "tokenizer.json"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "vocab.txt").write_bytes(wordpiece.read_bytes())
    with pytest.raises(UserError, match=r"vocab.txt: .*pip install 't5x_like\[hub\]'"):
        tokenizer_vocabulary(str(tmp_path / "vocab.txt"))
