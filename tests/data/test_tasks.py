import functools
import importlib

import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_like.data import corpora, objectives, tasks
from t5x_like.data.vocabularies import byte_vocabulary, sentencepiece_vocabulary
from t5x_like.errors import UserError

LENGTHS = {"inputs": 512, "targets": 512}
TASKS = ["austen_span_corruption", "bible_en_es", "bible_es_en", "wordnet_supersense"]
MIXTURES = {
    "bible_translation": ["bible_en_es", "bible_es_en"],
    "quickstart": ["bible_en_es", "wordnet_supersense"],
}
PREFIXES = {
    "bible_en_es": "translate English to Spanish: ",
    "bible_es_en": "translate Spanish to English: ",
    "wordnet_supersense": "supersense: ",
}
Example = dict[str, np.ndarray | bytes]


def first(task: seqio.Task, split: str = "validation", count: int = 1) -> list[Example]:
    return list(task.get_dataset(LENGTHS, split, shuffle=False, seed=0).take(count).as_numpy_iterator())


def text(task: seqio.Task | seqio.Mixture, example: Example, feature: str) -> str:
    assert example[feature][-1] == 1  # EOS
    return task.output_features[feature].vocabulary.decode(example[feature])


@pytest.fixture
def empty_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seqio.TaskRegistry, "_REGISTRY", {})
    monkeypatch.setattr(seqio.MixtureRegistry, "_REGISTRY", {})


@pytest.mark.usefixtures("empty_registries")
def test_registration_survives_a_reset_and_a_second_import() -> None:
    assert tasks.get_task_or_mixture("bible_en_es").name == "bible_en_es"
    assert sorted(seqio.TaskRegistry.names()) == TASKS
    assert sorted(seqio.MixtureRegistry.names()) == sorted(MIXTURES)
    importlib.reload(tasks)
    seqio.TaskRegistry.reset()
    importlib.reload(tasks)
    assert sorted(seqio.TaskRegistry.names()) == TASKS


@pytest.mark.usefixtures("empty_registries")
def test_a_name_that_somebody_else_registered_first_stays_theirs() -> None:
    theirs = tasks.get_task_or_mixture("bible_en_es").replace(name="quickstart")
    seqio.MixtureRegistry.reset()
    seqio.TaskRegistry.add_provider("third_party", theirs)
    tasks.register()
    assert tasks.get_task_or_mixture("third_party") is theirs


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"named 'bible_en_sp'; the nearest: bible_en_es, bible_es_en"):
        tasks.get_task_or_mixture("bible_en_sp")
    with pytest.raises(UserError, match=r"nearest: .*austen_span_corruption, .*quickstart"):
        tasks.get_task_or_mixture("?")


@pytest.mark.parametrize(("name", "parts"), MIXTURES.items())
def test_mixtures_have_their_parts_at_equal_rates(name: str, parts: list[str]) -> None:
    mixture = tasks.get_task_or_mixture(name)
    assert [task.name for task in mixture.tasks] == parts
    assert [mixture.get_rate(task) for task in mixture.tasks] == [1.0, 1.0]
    examples = mixture.get_dataset(LENGTHS, "validation", seed=3, num_epochs=1).take(200).as_numpy_iterator()
    inputs = [text(mixture, example, "inputs") for example in examples]
    shares = [np.mean([line.startswith(PREFIXES[part]) for line in inputs]) for part in parts]
    assert sum(shares) == 1.0
    assert 0.4 < shares[0] < 0.6


@pytest.mark.parametrize("vocabulary", [sentencepiece_vocabulary(), byte_vocabulary()])
def test_examples_read_as_they_should_in_both_vocabularies(vocabulary: seqio.Vocabulary) -> None:
    expected = {
        "bible_en_es": ("{0.english}", "{0.spanish}", corpora.bible),
        "bible_es_en": ("{0.spanish}", "{0.english}", corpora.bible),
        "wordnet_supersense": ("{0.word}: {0.definition}", "{0.supersense}", corpora.wordnet),
    }
    for name, (inputs, targets, corpus) in expected.items():
        task = tasks.with_vocabulary(tasks.get_task_or_mixture(name), vocabulary)
        row, (example,) = corpus("validation")[0], first(task)
        inputs = PREFIXES[name] + inputs
        assert text(task, example, "inputs") == inputs.format(row)
        assert text(task, example, "targets") == targets.format(row)
        assert example["inputs_pretokenized"].decode() == inputs.format(row)
        assert example["targets_pretokenized"].decode() == targets.format(row)


@pytest.mark.parametrize("vocabulary", [sentencepiece_vocabulary(), byte_vocabulary()])
def test_austen_is_corrupted_in_reading_order(vocabulary: seqio.Vocabulary) -> None:
    task = tasks.with_vocabulary(tasks.get_task_or_mixture("austen_span_corruption"), vocabulary)
    paragraphs = corpora.austen("validation")[:40]
    tokens = [token for paragraph in paragraphs for token in vocabulary.encode(paragraph.text)]
    raw_length, _ = objectives.raw_length_and_targets(512)
    for i, example in enumerate(first(task, count=3)):
        assert (example["inputs"].size, example["targets"].size) == (512, 114)
        assert (example["inputs"][-1], example["targets"][-1]) == (1, 1)
        chunk = tokens[i * raw_length : (i + 1) * raw_length]
        noise = [token for token in example["targets"][:-1] if token < vocabulary.vocab_size - 100]
        kept = [token for token in example["inputs"][:-1] if token < vocabulary.vocab_size - 100]
        assert sorted(noise + kept) == sorted(chunk)
        assert kept[0] == chunk[0]


