"""The corpora shipped inside the package, as plain Python rows. Sources and licences: files/NOTICE.md."""

import functools
import hashlib
import lzma
from pathlib import Path
from typing import NamedTuple

from t5x_like.errors import UserError

FILES = Path(__file__).parent / "files"

SUPERSENSES = (
    *("Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling"),
    *("food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process"),
    *("quantity", "relation", "shape", "state", "substance", "time"),
)
"""WordNet's 26 classes of nouns."""


class Paragraph(NamedTuple):
    """A paragraph of a novel."""

    text: str


class Verse(NamedTuple):
    """One verse in both languages; `id` is book.chapter.verse, e.g. `Gen.1.1`."""

    id: str
    english: str
    spanish: str


class Sense(NamedTuple):
    """One sense of an English noun: its definition, and its class among 26 (`animal`, `food`, ...)."""

    word: str
    definition: str
    supersense: str


@functools.cache
def austen(split: str) -> tuple[Paragraph, ...]:
    """Jane Austen's six novels in reading order; every 20th paragraph is held out.

    Args:
        split: `train` or `validation`.

    Raises:
        UserError: if there is no such split.
    """
    _check_split("austen", split, ("train", "validation"))
    held_out = split == "validation"
    lines = _read_lines("austen.txt.xz")
    return tuple(Paragraph(line) for i, line in enumerate(lines) if (i % 20 == 19) == held_out)


@functools.cache
def bible(split: str) -> tuple[Verse, ...]:
    """The Bible in English and Spanish, verse by verse; chapters are never divided between splits.

    Args:
        split: `train`, `validation` or `test`.

    Raises:
        UserError: if there is no such split.
    """
    _check_split("bible", split, ("train", "validation", "test"))
    name = "valid" if split == "validation" else split
    return tuple(Verse(*line.split("\t")) for line in _read_lines(f"bible_en_es.{name}.tsv.xz"))


@functools.cache
def wordnet(split: str) -> tuple[Sense, ...]:
    """WordNet's noun senses; a hash of the word alone decides the split, so that no word is in two of them.

    Args:
        split: `train` (about 90 %), `validation` (5 %) or `test` (5 %).

    Raises:
        UserError: if there is no such split.
    """
    _check_split("wordnet", split, ("train", "validation", "test"))
    senses = []
    for line in _read_lines("wordnet_noun_supersense.tsv.xz"):
        label, text = line.split("\t")
        word, definition = text.split(": ", 1)
        if _split_of_word(word) == split:
            senses.append(Sense(word, definition, label.removeprefix("noun.")))
    return tuple(senses)


def _split_of_word(word: str) -> str:
    """`Turkey` and `turkey` are one word here: a model that saw the one has half seen the other."""
    digest = hashlib.sha256(word.casefold().encode()).digest()
    return {0: "test", 1: "validation"}.get(int.from_bytes(digest[:8], "big") % 20, "train")


def _read_lines(name: str) -> list[str]:
    with lzma.open(FILES / name, "rt", encoding="utf-8") as file:
        return file.read().splitlines()


def _check_split(corpus: str, split: str, splits: tuple[str, ...]) -> None:
    if split not in splits:
        raise UserError(f"corpus {corpus!r} has no split {split!r}; it has {', '.join(splits)}")
