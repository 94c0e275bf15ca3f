import functools
import importlib
import itertools

import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_like.data import corpora
from t5x_like.data.features import (
    ClassificationFeatures,
    DecoderFeatures,
    MaskedLMFeatures,
    MultipleChoiceFeatures,
    PermutationFeatures,
    TokenLabelFeatures,
)
from t5x_like.data.loader import DatasetConfig, TrainLoader, eval_batches
from t5x_like.data.objectives import span_corruption
from t5x_like.data.packing import FeatureConverter
from t5x_like.data.sources import CorpusSource
from t5x_like.data.tasks import registry
from t5x_like.data.tasks.encoder import labels_of_words
from t5x_like.data.vocabularies import byte_vocabulary, sentencepiece_vocabulary
from t5x_like.errors import UserError

LENGTHS = {"inputs": 512, "targets": 512}
TASKS = ["austen_span_corruption", "bible_en_es", "bible_es_en", "wordnet_supersense"]  # text to text
LABELS = ClassificationFeatures()
OTHERS: dict[str, tuple[FeatureConverter, dict[str, int], str]] = {  # with what they are read by, and judged by
    "austen_masked_lm": (MaskedLMFeatures(next_sentence=True), {"inputs": 64, "targets": 10}, "log_likelihood"),
    "austen_whole_word_masked_lm": (
        MaskedLMFeatures(next_sentence=True),
        {"inputs": 64, "targets": 10},
        "log_likelihood",
    ),
    "austen_full_sentences": (MaskedLMFeatures(), {"inputs": 64, "targets": 10}, "log_likelihood"),
    "austen_causal_lm": (DecoderFeatures(), {"inputs": 0, "targets": 64}, "log_likelihood"),
    "austen_prefix_lm": (DecoderFeatures(), {"inputs": 32, "targets": 32}, "log_likelihood"),
    "austen_permutation_lm": (PermutationFeatures(), {"inputs": 64, "targets": 10}, "log_likelihood"),
    "wordnet_supersense_label": (LABELS, {"inputs": 64, "targets": 1}, "accuracy"),
    "bible_punctuation": (TokenLabelFeatures(), {"inputs": 72, "targets": 52}, "label_accuracy"),
    "wordnet_class_member": (LABELS, {"inputs": 224, "targets": 2}, "span_f1"),
    "wordnet_definition_choice": (MultipleChoiceFeatures(), {"inputs": 4 * 80, "targets": 1}, "accuracy"),
}
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
    assert registry.get_task_or_mixture("bible_en_es").name == "bible_en_es"
    assert sorted(seqio.TaskRegistry.names()) == sorted([*TASKS, *OTHERS])
    assert sorted(seqio.MixtureRegistry.names()) == sorted(MIXTURES)
    importlib.reload(registry)
    seqio.TaskRegistry.reset()
    importlib.reload(registry)
    assert sorted(seqio.TaskRegistry.names()) == sorted([*TASKS, *OTHERS])


@pytest.mark.usefixtures("empty_registries")
def test_a_name_that_somebody_else_registered_first_stays_theirs() -> None:
    theirs = registry.get_task_or_mixture("bible_en_es").replace(name="quickstart")
    seqio.MixtureRegistry.reset()
    seqio.TaskRegistry.add_provider("third_party", theirs)
    registry.register()
    assert registry.get_task_or_mixture("third_party") is theirs


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"named 'bible_en_sp'; the nearest: bible_en_es, bible_es_en"):
        registry.get_task_or_mixture("bible_en_sp")
    with pytest.raises(UserError, match=r"nearest: .*austen_span_corruption, .*quickstart"):
        registry.get_task_or_mixture("?")


@pytest.mark.parametrize(("name", "parts"), MIXTURES.items())
def test_mixtures_have_their_parts_at_equal_rates(name: str, parts: list[str]) -> None:
    mixture = registry.get_task_or_mixture(name)
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
        task = registry.with_vocabulary(registry.get_task_or_mixture(name), vocabulary)
        row, (example,) = corpus("validation")[0], first(task)
        inputs = PREFIXES[name] + inputs
        assert text(task, example, "inputs") == inputs.format(row)
        assert text(task, example, "targets") == targets.format(row)
        assert example["inputs_pretokenized"].decode() == inputs.format(row)
        assert example["targets_pretokenized"].decode() == targets.format(row)