@pytest.mark.parametrize("name", ["bible_en_es", "austen_span_corruption"])
def test_shards_are_stretches_that_make_up_the_whole(name: str) -> None:
    source = tasks.get_task_or_mixture(name).source
    whole = list(source.get_dataset("validation", shuffle=False).as_numpy_iterator())
    parts = [
        list(source.get_dataset("validation", shuffle=False, shard_info=seqio.ShardInfo(i, 4)).as_numpy_iterator())
        for i in range(4)
    ]
    assert source.num_input_examples("validation") == len(whole)
    assert [row for part in parts for row in part] == whole
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(UserError, match="too few for 100000 shards"):
        source.get_dataset("validation", shard_info=seqio.ShardInfo(0, 100000))
    with pytest.raises(UserError, match="has 0 rows, too few for 1 shards"):
        tasks.CorpusSource(lambda split: (), ["train"]).get_dataset("train")


def test_shuffling_follows_the_seed_and_reaches_over_all_rows() -> None:
    source = tasks.CorpusSource(corpora.bible, ("train", "validation", "test"))

    def ids(seed: int) -> list[bytes]:
        return [row["id"] for row in source.get_dataset("validation", seed=seed).as_numpy_iterator()]

    in_order = [verse.id.encode() for verse in corpora.bible("validation")]
    assert ids(1) == ids(1) != ids(2)
    assert sorted(ids(1)) == sorted(in_order)
    moves = [abs(in_order.index(verse) - place) for place, verse in enumerate(ids(1))]
    assert np.mean(moves) > 0.25 * len(in_order)  # a third, on average, in a full shuffle
    austen = tasks.get_task_or_mixture("austen_span_corruption").source
    paragraphs = [row["text"] for row in austen.get_dataset("validation", shuffle=True, seed=1).as_numpy_iterator()]
    assert paragraphs == [paragraph.text.encode() for paragraph in corpora.austen("validation")]


@pytest.mark.parametrize("name", TASKS)
def test_whole_tasks_repeat_themselves_with_the_same_seed(name: str) -> None:
    def some(seed: int) -> list[list[int]]:
        dataset = tasks.get_task_or_mixture(name).get_dataset(LENGTHS, "validation", seed=seed)
        return [example["inputs"].tolist() for example in dataset.take(5).as_numpy_iterator()]

    assert some(5) == some(5) != some(6)


def test_each_task_is_judged_and_its_texts_are_stripped() -> None:
    judged = {name: tasks.get_task_or_mixture(name) for name in TASKS}
    found = {
        name: [metric.__name__ for metric in [*task.predict_metric_fns, *task.score_metric_fns]]
        for name, task in judged.items()
    }
    assert found == {
        "austen_span_corruption": ["log_likelihood"],
        "bible_en_es": ["bleu", "chrf"],
        "bible_es_en": ["bleu", "chrf"],
        "wordnet_supersense": ["accuracy"],
    }
    for name in TASKS[1:]:
        assert judged[name].postprocess_fn(" animal\n", example={}, is_target=False) == "animal"


def third_party_task(*, vocabulary: seqio.Vocabulary, task_class: type[seqio.Task] = seqio.Task) -> seqio.Task:
    def read(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        return tf.data.Dataset.from_tensors({"inputs": "ab", "targets": "c", "image": [0.5, 1.0]})

    return task_class(
        "third_party",
        source=seqio.FunctionDataSource(read, ["train"]),
        preprocessors=[
            functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos,
        ],
        output_features={
            "inputs": seqio.Feature(vocabulary, add_eos=False),
            "targets": seqio.Feature(vocabulary),
            "image": seqio.ContinuousFeature(seqio.PassThroughVocabulary(2), dtype=tf.float32),
        },
        metric_fns=[],
    )


def test_a_third_party_task_changes_its_text_vocabulary_only() -> None:
    original = third_party_task(vocabulary=seqio.SentencePieceVocabulary("nowhere.model"))
    changed = tasks.with_vocabulary(original, byte_vocabulary())
    (example,) = changed.get_dataset(None, "train", shuffle=False).as_numpy_iterator()
    assert example["inputs"].tolist() == [ord("a") + 3, ord("b") + 3]
    assert example["targets"].tolist() == [ord("c") + 3, 1]
    assert example["image"].tolist() == [0.5, 1.0]
    assert changed.output_features["image"] == original.output_features["image"]
    assert changed.name == "third_party"
    assert "third_party" not in seqio.TaskRegistry.names()
    assert original.supports_caching
    assert not changed.supports_caching  # the cache on disk has the old vocabulary's ids


def test_a_task_that_has_the_vocabulary_already_is_left_alone() -> None:
    task = third_party_task(vocabulary=byte_vocabulary())
    assert tasks.with_vocabulary(task, byte_vocabulary()) is task


def test_a_subclass_of_task_is_refused_rather_than_flattened() -> None:
    class FancyTask(seqio.Task):
        pass

    task = third_party_task(vocabulary=byte_vocabulary(), task_class=FancyTask)
    with pytest.raises(UserError, match="task 'third_party' is a FancyTask"):
        tasks.with_vocabulary(task, sentencepiece_vocabulary())
