"""The data order is a function of the configuration alone: nothing is lost, repeated or carried along."""

import dataclasses
import gc
import inspect
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_like.data import loader
from t5x_like.data.features import ClassificationFeatures, DecoderFeatures
from t5x_like.data.loader import DatasetConfig, EvalBatch, Position, TrainLoader, eval_batches, prefetch
from t5x_like.data.packing import EncoderDecoderFeatures
from t5x_like.data.vocabularies import numbers_vocabulary
from t5x_like.errors import UserError

CONVERTER = EncoderDecoderFeatures()
LENGTHS = {"inputs": 16, "targets": 12}
FEATURES = {name: seqio.Feature(seqio.PassThroughVocabulary(10**6), add_eos=False) for name in ("inputs", "targets")}


def rows_of(first_id: int, count: int) -> Callable[..., tf.data.Dataset]:
    """A source of `count` ids, whose order depends on the seed alone."""

    def read(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        ids = np.arange(first_id, first_id + count)
        if shuffle_files:
            np.random.default_rng(seed).shuffle(ids)
        return tf.data.Dataset.from_tensor_slices({"id": ids.astype(np.int32)})

    return read


@seqio.map_over_dataset(num_seeds=2)
def corrupt(example: dict[str, tf.Tensor], seeds: tf.Tensor) -> dict[str, tf.Tensor]:
    """Noise like span corruption's: random lengths of inputs and targets, and random tokens after the id."""
    sizes = tf.random.stateless_uniform([2], seeds[0], 1, 11, tf.int32)
    noise = tf.random.stateless_uniform([11], seeds[1], 1, 2**31 - 1, tf.int32)
    head = tf.reshape(example["id"], [1])
    inputs, targets = (tf.concat([head, noise[:size]], 0) for size in tf.unstack(sizes))
    return {"inputs": inputs, "targets": targets}


@seqio.map_over_dataset
def plain(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """`id % 4 + 1` tokens of inputs, then padding; two of targets."""
    inputs = tf.pad(tf.repeat(example["id"], example["id"] % 4 + 1), [[0, 3]])
    return {"inputs": inputs, "targets": tf.stack([example["id"], 1]), "id": example["id"]}


class PadsWithOne(seqio.PassThroughVocabulary):
    """As RoBERTa's: its 0 starts a text."""

    @property
    def pad_id(self) -> int:
        return 1


class Subclass(seqio.Task):
    """What a third party may register; `seqio.Task.replace` would lose its class."""


def add_task(name: str, read: Callable[..., tf.data.Dataset], *preprocessors: Callable[..., object]) -> None:
    source = seqio.FunctionDataSource(read, splits=["train", "validation"])
    seqio.TaskRegistry.add(name, source, FEATURES, list(preprocessors), shuffle_buffer_size=5)


def add_mixture(name: str, rates: dict[str, float]) -> None:
    seqio.MixtureRegistry.add(name, list(rates.items()))


add_task("loader_a", rows_of(1000, 120), corrupt)
add_task("loader_b", rows_of(2000, 60), corrupt)
add_task("loader_37", rows_of(1000, 37), corrupt)
add_task("loader_plain", rows_of(1, 7), plain)
add_task("loader_long", rows_of(10**4, 10**5), plain)
add_task("loader_longer", rows_of(5 * 10**5, 10**5), plain)
add_task("loader_empty", lambda split, shuffle_files, seed=None: rows_of(0, 0)(split, False), plain)
seqio.TaskRegistry.add_provider(
    "loader_subclass",
    Subclass("loader_subclass", seqio.FunctionDataSource(rows_of(1000, 37), ["train"]), FEATURES, [corrupt]),
)
add_mixture("loader_mixture", {"loader_a": 2, "loader_b": 1})
add_mixture("loader_rates_inner", {"loader_long": 1, "loader_longer": 3})
add_mixture("loader_rates", {"loader_long": 1, "loader_rates_inner": 1})


def config(name: str, batch_size: int = 8, lengths: dict[str, int] = LENGTHS) -> DatasetConfig:
    return DatasetConfig(name, lengths, batch_size)


MIXED = dataclasses.replace(config("loader_mixture"), pack=True, num_shards=2, seed=3)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 20 examples: a few batches then cross blocks and epochs."""
    monkeypatch.setattr(loader, "BLOCK", 20)


def take(
    settings: DatasetConfig, count: int, position: Position | None = None, process: tuple[int, int] = (0, 1)
) -> list[tuple[dict[str, np.ndarray], Position]]:
    batches = TrainLoader(settings, CONVERTER, *process).batches(position)
    return list(itertools.islice(batches, count))


def assert_same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_unshuffled_batches_by_hand() -> None:
    settings = dataclasses.replace(config("loader_plain", 4, {"inputs": 4, "targets": 3}), shuffle=False)
    (first, _), (second, _) = take(settings, 2)
    np.testing.assert_array_equal(
        first["encoder_input_tokens"], [[1, 1, 0, 0], [2, 2, 2, 0], [3, 3, 3, 3], [4, 0, 0, 0]]
    )
    np.testing.assert_array_equal(first["decoder_input_tokens"], [[0, 1, 1], [0, 2, 1], [0, 3, 1], [0, 4, 1]])
    np.testing.assert_array_equal(second["decoder_target_tokens"], [[5, 1, 0], [6, 1, 0], [7, 1, 0], [1, 1, 0]])
    assert "decoder_segment_ids" not in first


def test_packed_rows_by_hand_leave_out_the_padding_that_a_task_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "BLOCK", 7)
    settings = DatasetConfig("loader_plain", {"inputs": 7, "targets": 6}, 3, shuffle=False, pack=True)
    [(batch, position)] = take(settings, 1)  # inputs of 2, 3, 4, 1, 2, 3 and 4 tokens, targets of 2 each
    np.testing.assert_array_equal(
        batch["encoder_input_tokens"], [[1, 1, 2, 2, 2, 4, 0], [3, 3, 3, 3, 5, 5, 0], [6, 6, 6, 7, 7, 7, 7]]
    )
    np.testing.assert_array_equal(
        batch["decoder_segment_ids"], [[1, 1, 2, 2, 3, 3], [1, 1, 2, 2, 0, 0], [1, 1, 2, 2, 0, 0]]
    )
    assert position == {"0": {"block": 0, "row": 3, "tasks": {"loader_plain": [0, 0]}}}


def test_zeros_at_the_end_are_padding_only_where_the_vocabulary_says_so() -> None:
    number = seqio.Feature(numbers_vocabulary(9), add_eos=False)
    roberta = seqio.Feature(PadsWithOne(9), add_eos=False)
    examples = [([5, 0, 1, 1], [3, 0], [0, 0, 1]), ([5, 6, 7, 8], [0, 0], [0, 1, 1])]
    names = ("inputs", "targets", "segment_ids")
    rows = tf.data.Dataset.from_generator(
        lambda: (dict(zip(names, row, strict=True)) for row in examples),
        output_signature={name: tf.TensorSpec([None], tf.int32) for name in names},
    )
    source = seqio.FunctionDataSource(lambda split, shuffle_files: rows, ["train"])
    features = {"inputs": roberta, "targets": number, "segment_ids": number}
    seqio.TaskRegistry.add("loader_zeros", source, features, [])
    settings = DatasetConfig("loader_zeros", {"inputs": 5, "targets": 3}, 2, shuffle=False)
    batch, _ = next(TrainLoader(settings, ClassificationFeatures(pad_id=1)).batches())
    np.testing.assert_array_equal(batch["encoder_input_tokens"], [[5, 0, 1, 1, 1], [5, 6, 7, 8, 1]])
    np.testing.assert_array_equal(batch["target_tokens"], [[3, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(batch["target_weights"], [[1, 1, 0], [1, 1, 0]])
    np.testing.assert_array_equal(batch["segment_ids"], [[0, 0, 1, 0, 0], [0, 1, 1, 0, 0]])
    evaluated = next(eval_batches(settings, seqio.TaskRegistry.get("loader_zeros"), ClassificationFeatures(pad_id=1)))
    assert_same(evaluated.batch, batch)


@pytest.mark.parametrize("name", ["loader_37", "loader_subclass"])
def test_in_every_epoch_the_shards_share_all_examples_without_overlap(name: str) -> None:
    settings = dataclasses.replace(config(name, 3), num_shards=3)
    batches = [batch for batch, _ in take(settings, 27)]
    shards = [[batch["encoder_input_tokens"][shard] for batch in batches] for shard in range(3)]
    everything = list(range(1000, 1037))
    sizes = (13, 12, 12)  # of 37 examples
    first = [row[0] for shard, n in zip(shards, sizes, strict=True) for row in shard[:n]]
    second = [row[0] for shard, n in zip(shards, sizes, strict=True) for row in shard[n : 2 * n]]
    assert sorted(first) == sorted(second) == everything
    assert first != everything
    assert first != second


def test_shards_and_epochs_draw_different_noise() -> None:
    settings = dataclasses.replace(config("loader_a", 3), num_shards=3)
    rows = np.concatenate([batch["encoder_input_tokens"] for batch, _ in take(settings, 24)])
    assert len({row[1] for row in rows}) == len(rows)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("num_shards", "process_counts"), [(1, [2]), (2, [4]), (4, [2, 4])])
def test_global_batches_do_not_depend_on_the_number_of_processes(num_shards: int, process_counts: list[int]) -> None:
    settings = dataclasses.replace(MIXED, num_shards=num_shards)
    whole = take(settings, 6)
    for count in process_counts:
        parts = [take(settings, 6, process=(index, count)) for index in range(count)]
        for step, (batch, position) in enumerate(whole):
            rows = [part[step][0] for part in parts]
            assert_same({name: np.concatenate([row[name] for row in rows]) for name in batch}, batch)
            union: Position = {}
            for part in parts:
                union |= part[step][1]
            assert union == position


def test_a_process_may_feed_rows_that_lie_apart() -> None:
    """As it has to where a mesh follows the wiring of its devices; here three rows of the second of two shards."""
    (whole, _), (part, position) = take(MIXED, 1)[0], next(TrainLoader(MIXED, CONVERTER, rows=[4, 6, 7]).batches())
    assert_same(part, {name: rows[[4, 6, 7]] for name, rows in whole.items()})
    assert list(position) == ["1"]


@pytest.mark.usefixtures("small_blocks")
def test_resuming_anywhere_is_bitwise_equal_to_never_having_stopped() -> None:
    uninterrupted = take(MIXED, 40)
    rows = {position["0"]["row"] for _, position in uninterrupted}
    epochs = {position["0"]["tasks"]["loader_a"][0] for _, position in uninterrupted}
    assert len(rows) > 3  # stops in mid-block ...
    assert epochs == {0, 1, 2}  # ... and in several epochs
    for step in [0, *np.random.default_rng(0).choice(36, 4, replace=False).tolist(), 36]:
        position = json.loads(json.dumps(uninterrupted[step][1]))
        process, own = ((0, 1), slice(0, 8)) if step % 2 else ((1, 2), slice(4, 8))
        for ahead, (batch, after) in enumerate(take(MIXED, 3, position, process), start=step + 1):
            expected, expected_after = uninterrupted[ahead]
            assert_same(batch, {name: value[own] for name, value in expected.items()})
            assert after.items() <= expected_after.items()


def test_every_setting_of_the_order_changes_it() -> None:
    base = config("loader_a")
    variants = [base, dataclasses.replace(base, seed=1), dataclasses.replace(base, shuffle=False)]
    batches = [take(variant, 1)[0][0]["encoder_input_tokens"] for variant in variants]
    for first, second in itertools.combinations(batches, 2):
        assert not np.array_equal(first[:, 0], second[:, 0])


def test_tensorflow_s_global_seed_does_not_change_the_order() -> None:
    [(before, _)] = take(config("loader_a"), 1)
    tf.random.set_seed(5)
    [(after, _)] = take(config("loader_a"), 1)
    assert_same(before, after)


def test_a_block_mixes_tasks_by_the_rates_of_nested_mixtures() -> None:
    settings = dataclasses.replace(config("loader_rates", 1024), shuffle=False, seed=5, num_shards=2)
    (first, _), (second, _), (_, position) = take(settings, 3)  # of each shard 512 rows, half a block
    ids = np.concatenate([first["encoder_input_tokens"][:512, 0], second["encoder_input_tokens"][:512, 0]])
    # Rates are 1 + 1/4 and 3/4 of 2: an independent draw for each slot, below 0.625 the one, else the other.
    draws = np.random.Generator(np.random.Philox(key=[5, 0])).random(1024)
    of_long = [10**4 + 2 * i for i in range(1024)]  # shard 0 of 2 has every other example
    of_longer = [5 * 10**5 + 2 * i for i in range(1024)]
    expected = [(of_long if draw < 0.625 else of_longer).pop(0) for draw in draws]
    np.testing.assert_array_equal(ids, expected)
    assert position["0"] == {
        "block": 1,
        "row": 512,
        "tasks": {"loader_long": [0, sum(draws < 0.625)], "loader_longer": [0, sum(draws >= 0.625)]},
    }


def test_another_vocabulary_takes_the_place_of_the_tasks_own() -> None:
    text = tf.data.Dataset.from_tensors({"inputs": "hi", "targets": "é"})
    seqio.TaskRegistry.add(
        "loader_text",
        seqio.FunctionDataSource(lambda split, shuffle_files: text, ["train"]),
        {name: seqio.Feature(seqio.SentencePieceVocabulary("never read")) for name in ("inputs", "targets")},
        [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    )
    settings = dataclasses.replace(config("loader_text", 1), vocabulary=seqio.ByteVocabulary())
    [(batch, _)] = take(settings, 1)
    # Bytes follow the three special ids; the function takes no seed, which seqio by itself would refuse.
    np.testing.assert_array_equal(batch["encoder_input_tokens"][0, :4], [ord("h") + 3, ord("i") + 3, 1, 0])
    np.testing.assert_array_equal(batch["decoder_target_tokens"][0, :4], [0xC3 + 3, 0xA9 + 3, 1, 0])


def test_a_cached_task_is_read_from_its_cache_in_disjoint_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seqio.TaskRegistry.add(
        "loader_cached",
        seqio.FunctionDataSource(rows_of(1, 7), ["train"]),
        FEATURES,
        [plain, seqio.CacheDatasetPlaceholder(required=True)],
    )
    settings = dataclasses.replace(config("loader_cached", 2), num_shards=2)
    with pytest.raises(UserError, match=r"'loader_cached' must be read cached: set DatasetConfig.use_cached to True"):
        TrainLoader(settings, CONVERTER)
    settings = dataclasses.replace(settings, use_cached=True)
    with pytest.raises(UserError, match=r"use_cached: 'loader_cached' is in none of seqio's cache direct"):
        TrainLoader(settings, CONVERTER)

    folder = tmp_path / "loader_cached"
    folder.mkdir()
    (folder / "COMPLETED").touch()
    (folder / "stats.train.json").write_text('{"examples": 6}')
    specs = {name: {"shape": [None], "dtype": "int32"} for name in FEATURES}
    info = {"num_shards": 1, "features": specs, "seqio_version": "0.0.20"}
    (folder / "info.train.json").write_text(json.dumps(info))
    with tf.io.TFRecordWriter(str(folder / "train.tfrecord-00000-of-00001")) as writer:
        for i in range(101, 107):  # not what the source would give
            writer.write(seqio.dict_to_tfexample({name: [i, 1] for name in FEATURES}).SerializeToString())
    monkeypatch.setattr(seqio.utils, "_GLOBAL_CACHE_DIRECTORIES", [str(tmp_path)])
    ids = np.concatenate([batch["decoder_target_tokens"][:, 0] for batch, _ in take(settings, 3)])
    assert sorted(ids) == [101, 102, 103, 104, 105, 106]


def test_datasets_are_opened_one_at_a_time() -> None:
    """Seqio keeps the next preprocessor's seed in a global variable: two threads would share it."""
    inside, together = [], []

    def slow(dataset: tf.data.Dataset) -> tf.data.Dataset:
        inside.append(None)
        together.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return dataset

    add_task("loader_slow", rows_of(1, 7), slow, corrupt)
    threads = [threading.Thread(target=take, args=(config("loader_slow", 8), 1)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(together) > 4
    assert set(together) == {1}


class TestMistakes:
    """Each names the field and the fix."""

    def refused(self, settings: DatasetConfig, message: str, processes: int = 1) -> None:
        with pytest.raises(UserError, match=message):
            next(TrainLoader(settings, CONVERTER, process_count=processes).batches())

    def test_empty(self) -> None:
        self.refused(config("loader_empty"), r"task 'loader_empty' has no examples in its split 'train', shard 0")
        settings = dataclasses.replace(config("loader_plain"), num_shards=8)
        self.refused(settings, r"task 'loader_plain' has no examples in its split 'train', shard 7 of 8")
        task = seqio.TaskRegistry.get("loader_empty")
        with pytest.raises(UserError, match=r"task 'loader_empty' has no examples in its split 'train'$"):
            next(eval_batches(config("loader_empty"), task, CONVERTER))

    def test_split(self) -> None:
        settings = dataclasses.replace(config("loader_mixture"), split="vali")
        self.refused(settings, "DatasetConfig.split: 'loader_mixture' has no 'vali'; it has train, validation")

    @pytest.mark.parametrize(("batch_size", "nearest"), [(1, 6), (8, 6), (10, 12), (31, 30)])
    def test_batch_size(self, batch_size: int, nearest: int) -> None:
        settings = dataclasses.replace(config("loader_plain", batch_size), num_shards=2)
        self.refused(settings, rf"DatasetConfig.batch_size is {batch_size}; .* of 6: the nearest is {nearest}$", 3)

    def test_numbers(self) -> None:
        with pytest.raises(UserError, match=r"DatasetConfig.batch_size is 0; it must be at least 1"):
            config("loader_plain", 0)
        with pytest.raises(UserError, match=r"DatasetConfig.task_feature_lengths\['targets'\] is -1; it must"):
            config("loader_plain", 1, {"inputs": 4, "targets": -1})
        settings = config("loader_plain", 1, {"inputs": 0, "targets": 4})  # right for a decoder, but not for an encoder
        self.refused(settings, r"task_feature_lengths\['inputs'\] is 0; EncoderDecoderFeatures needs at least 1")
        next(TrainLoader(settings, DecoderFeatures()).batches())
        with pytest.raises(UserError, match=r"DatasetConfig.seed is -1; it must not be negative"):
            dataclasses.replace(config("loader_plain"), seed=-1)

    def test_features(self) -> None:
        settings = config("loader_plain", 8, {"input": 4, "targets": 4})
        self.refused(settings, "task_feature_lengths has input, targets; EncoderDecoderFeatures reads 'inputs'")
        read = rows_of(1, 7)
        source = seqio.FunctionDataSource(read, ["train"])
        seqio.TaskRegistry.add("loader_targets", source, {"targets": FEATURES["targets"]}, [plain])
        self.refused(config("loader_targets"), "task 'loader_targets' gives targets; .* reads 'inputs'")
        matrix = {**FEATURES, "inputs": dataclasses.replace(FEATURES["inputs"], rank=2)}
        as_matrix = seqio.map_over_dataset(lambda example: {"inputs": [[example["id"]]], "targets": [1]})
        seqio.TaskRegistry.add("loader_matrix", source, matrix, [as_matrix])
        self.refused(config("loader_matrix"), "'loader_matrix' gives 'inputs' as .*, not as a vector of token ids")

    def test_shuffle(self) -> None:
        task = seqio.TaskRegistry.get("loader_plain").replace(name="loader_still", shuffle_buffer_size=None)
        seqio.TaskRegistry.add_provider("loader_still", task)
        self.refused(config("loader_still"), "'loader_still' cannot be shuffled: set DatasetConfig.shuffle")

    def test_vocabularies(self) -> None:
        other = {name: seqio.Feature(seqio.PassThroughVocabulary(9)) for name in FEATURES}
        task = seqio.TaskRegistry.get("loader_plain").replace(name="loader_other", output_features=other)
        seqio.TaskRegistry.add_provider("loader_other", task)
        add_mixture("loader_two_vocabularies", {"loader_plain": 1, "loader_other": 1})
        self.refused(
            config("loader_two_vocabularies"),
            "the vocabularies of 'loader_other' and 'loader_plain' differ for 'inputs'; set DatasetConfig.vocab",
        )

    def test_position_of_another_configuration(self) -> None:
        place = {"loader_a": [0, 0], "loader_b": [0, 0]}
        position: Position = {str(shard): {"block": 0, "row": 1, "tasks": place} for shard in range(2)}
        for shards in (1, 4):
            with pytest.raises(UserError, match=rf"has shards 0, 1, DatasetConfig.num_shards is {shards}: go on"):
                TrainLoader(dataclasses.replace(MIXED, num_shards=shards), CONVERTER).batches(position)
        settings = dataclasses.replace(MIXED, mixture_or_task_name="loader_a")
        with pytest.raises(UserError, match=r"has tasks loader_a, loader_b, but 'loader_a' of .* has loader_a: go"):
            TrainLoader(settings, CONVERTER).batches(position)


def test_a_mixture_leaves_out_a_task_without_the_split(caplog: pytest.LogCaptureFixture) -> None:
    source = seqio.FunctionDataSource(rows_of(1, 7), ["test"])
    seqio.TaskRegistry.add("loader_test_only", source, FEATURES, [plain])
    add_mixture("loader_uneven", {"loader_plain": 1, "loader_test_only": 1})
    assert [task.name for task, _ in loader.weighted_tasks(config("loader_uneven"))] == ["loader_plain"]
    assert "loader_uneven without loader_test_only: no split 'train'" in caplog.text


def evaluate(batch_size: int, limit: int | None = None, process: tuple[int, int] = (0, 1)) -> list[EvalBatch]:
    settings = dataclasses.replace(MIXED, mixture_or_task_name="loader_plain", batch_size=batch_size)
    return list(eval_batches(settings, seqio.TaskRegistry.get("loader_plain"), CONVERTER, limit, *process))


def test_evaluation_reads_each_example_once_in_order_and_pads_the_last_batch() -> None:
    first, second = evaluate(4)
    assert [example["id"] for example in first.examples] == [1, 2, 3, 4]
    assert [example["id"] for example in second.examples] == [5, 6, 7]
    weights = [[1, 1, *[0] * 10]] * 3 + [[0] * 12]
    np.testing.assert_array_equal(second.batch["decoder_loss_weights"], weights)
    np.testing.assert_array_equal(second.batch["encoder_input_tokens"][3], [0] * 16)
    dataset = seqio.TaskRegistry.get("loader_plain").get_dataset(LENGTHS, "train", shuffle=False)
    oracle = seqio.EncDecFeatureConverter(pack=False)(dataset, LENGTHS).batch(4).as_numpy_iterator()
    assert_same(first.batch, next(oracle))


def test_processes_share_an_evaluation_batch() -> None:
    for whole, *parts in zip(evaluate(4), *(evaluate(4, process=(i, 2)) for i in range(2)), strict=True):
        joined = {name: np.concatenate([part.batch[name] for part in parts]) for name in whole.batch}
        assert_same(joined, whole.batch)
        assert all(len(part.examples) == len(whole.examples) for part in parts)


def test_a_process_may_evaluate_rows_that_lie_apart() -> None:
    settings = dataclasses.replace(MIXED, mixture_or_task_name="loader_plain", batch_size=4)
    task = seqio.TaskRegistry.get("loader_plain")
    for whole, part in zip(evaluate(4), eval_batches(settings, task, CONVERTER, rows=[0, 3]), strict=True):
        assert_same(part.batch, {name: rows[[0, 3]] for name, rows in whole.batch.items()})


def test_evaluation_stops_at_the_limit() -> None:
    assert [len(batch.examples) for batch in evaluate(2, limit=3)] == [2, 1]
    assert [len(batch.examples) for batch in evaluate(8, limit=100)] == [7]


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_prefetch_keeps_order_runs_ahead_by_its_size_and_ends_its_thread() -> None:
    made: list[int] = []

    def count() -> Iterator[int]:
        for i in range(7):
            made.append(i)
            yield i

    items = prefetch(count(), size=3)
    assert made == []
    assert next(items) == 0
    wait_for(lambda: made == [0, 1, 2, 3])
    time.sleep(0.02)
    assert made == [0, 1, 2, 3]
    assert list(items) == [1, 2, 3, 4, 5, 6]
    assert prefetch_threads() == []


def test_prefetch_raises_in_its_turn() -> None:
    def fail() -> Iterator[int]:
        yield 1
        yield 2
        raise UserError("the third")

    items = prefetch(fail(), size=5)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(UserError, match="the third"):
        next(items)
    assert prefetch_threads() == []


@pytest.mark.parametrize("stop", ["close", "drop"])
def test_prefetch_ends_its_thread_when_the_consumer_stops(stop: str) -> None:
    items = prefetch(itertools.count())
    assert next(items) == 0
    assert len(prefetch_threads()) == 1
    if stop == "close":
        items.close()
    else:
        del items
        gc.collect()
    assert prefetch_threads() == []


def test_an_interpreter_exits_in_the_middle_of_prefetching() -> None:
    program = (
        "import itertools\n"
        "from collections import deque\n"
        "from collections.abc import Generator, Iterable\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from typing import TypeVar\n"
        "T = TypeVar('T')\n"
        f"{inspect.getsource(prefetch)}\n"
        "items = prefetch(itertools.count())\n"
        "print(next(items), next(items))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 1\n", "")


def test_batches_become_global_arrays_sharded_over_the_batch() -> None:
    devices = np.array(jax.devices()[:8]).reshape(4, 2)
    mesh = jax.sharding.Mesh(devices, ("data", "model"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    [(batch, _)] = take(config("loader_plain", 8), 1)
    arrays = loader.host_to_devices(batch, sharding)
    assert_same({name: np.asarray(array) for name, array in arrays.items()}, batch)
    for array in arrays.values():
        assert array.sharding == sharding
        for shard in array.addressable_shards:
            row = 2 * int(np.argwhere(devices == shard.device)[0, 0])
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(array)[row : row + 2])
