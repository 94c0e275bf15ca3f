import lzma
import stat
from collections.abc import Callable

import pytest

from t5x_like.data import corpora
from t5x_like.errors import UserError


def test_austen_holds_out_every_twentieth_paragraph() -> None:
    lines = lzma.decompress((corpora.FILES / "austen.txt.xz").read_bytes()).decode().split("\n")
    train, validation = corpora.austen("train"), corpora.austen("validation")
    assert (len(train), len(validation)) == (8943, 470)
    assert train[0].text.startswith("Emma Woodhouse, handsome, clever, and rich,")
    assert [paragraph.text for paragraph in validation[:2]] == [lines[19], lines[39]]
    assert [paragraph.text for paragraph in train[17:21]] == [lines[17], lines[18], lines[20], lines[21]]


def test_bible_has_the_given_splits_and_no_chapter_in_two_of_them() -> None:
    splits = {split: corpora.bible(split) for split in ("train", "validation", "test")}
    assert {split: len(verses) for split, verses in splits.items()} == {
        "train": 27932,
        "validation": 1482,
        "test": 1579,
    }
    assert splits["train"][2] == corpora.Verse(
        "Gen.1.3",
        "God said, “Let there be light,” and there was light.",
        "Y dijo Dios: Sea la luz: y fué la luz.",
    )
    chapters = [{verse.id.rpartition(".")[0] for verse in verses} for verses in splits.values()]
    assert len(set.union(*chapters)) == sum(len(found) for found in chapters)


def test_wordnet_has_no_word_in_two_splits() -> None:
    splits = {split: corpora.wordnet(split) for split in ("train", "validation", "test")}
    words = [{sense.word.casefold() for sense in senses} for senses in splits.values()]
    assert len(set.union(*words)) == sum(len(found) for found in words)
    sizes = {split: len(senses) for split, senses in splits.items()}
    assert sizes == {"train": 73935, "validation": 4068, "test": 4111}  # the hash must never change
    assert len({sense.supersense for sense in splits["train"]}) == 26
    highness = corpora.Sense("highness", "the quality of being high or lofty", "attribute")
    assert highness in splits["train"][:10]


@pytest.mark.parametrize("corpus", [corpora.austen, corpora.bible, corpora.wordnet])
def test_an_unknown_split_is_named_with_the_known_ones(corpus: Callable[[str], tuple]) -> None:
    with pytest.raises(UserError, match="no split 'dev'; it has train, validation"):
        corpus("dev")


def test_every_file_can_be_read_by_all_and_is_in_the_notice() -> None:
    notice = (corpora.FILES / "NOTICE.md").read_text(encoding="utf-8")
    for path in corpora.FILES.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        name = path.name.replace(".test.", ".{train,valid,test}.").replace(".valid.", ".{train,valid,test}.")
        assert path.name == "NOTICE.md" or name.replace(".train.", ".{train,valid,test}.") in notice
    assert "WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved." in notice
    assert "LICENSEE agrees to preserve same." in notice
    assert '"World English Bible" is a trademark' in notice
