import itertools
from collections import Counter

from t5x_like.data import corpora, questions


def test_punctuation_is_taken_away_and_told() -> None:
    text = "God said, “Let there be light,” and there was light. Who—is first-born? “Woe!”; (Selah) 12: the LORD's"
    assert questions.punctuate(text) == (
        "god said let there be light and there was light who is first-born woe selah 12 the lord's",
        "none comma none none none comma none none none period none none question exclamation none colon none none",
    )
    assert questions.punctuate(" — ") == ("", "")


def test_every_verse_has_as_many_marks_as_words() -> None:
    rows = questions.punctuated("validation")
    assert len(rows) == len(corpora.bible("validation"))
    assert all(len(row.inputs.split()) == len(row.targets.split()) > 0 for row in rows)
    assert {mark for row in rows for mark in row.targets.split()} == set(questions.MARKS)


def test_one_of_four_nouns_is_of_the_class() -> None:
    senses = corpora.wordnet("validation")
    definitions: dict[str, set[str]] = {}
    for sense in senses:
        definitions.setdefault(f"{sense.word}: {sense.definition}; ", set()).add(sense.supersense)
    rows = questions.class_members("validation")
    assert len(rows) == len(senses)
    for sense, row in itertools.islice(zip(senses, rows, strict=True), 200):
        assert (row.question, row.answer) == (sense.supersense, sense.word)
        passage = row.before + row.answer + row.after
        own = f"{sense.word}: {sense.definition}; "
        assert own in passage
        lines = [line for line in definitions if line in passage]
        assert 3 <= len(lines) <= 5  # the same one twice, or one at the end of another, is rare
        assert all(row.question not in definitions[line] for line in lines if line != own and passage.find(line) >= 0)
    places = Counter(row.before.count("; ") > 0 for row in rows)
    assert 0.2 < places[False] / len(rows) < 0.3  # a quarter comes first


def test_one_of_four_definitions_is_the_word_s_own() -> None:
    senses, rows = corpora.wordnet("validation"), questions.definition_choices("validation")
    for sense, row in zip(senses, rows, strict=True):
        assert row.question == sense.word
        assert len(set(row.choices)) == 4
        assert row.choices["ABCD".index(row.targets)] == sense.definition
    shares = Counter(row.targets for row in rows)
    assert all(abs(count / len(rows) - 0.25) < 0.03 for count in shares.values())


def test_questions_never_change() -> None:
    """Another draw would make numbers measured before and after it incomparable."""
    choice, span = questions.definition_choices("test")[0], questions.class_members("test")[1]
    assert (choice.question, choice.targets) == ("waxwing", "C")
    assert choice.choices[0] == "an athlete who plays baseball"
    assert (span.question, span.answer, span.before) == (
        "time",
        "week",
        "folly: the quality of being rash and foolish; ",
    )
