"""Text to token ids and back: SentencePiece pieces or bytes, with sentinels that no text can imitate; and labels.

`seqio.SentencePieceVocabulary` adds its sentinels to the model as user-defined pieces, so a user who types
`<extra_id_0>` gets a sentinel id. Here the model that encodes has no sentinels, only the one that decodes.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_text as tf_text
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from t5x_like.data.corpora import FILES
from t5x_like.errors import UserError, nearest
from t5x_like.typing import Bool

SHIPPED_MODEL = str(FILES / "sp_en_es_8k.model")


def sentencepiece_vocabulary(path: str | None = None, extra_ids: int = 100) -> seqio.Vocabulary:
    """SentencePiece pieces and, above them, `extra_ids` sentinels; `<extra_id_0>` is the last id, as in T5.

    Sentinels that end the model itself (as in mT5's) keep their ids: ask for as many as it has.

    Args:
        path: the model file, also a remote one (`gs://...`); None for the shipped English-Spanish model.
        extra_ids: number of sentinels.

    Raises:
        UserError: if the file cannot be read, is no such model, or has other sentinels, padding or no EOS.
    """
    return SentencePieces(SHIPPED_MODEL if path is None else path, extra_ids)


def byte_vocabulary(extra_ids: int = 125) -> seqio.Vocabulary:
    """ByT5's vocabulary (Xue et al. 2022): padding 0, EOS 1, unknown 2, bytes as their value + 3, sentinels.

    With 125 sentinels there are 384 ids. The published ByT5 was pre-trained without them: in it the last
    bytes, ids 258 downwards, stand for spans.

    Raises:
        UserError: if `extra_ids` is negative.
    """
    return Bytes(extra_ids)


def labels_vocabulary(names: Sequence[str]) -> seqio.Vocabulary:
    """Labels by their place in `names`, from 0: `spring summer` -> `[0, 1]`. It has no padding and no EOS.

    Args:
        names: of all labels, without white space, since a text may have several.

    Raises:
        UserError: if a name is empty, has white space or comes twice.
    """
    return Labels(tuple(names))


def numbers_vocabulary(size: int) -> seqio.Vocabulary:
    """Numbers below `size` as themselves, for positions and the like: `3 7` -> `[3, 7]`. No padding and no EOS."""
    return Numbers(size)


class SpecialTokens(NamedTuple):
    """What encoders need beside text: a token to start an input, one to end each text, and one that hides another."""

    cls: int
    sep: int
    mask: int


def special_tokens(vocabulary: seqio.Vocabulary) -> SpecialTokens:
    """A vocabulary's own `cls_id`, `sep_id` and `mask_id`, or else `<extra_id_1>`, EOS and `<extra_id_0>`.

    Raises:
        UserError: if the vocabulary has neither its own nor EOS and two sentinels.
    """
    ids = (getattr(vocabulary, f"{name}_id", None) for name in SpecialTokens._fields)
    own = [i for i in ids if i is not None]
    if len(own) == len(SpecialTokens._fields):
        return SpecialTokens(*own)
    if vocabulary.extra_ids < 2 or vocabulary.eos_id is None:
        raise UserError(f"{vocabulary!r} has no cls, sep and mask tokens; EOS and 2 extra_ids would do instead")
    top = vocabulary.vocab_size - 1
    return SpecialTokens(cls=top - 1, sep=vocabulary.eos_id, mask=top)


def mask_id(vocabulary: seqio.Vocabulary) -> int:
    """The id that hides a token from an encoder, for gin."""
    return special_tokens(vocabulary).mask


def pad_id(vocabulary: seqio.Vocabulary) -> int:
    """The id that fills a row, for gin."""
    return vocabulary.pad_id


def text_tokens(vocabulary: seqio.Vocabulary) -> Bool[np.ndarray, " vocab"]:
    """Which ids stand for text: all but sentinels, padding, EOS, unknown and other special tokens."""
    size = vocabulary.vocab_size
    named = {vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.bos_id, *special_tokens(vocabulary)}
    special = (*named, *getattr(vocabulary, "special_ids", ()), *range(size - vocabulary.extra_ids, size))
    is_text = np.ones(size, bool)
    is_text[[token for token in special if token is not None and token >= 0]] = False
    return is_text


def word_starts(vocabulary: seqio.Vocabulary) -> Bool[np.ndarray, " vocab"]:
    """Which ids begin a word: SentencePiece's and byte-level BPE's with the mark of a space, WordPiece's without ##.

    Raises:
        UserError: if the vocabulary has no pieces of words.
    """
    pieces = getattr(vocabulary, "pieces", None)
    if pieces is None:
        raise UserError(f"{vocabulary!r} has no pieces of words; take SentencePiece or WordPiece to mask whole words")
    if any(piece.startswith("##") for piece in pieces):
        return np.array([not piece.startswith("##") for piece in pieces])
    return np.array([piece.startswith(("▁", "Ġ")) for piece in pieces])


class SentencePieces(seqio.Vocabulary):
    """A SentencePiece model and sentinels; equal to any with the same model, wherever its file lies."""

    def __init__(self, path: str, extra_ids: int) -> None:
        super().__init__(extra_ids)
        self._path = path
        self._model = _load(path, extra_ids)

    @property
    def bos_id(self) -> int | None:
        """Beginning of sequence; T5's models have none."""
        bos_id = self._model.encoder.bos_id()
        return bos_id if bos_id >= 0 else None

    @property
    def eos_id(self) -> int:
        """End of sequence: 1 in T5's models."""
        return self._model.encoder.eos_id()

    @property
    def unk_id(self) -> int:
        """What no piece covers: 2 in T5's models."""
        return self._model.encoder.unk_id()

    @property
    def vocab_size(self) -> int:
        """Pieces and sentinels."""
        return self._model.decoder.get_piece_size()

    @property
    def pieces(self) -> list[str]:
        """All pieces by id; a word begins with U+2581."""
        return [self._model.decoder.id_to_piece(i) for i in range(self.vocab_size)]

    @property
    def _base_vocab_size(self) -> int:
        return self.vocab_size  # seqio decodes every id from here on as unknown

    def _encode(self, s: str) -> list[int]:
        return self._model.encoder.encode(s)

    def _decode(self, ids: Sequence[SupportsIndex]) -> str:
        return self._model.decoder.decode([int(i) for i in ids])

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        return tf_text.SentencepieceTokenizer(model=self._model.encoder_proto).tokenize(s)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf_text.SentencepieceTokenizer(model=self._model.decoder_proto).detokenize(ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SentencePieces) and self._model.decoder_proto == other._model.decoder_proto

    def __hash__(self) -> int:
        return hash(self._model.decoder_proto)

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        # gin deep-copies its arguments: all copies share one loaded model.
        return SentencePieces, (self._path, self.extra_ids)

    def __repr__(self) -> str:
        return f"SentencePieces({self._path!r}, extra_ids={self.extra_ids})"


class Bytes(seqio.ByteVocabulary):
    """seqio's byte vocabulary, except that a sentinel decodes to `<extra_id_N>` instead of to nothing."""

    def __init__(self, extra_ids: int) -> None:
        _check_extra_ids(extra_ids)
        super().__init__(extra_ids)
        sentinels = [name.encode() for name in _sentinel_names(extra_ids)]
        self._surfaces = [b"", b"", b"", *(bytes([value]) for value in range(256)), *sentinels]

    @property
    def vocab_size(self) -> int:
        """Special ids, bytes and sentinels."""
        return len(self._surfaces)

    @property
    def _base_vocab_size(self) -> int:
        return self.vocab_size  # seqio decodes every id from here on as unknown

    def _decode(self, ids: Sequence[SupportsIndex]) -> str:
        return b"".join(self._surfaces[i] for i in ids).decode("utf-8", errors="ignore")

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        text = tf.strings.reduce_join(tf.gather(tf.constant(self._surfaces), ids), axis=-1)
        return tf.strings.unicode_transcode(text, "UTF-8", "UTF-8", errors="ignore")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bytes) and self.extra_ids == other.extra_ids

    def __hash__(self) -> int:
        return hash((Bytes, self.extra_ids))

    def __repr__(self) -> str:
        return f"Bytes(extra_ids={self.extra_ids})"