@pytest.mark.parametrize("vocabulary", [sentencepiece_vocabulary(), byte_vocabulary()])
def test_austen_is_corrupted_in_reading_order(vocabulary: seqio.Vocabulary) -> None:
    task = registry.with_vocabulary(registry.get_task_or_mixture("austen_span_corruption"), vocabulary)
    paragraphs = corpora.austen("validation")[:40]
    tokens = [token for paragraph in paragraphs for token in vocabulary.encode(paragraph.text)]
    raw_length, _ = span_corruption.raw_length_and_targets(512)
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
    source = registry.get_task_or_mixture(name).source
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
        CorpusSource(lambda split: (), ["train"]).get_dataset("train")


def test_shuffling_follows_the_seed_and_reaches_over_all_rows() -> None:
    source = CorpusSource(corpora.bible, ("train", "validation", "test"))

    def ids(seed: int) -> list[bytes]:
        return [row["id"] for row in source.get_dataset("validation", seed=seed).as_numpy_iterator()]

    in_order = [verse.id.encode() for verse in corpora.bible("validation")]
    assert ids(1) == ids(1) != ids(2)
    assert sorted(ids(1)) == sorted(in_order)
    moves = [abs(in_order.index(verse) - place) for place, verse in enumerate(ids(1))]
    assert np.mean(moves) > 0.25 * len(in_order)  # a third, on average, in a full shuffle
    austen = registry.get_task_or_mixture("austen_span_corruption").source
    paragraphs = [row["text"] for row in austen.get_dataset("validation", shuffle=True, seed=1).as_numpy_iterator()]
    assert paragraphs == [paragraph.text.encode() for paragraph in corpora.austen("validation")]


@pytest.mark.parametrize("name", TASKS)
def test_whole_tasks_repeat_themselves_with_the_same_seed(name: str) -> None:
    def some(seed: int) -> list[list[int]]:
        dataset = registry.get_task_or_mixture(name).get_dataset(LENGTHS, "validation", seed=seed)
        return [example["inputs"].tolist() for example in dataset.take(5).as_numpy_iterator()]

    assert some(5) == some(5) != some(6)


def test_each_task_is_judged_and_its_texts_are_stripped() -> None:
    judged = {name: registry.get_task_or_mixture(name) for name in [*TASKS, *OTHERS]}
    found = {
        name: [metric.__name__ for metric in [*task.predict_metric_fns, *task.score_metric_fns]]
        for name, task in judged.items()
    }
    assert found == {
        "austen_span_corruption": ["log_likelihood"],
        "bible_en_es": ["bleu", "chrf"],
        "bible_es_en": ["bleu", "chrf"],
        "wordnet_supersense": ["accuracy"],
        **{name: [metric] for name, (_, _, metric) in OTHERS.items()},
    }
    for name in TASKS[1:]:
        assert judged[name].postprocess_fn(" animal\n", example={}, is_target=False) == "animal"


def read(name: str, vocabulary: seqio.Vocabulary) -> tuple[DatasetConfig, FeatureConverter]:
    converter, lengths, _ = OTHERS[name]
    shuffle = not name.startswith("austen")  # which would read the whole novels first
    return DatasetConfig(name, lengths, 4, "validation", shuffle, seed=3, vocabulary=vocabulary), converter


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_task_is_read_and_goes_on_where_it_stopped(name: str) -> None:
    loader = TrainLoader(*read(name, sentencepiece_vocabulary()))
    (first, _), (second, position), (third, _) = itertools.islice(loader.batches(), 3)
    ((resumed, _),) = itertools.islice(loader.batches(position), 1)
    assert first.keys() == third.keys() == resumed.keys()
    for key, array in third.items():
        np.testing.assert_array_equal(resumed[key], array, err_msg=key)
    weights = "decoder_loss_weights" if "decoder_loss_weights" in first else "target_weights"
    for batch in (first, second):
        assert batch[weights].any(axis=1).all()  # every row has something to predict


