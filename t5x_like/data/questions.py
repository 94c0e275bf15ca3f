"""Questions made of the corpora in plain Python, whose answers need no annotator: the same ones on every run."""

import functools
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from t5x_like.data.corpora import Sense, bible, wordnet

MARKS = ("none", "comma", "period", "semicolon", "colon", "question", "exclamation")
"""What may follow a word."""

LETTERS = ("A", "B", "C", "D")

_MARKS = dict(zip(",.;:?!", MARKS[1:], strict=True))


class Punctuated(NamedTuple):
    """Words in lower case without their punctuation, and for each of them one of `MARKS`; both joined by spaces."""

    inputs: str
    targets: str


class SpanQuestion(NamedTuple):
    """A question, and a passage in three parts: the second is the answer."""

    question: str
    before: str
    answer: str
    after: str


class DefinitionChoice(NamedTuple):
    """A noun and four definitions; `targets` says which is its own, by one of `LETTERS`."""

    question: str
    choices: tuple[str, ...]
    targets: str


@functools.cache
def punctuated(split: str) -> tuple[Punctuated, ...]:
    """Every English verse of the Bible; see `punctuate`."""
    return tuple(punctuate(verse.english) for verse in bible(split))


def punctuate(text: str) -> Punctuated:
    """Takes punctuation and capitals away and says what punctuation there was; quotes and dashes do not count."""
    words, marks = [], []
    for token in text.replace("—", " ").split():
        word = re.search(r"\w(.*\w)?", token)
        if word:
            rest = token[word.end() :].lstrip("\u201d\u2019\"')")  # closing quotes and brackets
            words.append(word[0].lower())
            marks.append(_MARKS.get(rest[:1], "none"))
    return Punctuated(" ".join(words), " ".join(marks))


@functools.cache
def class_members(split: str) -> tuple[SpanQuestion, ...]:
    """For every noun sense: which of four nouns, defined, is of its class? The other three are of other classes.

    The question is the class, `food`; the passage `oak: a deciduous tree; pie: ...`; the answer a noun.
    """
    senses, questions = wordnet(split), []
    for sense in senses:
        others = itertools.islice((other for other in _draws(sense, senses) if other.supersense != sense.supersense), 3)
        lines = [f"{other.word}: {other.definition}" for other in others]
        place = _number(f"place of {sense}", 4)
        before, after = ("".join(f"{line}; " for line in part) for part in (lines[:place], lines[place:]))
        questions.append(SpanQuestion(sense.supersense, before, sense.word, f": {sense.definition}; {after}"))
    return tuple(questions)


@functools.cache
def definition_choices(split: str) -> tuple[DefinitionChoice, ...]:
    """For every noun sense: which of four definitions is its own? The others are of other words."""
    senses, choices = wordnet(split), []
    for sense in senses:
        definitions = [sense.definition]
        for other in _draws(sense, senses):
            if other.word != sense.word and other.definition not in definitions:
                definitions.append(other.definition)
            if len(definitions) == len(LETTERS):
                break
        place = _number(f"place of {sense}", len(LETTERS))
        definitions.insert(place, definitions.pop(0))
        choices.append(DefinitionChoice(sense.word, tuple(definitions), LETTERS[place]))
    return tuple(choices)


def _draws(sense: Sense, senses: Sequence[Sense]) -> Iterator[Sense]:
    """Other senses, endlessly."""
    for number in itertools.count():
        yield senses[_number(f"{number} for {sense}", len(senses))]


def _number(key: str, below: int) -> int:
    """A number that looks random, and is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) % below
