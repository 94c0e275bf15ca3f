"""Text to token ids and back: SentencePiece pieces or bytes, with sentinels that no text can imitate.

`seqio.SentencePieceVocabulary` adds its sentinels to the model as user-defined pieces, so a user who types
`<extra_id_0>` gets a sentinel id. Here the model that encodes has no sentinels, only the one that decodes.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import SupportsIndex

import seqio
import tensorflow as tf
import tensorflow_text as tf_text
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from t5x_like.data.corpora import FILES
from t5x_like.errors import UserError

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