class Labels(seqio.PassThroughVocabulary):
    """Names by their place in a list. As a pass-through vocabulary to seqio, it is not exchanged for one of text."""

    def __init__(self, names: tuple[str, ...]) -> None:
        wrong = [name for name in names if len(name.split()) != 1 or name != name.strip()]
        if wrong or not names or len(set(names)) < len(names):
            raise UserError(f"labels_vocabulary: names without white space, each once, are wanted, not {names}")
        super().__init__(len(names))
        self.names = names

    @property
    def pad_id(self) -> int:
        """None: 0 is a label."""
        return -1

    def _encode(self, s: str) -> list[int]:
        unknown = [name for name in s.split() if name not in self.names]
        if unknown:
            raise UserError(f"label {unknown[0]!r} is unknown;{nearest(unknown[0], self.names)} {self}")
        return [self.names.index(name) for name in s.split()]

    def _decode(self, ids: Sequence[SupportsIndex]) -> str:
        wrong = [int(i) for i in ids if not 0 <= int(i) < len(self.names)]
        if wrong:
            raise UserError(f"label id {wrong[0]} is none of {len(self.names)}: has the model as many classes? {self}")
        return " ".join(self.names[int(i)] for i in ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        words = tf.strings.split(s)
        is_name = words[:, tf.newaxis] == tf.constant(self.names)
        known = tf.debugging.Assert(tf.reduce_all(tf.reduce_any(is_name, axis=1)), [f"unknown label; {self}", words])
        with tf.control_dependencies([known] if known is not None else []):
            return tf.argmax(is_name, axis=1, output_type=tf.int32)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.strings.reduce_join(tf.gather(tf.constant(self.names), ids), axis=-1, separator=" ")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Labels) and self.names == other.names

    def __hash__(self) -> int:
        return hash(self.names)

    def __str__(self) -> str:
        return f"Labels({', '.join(self.names)})"


