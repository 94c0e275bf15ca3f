"""Files of inputs as seqio tasks, so that inference reads a user's own text as it reads any task."""

import csv
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import seqio
import tensorflow as tf

from t5x_like.data import texts
from t5x_like.data.packing import FeatureConverter
from t5x_like.data.sources import CorpusSource
from t5x_like.errors import UserError

SPLIT = "all"


class TextRow(NamedTuple):
    """An input as the model was trained on, prefix included, and its target where the file knows it."""

    inputs: str
    targets: str


def task(path: str | Path, features: Mapping[str, seqio.Feature], converter: FeatureConverter) -> seqio.Task:
    """An unregistered task with the rows of a `.txt`, `.tsv` or `.jsonl` file in its split `SPLIT`, in order.

    Args:
      path: `.txt`, an input a line; `.tsv`, input TAB target; `.jsonl`, objects with `inputs` and perhaps `targets`.
      features: as the model's own tasks have them.
      converter: the model's, which says what it reads of a text.

    Raises:
      UserError: no such file, another ending, or a line that cannot be read (named by its number).
    """
    rows = read_rows(path)
    return seqio.Task(
        f"file_{Path(path).stem}",
        source=CorpusSource(lambda split: rows, (SPLIT,), shuffled=False),
        preprocessors=[functools.partial(_encode, converter=converter)],
        output_features=dict(features),
        shuffle_buffer_size=None,
    )


def _encode(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    output_features: Mapping[str, seqio.Feature],
    converter: FeatureConverter,
) -> tf.data.Dataset:
    """Rows to what `converter` reads; inputs that are too long keep their last token, which ends them."""
    vocabularies = texts.Vocabularies(output_features["inputs"].vocabulary, output_features["targets"].vocabulary)
    names, room = tuple(output_features), sequence_length["inputs"]

    def encode(inputs: bytes, targets: bytes) -> list[np.ndarray]:
        example = texts.example(converter, inputs.decode(), targets.decode(), vocabularies)
        tokens = example["inputs"]
        cut = tokens if len(tokens) <= room else np.concatenate([tokens[: room - 1], tokens[-1:]])
        example = {**example, "inputs": cut}
        return [example.get(name, np.zeros(0, np.int32)) for name in names]

    def row(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        pair = [example["inputs"], example["targets"]]
        vectors = tf.numpy_function(encode, pair, [tf.int32] * len(names))
        for vector in vectors:
            vector.set_shape([None])
        kept = {f"{name}_pretokenized": example[name] for name in ("inputs", "targets")}
        return kept | dict(zip(names, vectors, strict=True))

    return dataset.map(row)


def read_rows(path: str | Path) -> list[TextRow]:
    """The rows of a file; see `task`."""
    path = Path(path)
    if path.suffix not in _READERS:
        raise UserError(
            f"{path}: cannot read {path.suffix or 'a file without an ending'}; use one of {', '.join(_READERS)}"
        )
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(_READERS[path.suffix](str(path), file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error.strerror if isinstance(error, OSError) else 'is not UTF-8 text'}") from error
    if not rows:
        raise UserError(f"{path}: is empty")
    return rows


def _text(path: str, lines: Iterator[str]) -> Iterator[TextRow]:
    for line in lines:
        yield TextRow(line.rstrip("\r\n"), "")


def _tsv(path: str, lines: Iterator[str]) -> Iterator[TextRow]:
    for number, columns in enumerate(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
        if len(columns) not in (1, 2):
            raise UserError(f"{path}:{number}: {len(columns)} columns; a row is `input TAB target`, or the input alone")
        yield TextRow(columns[0], columns[1] if len(columns) == 2 else "")


def _jsonl(path: str, lines: Iterator[str]) -> Iterator[TextRow]:
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            yield TextRow(_string(row["inputs"]), _string(row.get("targets", "")))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f'{path}:{number}: not an object like {{"inputs": "text", "targets": "text"}}') from error


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


_READERS: dict[str, Callable[[str, Iterator[str]], Iterator[TextRow]]] = {
    ".txt": _text,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
}
