"""Vocabularies of Hugging Face folders: `tokenizer.json`, or a WordPiece `vocab.txt` as BERT's."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np
import seqio
import tensorflow as tf

from t5x_like.errors import UserError

if TYPE_CHECKING:
    import tokenizers

_NAMES = {  # the first that a tokenizer has
    "cls": ("[CLS]", "<s>", "<cls>"),
    "sep": ("[SEP]", "</s>", "<sep>"),
    "mask": ("[MASK]", "<mask>"),
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "eos": ("</s>", "<|endoftext|>", "[SEP]"),
}


def tokenizer_vocabulary(path: str, lowercase: bool = True) -> seqio.Vocabulary:
    """The vocabulary of a Hugging Face model, with its `cls_id`, `sep_id` and `mask_id` where it has them.

    Its padding may be another id than seqio's 0, or -1, none at all: see `pad_id`, and tell the model's converter.
    Text that looks like a special token is read as text.

    Args:
        path: `tokenizer.json`, or a `vocab.txt` with a WordPiece a line.
        lowercase: for a `vocab.txt`, which does not say: whether it is of an uncased model.

    Raises:
        UserError: if the file cannot be read, or the package `tokenizers` is missing.
    """
    return Tokenizer(path, lowercase)


class Tokenizer(seqio.Vocabulary):
    """A tokenizer of the package `tokenizers`; equal to any with the same content, wherever its file lies."""

    def __init__(self, path: str, lowercase: bool) -> None:
        super().__init__()
        self._arguments = (path, lowercase)
        self._tokenizer = _load(path, lowercase)
        self._ids = {name: self._first_of(tokens) for name, tokens in _NAMES.items()}

    def _first_of(self, tokens: Sequence[str]) -> int | None:
        ids = (self._tokenizer.token_to_id(token) for token in tokens)
        return next((i for i in ids if i is not None), None)

    @property
    def cls_id(self) -> int | None:
        """Starts an encoder's input."""
        return self._ids["cls"]

    @property
    def sep_id(self) -> int | None:
        """Follows each text of an encoder's input."""
        return self._ids["sep"]

    @property
    def mask_id(self) -> int | None:
        """Stands where a token is hidden."""
        return self._ids["mask"]

    @property
    def pad_id(self) -> int:
        """Padding: 0 in BERT, 1 in RoBERTa; -1 where there is none, as in GPT-2."""
        pad_id = self._ids["pad"]
        return -1 if pad_id is None else pad_id

    @property
    def unk_id(self) -> int | None:
        """What no piece covers."""
        return self._ids["unk"]

    @property
    def bos_id(self) -> int | None:
        """None that is not `cls_id`."""
        return None

    @property
    def eos_id(self) -> int | None:
        """End of a text: the separator where there is no other."""
        return self._ids["eos"]

    @property
    def special_ids(self) -> list[int]:
        """All tokens that no text becomes."""
        return [i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special]

    @property
    def pieces(self) -> list[str]:
        """All pieces by id, empty where an id is not used."""
        return [self._tokenizer.id_to_token(i) or "" for i in range(self.vocab_size)]

    @property
    def vocab_size(self) -> int:
        """One more than the last id."""
        return max(self._tokenizer.get_vocab().values()) + 1

    @property
    def _base_vocab_size(self) -> int:
        return self.vocab_size

    def _encode(self, s: str) -> list[int]:
        return self._tokenizer.encode(s, add_special_tokens=False).ids

    def _decode(self, ids: Sequence[SupportsIndex]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: bytes | np.ndarray) -> np.ndarray:  # an array where TensorFlow runs eagerly
            content = text if isinstance(text, bytes) else text.item()
            return np.array(self._encode(content.decode("utf-8", errors="replace")), np.int32)

        return tf.ensure_shape(tf.numpy_function(encode, [s], tf.int32), [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(ids: np.ndarray) -> np.ndarray:
            texts = [self._decode(row.tolist()).encode("utf-8") for row in ids.reshape(-1, ids.shape[-1])]
            return np.array(texts, object).reshape(ids.shape[:-1])

        return tf.ensure_shape(tf.numpy_function(decode, [ids], tf.string), ids.shape[:-1])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._tokenizer.to_str() == other._tokenizer.to_str()

    def __hash__(self) -> int:
        return hash((Tokenizer, self.vocab_size))

    def __reduce__(self) -> tuple[type, tuple[str, bool]]:
        return Tokenizer, self._arguments

    def __repr__(self) -> str:
        return f"Tokenizer({self._arguments[0]!r})"


@functools.cache
def _load(path: str, lowercase: bool) -> "tokenizers.Tokenizer":
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f"{path}: reading it takes the package tokenizers: pip install 't5x_like[hub]'") from error
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; a tokenizer.json or a vocab.txt is wanted")
    try:
        tokenizer = _wordpiece(path, lowercase) if path.endswith(".txt") else tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the package raises bare Exceptions
        raise UserError(f"{path}: cannot be read as a tokenizer: {error}") from error
    tokenizer.no_truncation()  # files remember how they were last used
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _wordpiece(path: str, lowercase: bool) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece.from_file(path, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = (tokens[0] for name, tokens in _NAMES.items() if name != "eos")
    tokenizer.add_special_tokens([token for token in special if tokenizer.token_to_id(token) is not None])
    return tokenizer