class Numbers(seqio.PassThroughVocabulary):
    """Integers as themselves, written with spaces between; equal to another of the same size."""

    @property
    def pad_id(self) -> int:
        """None: 0 is a number."""
        return -1

    def _encode(self, s: str) -> list[int]:
        return [int(word) for word in s.split()]

    def _decode(self, ids: Sequence[SupportsIndex]) -> str:
        return " ".join(str(int(i)) for i in ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        return tf.strings.to_number(tf.strings.split(s), tf.int32) if s.dtype == tf.string else s

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.strings.reduce_join(tf.strings.as_string(ids), axis=-1, separator=" ")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Numbers) and self.size == other.size

    def __hash__(self) -> int:
        return hash((Numbers, self.size))


@dataclasses.dataclass(frozen=True)
class _Model:
    """One SentencePiece model, without sentinels for reading text and with them for writing it."""

    encoder: SentencePieceProcessor
    decoder: SentencePieceProcessor
    encoder_proto: bytes
    decoder_proto: bytes


@functools.cache
def _load(path: str, extra_ids: int) -> _Model:
    _check_extra_ids(extra_ids)
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            content = file.read()
        model = _processor(content)
    except (tf.errors.OpError, RuntimeError) as error:
        raise UserError(f"cannot read the SentencePiece model {path!r}: {error}") from error
    if model.pad_id() != seqio.vocabularies.PAD_ID or model.eos_id() < 0:
        raise UserError(
            f"the SentencePiece model {path!r} has padding id {model.pad_id()} and EOS id {model.eos_id()}; "
            "padding must be 0, and there must be an EOS: train it with --pad_id=0 --eos_id=1 --unk_id=2"
        )
    proto = ModelProto.FromString(content)
    _remove_sentinels(proto, path, extra_ids)
    encoder_proto = proto.SerializeToString()
    for name in _sentinel_names(extra_ids):
        proto.pieces.add(piece=f"▁{name}", score=0.0, type=ModelProto.SentencePiece.USER_DEFINED)
    decoder_proto = proto.SerializeToString()
    return _Model(_processor(encoder_proto), _processor(decoder_proto), encoder_proto, decoder_proto)


def _processor(proto: bytes) -> SentencePieceProcessor:
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto)  # the constructor would take an empty file for no file
    return processor


def _remove_sentinels(proto: ModelProto, path: str, extra_ids: int) -> None:
    """Takes off the sentinels that a model ends with, which text could become. Decoding gets them back."""
    found: list[str] = []
    while proto.pieces and proto.pieces[-1].piece.removeprefix("▁").startswith("<extra_id_"):
        found.insert(0, proto.pieces[-1].piece.removeprefix("▁"))
        del proto.pieces[-1]
    if found and found != _sentinel_names(extra_ids):
        raise UserError(
            f"the SentencePiece model {path!r} ends with {len(found)} sentinels of its own, {found[0]} to "
            f"{found[-1]}; extra_ids, now {extra_ids}, must be their number, and <extra_id_0> the last"
        )


def _sentinel_names(extra_ids: int) -> list[str]:
    """In the order of their ids."""
    return [f"<extra_id_{i}>" for i in reversed(range(extra_ids))]


def _check_extra_ids(extra_ids: int) -> None:
    if extra_ids < 0:
        raise UserError(f"extra_ids is {extra_ids}; a vocabulary has zero sentinels or more")