@pytest.mark.parametrize("name", OTHERS)
def test_targets_are_what_an_evaluation_counts_and_shows(name: str) -> None:
    """Perplexity is per token of `targets`: as many as have a weight; and they decode with their vocabulary."""
    vocabulary = byte_vocabulary() if name in ("austen_causal_lm", "wordnet_supersense_label") else None
    settings, converter = read(name, vocabulary or sentencepiece_vocabulary())
    task = registry.get_task_or_mixture(name)
    if vocabulary is not None:
        task = registry.with_vocabulary(task, vocabulary)
        assert task.output_features["inputs"].vocabulary == vocabulary
    batch = next(eval_batches(settings, task, converter))
    weights = batch.batch["decoder_loss_weights" if "decoder_loss_weights" in batch.batch else "target_weights"]
    assert weights.sum(axis=1).tolist() == [len(example["targets"]) for example in batch.examples]
    for example in batch.examples:
        assert task.output_features["targets"].vocabulary.decode(example["targets"].tolist())


def test_labels_and_positions_keep_their_vocabularies() -> None:
    for name in ("wordnet_supersense_label", "bible_punctuation", "austen_masked_lm", "wordnet_class_member"):
        task = registry.get_task_or_mixture(name)
        changed = registry.with_vocabulary(task, byte_vocabulary())
        different = {key for key, feature in changed.output_features.items() if feature != task.output_features[key]}
        assert different == ({"inputs", "targets"} if name == "austen_masked_lm" else {"inputs"})


def test_labelled_examples_by_hand() -> None:
    def example(name: str) -> Example:
        task = registry.get_task_or_mixture(name)
        return next(task.get_dataset(OTHERS[name][1], "validation", shuffle=False).as_numpy_iterator())

    encode = sentencepiece_vocabulary().encode
    sense, verse = corpora.wordnet("validation")[0], corpora.bible("validation")[0]
    found = example("wordnet_supersense_label")
    assert found["inputs"].tolist() == [8098, *encode(f"{sense.word}: {sense.definition}"), 1]
    assert corpora.SUPERSENSES[found["targets"][0]] == found["targets_pretokenized"].decode() == sense.supersense
    known = {sense.supersense for split in ("validation", "test") for sense in corpora.wordnet(split)}
    assert known == set(corpora.SUPERSENSES)
    assert len(corpora.SUPERSENSES) == 26

    found = example("wordnet_class_member")
    first, last = found["targets"]
    assert found["inputs"][first : last + 1].tolist() == encode(sense.word)
    found = example("wordnet_definition_choice")
    right = found["inputs"].reshape(4, 80)[found["targets"][0]]
    assert right[right != 0].tolist() == [8098, *encode(sense.word), 1, *encode(sense.definition), 1]

    found = example("bible_punctuation")
    words = [word.strip("“\u2018\u2019”,.?!;:").lower() for word in verse.english.split()]
    assert sentencepiece_vocabulary().decode(found["inputs"][1:-1].tolist()) == " ".join(words)
    assert found["targets"].size == len(words)


def test_labels_of_words_are_picked_from_those_of_tokens() -> None:
    example = {"target_positions": np.array([1, 3])}
    assert labels_of_words("none comma none period none", example, is_target=False) == ["comma", "period"]
    assert labels_of_words("comma period", example, is_target=True) == ["comma", "period"]


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
    changed = registry.with_vocabulary(original, byte_vocabulary())
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
    assert registry.with_vocabulary(task, byte_vocabulary()) is task


def test_a_subclass_of_task_is_refused_rather_than_flattened() -> None:
    class FancyTask(seqio.Task):
        pass

    task = third_party_task(vocabulary=byte_vocabulary(), task_class=FancyTask)
    with pytest.raises(UserError, match="task 'third_party' is a FancyTask"):
        registry.with_vocabulary(task, sentencepiece_vocabulary())
