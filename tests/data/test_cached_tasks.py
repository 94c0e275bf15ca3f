"""Tasks that may be cached: what is read from a cache is what the task itself gives, wherever its folder is named."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_like.data.loader import DatasetConfig, eval_batches
from t5x_like.data.packing import EncoderDecoderFeatures
from t5x_like.data.tasks import registry
from t5x_like.errors import UserError

EXAMPLES = 40


def write_cache(folder: Path, task: seqio.Task, split: str) -> None:
    """What seqio's Beam pipeline writes: the examples as they are at the task's placeholder."""
    folder.mkdir()
    source = task.source.get_dataset(split, shuffle=False).take(EXAMPLES)
    rows = list(task.preprocess_precache(source, seed=0).as_numpy_iterator())
    with tf.io.TFRecordWriter(str(folder / f"{split}.tfrecord-00000-of-00001")) as writer:
        for row in rows:
            writer.write(seqio.dict_to_tfexample(row).SerializeToString())
    vectors = {name: {"shape": [None], "dtype": "int32"} for name in task.output_features}
    strings = {f"{name}_pretokenized": {"shape": [], "dtype": "string"} for name in task.output_features}
    info = {"num_shards": 1, "features": vectors | strings, "seqio_version": "0.0.20"}
    (folder / f"info.{split}.json").write_text(json.dumps(info))
    (folder / f"stats.{split}.json").write_text(json.dumps({"examples": len(rows)}))
    (folder / "COMPLETED").touch()


def test_a_cached_task_gives_what_the_task_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "wordnet_supersense"
    monkeypatch.setattr(seqio.utils, "_GLOBAL_CACHE_DIRECTORIES", [])
    task = registry.get_task_or_mixture(name)
    monkeypatch.setattr(task, "_cache_dir", None)  # registered once for all tests
    lengths = {"inputs": 24, "targets": 8}  # short, so that both are cut
    config = DatasetConfig(name, lengths, batch_size=EXAMPLES, split="validation")
    cached = dataclasses.replace(config, use_cached=True, cache_dirs=[str(tmp_path)])
    with pytest.raises(UserError, match=rf"cache directories \({tmp_path}\): name its own in DatasetConfig.cache_dirs"):
        eval_batches(cached, task, EncoderDecoderFeatures())

    write_cache(tmp_path / name, task, "validation")
    [expected] = eval_batches(config, task, EncoderDecoderFeatures(), limit=EXAMPLES)
    [found] = eval_batches(cached, task, EncoderDecoderFeatures())
    assert (expected.batch["decoder_target_tokens"] != 0).any(axis=1).all()
    for feature, tokens in expected.batch.items():
        np.testing.assert_array_equal(found.batch[feature], tokens)
    assert [row["inputs_pretokenized"] for row in found.examples] == [
        row["inputs_pretokenized"] for row in expected.examples
    ]
