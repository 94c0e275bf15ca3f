"""The main job: train, stop, go on, as a user does it."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from tiny import TRAIN_CONFIG, train_tiny

from t5x_like import cli
from t5x_like.checkpoints import integrity
from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.training.trainer import Monitor


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics" / "metrics.jsonl").read_text().splitlines()]


def digests(folder: Path, step: int) -> dict[str, int]:
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints.saved_digests(step)


def deterministic(row: dict) -> dict:
    """What a step says of training, without what it says of the machine."""
    machine = ("second", "share", "memory")
    return {name: value for name, value in row.items() if not any(word in name for word in machine)}


def test_a_run_leaves_all_that_the_design_says(trained: Path) -> None:
    assert [row["step"] for row in rows(trained)] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "tokens_per_second", "z_loss", "accuracy", "learning_rate", "gradient_norm", "parameter_norm"):
        assert all(row[name] > 0 or name == "accuracy" for row in rows(trained)), name
    for name in ("model_flops_per_second", "share_of_matmul_peak", "seconds_per_step", "memory_gib"):
        assert all(row[name] > 0 for row in rows(trained)), name
    run = json.loads((trained / "run.json").read_text())
    assert (
        run["parameters"] == 2 * 8192 * 16 + 2 * 2 * 32 + (4 * 256 + 3 * 512 + 32) + (8 * 256 + 3 * 512 + 48) + 2 * 16
    )
    assert run["seeds"] == {"trainer": 0, "dataset": 0}
    assert {"config.gin", "run.json", "report.html", "checkpoints", "metrics", "eval"} == {
        p.name for p in trained.iterdir()
    }
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["2", "4", "6"]
    samples = [json.loads(line) for line in (trained / "eval" / "bible_en_es" / "6.jsonl").read_text().splitlines()]
    assert len(samples) == 5
    assert samples[0]["inputs"].startswith("translate English to Spanish: ")
    assert set(samples[0]) == {"inputs", "targets", "predictions", "score"}


@pytest.mark.parametrize("stop_after", [3, 4])
def test_a_run_that_was_asked_to_stop_goes_on_bitwise(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    """SIGTERM in the middle of a period: the step is finished, saved, and the same command goes on from there."""
    folder = tmp_path / "run"
    add = Monitor.add

    def stop(self: Monitor, step: int, *rest: object) -> None:
        add(self, step, *rest)
        if step == stop_after - 1:  # seen after the step that follows
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Monitor, "add", stop)
        assert train_tiny(folder) == 0
    assert max(int(path.name) for path in (folder / "checkpoints").iterdir()) == stop_after
    assert train_tiny(folder) == 0
    assert digests(folder, 6) == digests(trained, 6)
    assert [deterministic(row) for row in rows(folder)] == [deterministic(row) for row in rows(trained)]
    assert len(json.loads((folder / "run.json").read_text())["sessions"]) == 2


def test_a_run_that_crashed_goes_on_bitwise_from_its_last_checkpoint(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    add = Monitor.add

    def crash(self: Monitor, step: int, *rest: object) -> None:
        add(self, step, *rest)
        if step == 5:
            raise OSError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(Monitor, "add", crash)
        assert train_tiny(folder) == 1
    assert train_tiny(folder) == 0
    assert digests(folder, 6) == digests(trained, 6)
    assert [deterministic(row) for row in rows(folder)] == [deterministic(row) for row in rows(trained)]


def test_a_finished_run_only_says_so(trained: Path, capfd: pytest.CaptureFixture) -> None:
    before = digests(trained, 6)
    assert train_tiny(trained) == 0
    assert "stopped at step 6 of 6 in" in capfd.readouterr().err
    assert digests(trained, 6) == before


def test_a_run_is_a_function_of_its_config(trained: Path, tmp_path: Path) -> None:
    """config.gin alone gives the same run again."""
    config = tmp_path / "again.gin"
    shutil.copy(trained / "config.gin", config)
    assert (
        cli.main(["train", f"--gin_file={config}", f"--gin.MODEL_DIR={tmp_path / 'again'}", "--gin.TRAIN_STEPS=2"]) == 0
    )
    assert digests(tmp_path / "again", 2) == digests(trained, 2)


def test_a_bucket_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.gin").write_text(TRAIN_CONFIG)
    assert cli.main(["train", "--gin_file=tiny.gin", "--gin.MODEL_DIR=gs://bucket/run"]) == 2
    assert "MODEL_DIR=gs://bucket/run: a run is written to a folder; mount the bucket" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gin"]


def test_another_config_in_the_same_folder_is_refused_with_what_differs(
    trained: Path, capfd: pytest.CaptureFixture
) -> None:
    assert train_tiny(trained, "--gin.DROPOUT_RATE=0.2", "--gin.SEED=1", "--gin.SAVE_PERIOD=5") == 2
    message = capfd.readouterr().err
    assert "configured otherwise" in message
    assert "transformer.Encoder.dropout_rate: 0.1 -> 0.2" in message
    assert "trainer.Trainer.seed: 0 -> 1" in message
    assert "save_period" not in message  # may change
    assert "Traceback" not in message


def test_a_corrupt_checkpoint_is_named_and_stepped_over(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (largest := max((folder / "checkpoints" / "6" / "state").rglob("*"), key=lambda path: path.stat().st_size)).chmod(
        0o644
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert train_tiny(folder) == 0
    assert f"stepped over {folder / 'checkpoints' / '6'}" in capfd.readouterr().err
    assert digests(folder, 6) == digests(trained, 6)  # trained again from 4


def test_steps_that_are_not_finite_stop_the_run_with_batch_and_key(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    arguments = ("--gin.trainer.Trainer.max_skipped_updates=3", "--gin.encoder_decoder.EncoderDecoderModel.z_loss=1e38")
    assert train_tiny(tmp_path / "run", *arguments) == 1
    message = capfd.readouterr().err
    assert "step 3: loss or gradient was not finite 3 steps in a row" in message
    assert "Traceback" not in message
    facts = json.loads((tmp_path / "run" / "non_finite" / "step_3.process_0.json").read_text())
    assert facts["step"] == 3
    assert (tmp_path / "run" / "non_finite" / facts["batch"]).exists()
    assert len(facts["key"]) == 2


def test_fine_tuning_takes_what_matches_and_the_rest_starts_afresh(trained: Path, tmp_path: Path) -> None:
    config = TRAIN_CONFIG.replace("include 'runs/finetune.gin'", "include 'runs/finetune.gin'\ninclude 'restore.gin'")
    (tmp_path / "restore.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "from t5x_like.checkpoints import restore\nfrom t5x_like.commands import train\n"
        "train.train.restore = @restore.RestoreFrom()\n"
        f"restore.RestoreFrom.path = '{trained}'\nrestore.RestoreFrom.include = 'token_embedder/.*|encoder/.*'\n"
    )
    from t5x_like import cli

    (tmp_path / "new.gin").write_text(config)
    arguments = ["train", f"--gin_file={tmp_path / 'new.gin'}", f"--gin_search_paths={tmp_path}", "--gin.SEED=7"]
    still = "--gin.schedules.constant.base=0.0"  # parameters stay what they started as
    assert cli.main([*arguments, f"--gin.MODEL_DIR={tmp_path / 'new'}", "--gin.TRAIN_STEPS=1", still]) == 0
    ours, theirs = digests(tmp_path / "new", 1), digests(trained, 6)
    taken = {name for name in ours if name.startswith("params/") and ours[name] == theirs[name]}
    matching = {name for name in ours if name.startswith(("params/token_embedder/", "params/encoder/"))}
    assert matching <= taken
    assert not any(name.endswith("kernel") for name in taken - matching)


THIRD_PARTY = """
import seqio

seqio.TaskRegistry.add(
    "third_party_reverse",
    source=seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: __import__("tensorflow").data.Dataset.from_tensor_slices(
            {"inputs": [f"reverse {i}" for i in range(20)], "targets": [str(i)[::-1] for i in range(20)]}
        ),
        splits=("train", "validation"),
    ),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={name: seqio.Feature(seqio.ByteVocabulary()) for name in ("inputs", "targets")},
    metric_fns=[lambda targets, predictions: {"exact": float(targets == predictions)}],
)
"""


def test_a_third_party_task_trains_by_name_through_an_import_with_any_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "my_reverse_tasks.py").write_text(THIRD_PARTY)
    (tmp_path / "tasks.gin").write_text("from __gin__ import dynamic_registration\nimport my_reverse_tasks\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = [
        f"--gin_file={tmp_path / 'tasks.gin'}",
        "--gin.MIXTURE_OR_TASK_NAME=third_party_reverse",
        "--gin.VOCABULARY=@vocabularies.byte_vocabulary()",
        "--gin.VOCAB_SIZE=384",
        "--gin.TRAIN_STEPS=1",
    ]
    assert train_tiny(tmp_path / "run", *arguments) == 2
    assert f"{tmp_path.name}/tasks.gin:2: 'my_reverse_tasks' may not be used" in capfd.readouterr().err
    assert train_tiny(tmp_path / "run", *arguments, "--allow_import=my_reverse_tasks") == 0
    (row, *_) = [
        json.loads(line) for line in (tmp_path / "run/eval/third_party_reverse/1.jsonl").read_text().splitlines()
    ]
    assert (row["inputs"], row["targets"]) == ("reverse 0", "0")


def test_early_stopping_ends_the_run_with_a_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """The perplexity falls, so a run that waits for it to rise stops at its second evaluation."""
    arguments = [
        "--gin.train.train.early_stopping=@evaluation.EarlyStopping()",
        "--gin.evaluation.EarlyStopping.metric=wordnet_supersense/perplexity",
        "--gin.evaluation.EarlyStopping.patience=1",
        "--gin.EVAL_PERIOD=1",
        "--gin.SAVE_PERIOD=100",
        "--gin.schedules.constant.base=0.1",
    ]
    assert train_tiny(tmp_path / "run", *arguments) == 0
    assert "wordnet_supersense/perplexity no longer gets better; stopping early" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert train_tiny(tmp_path / "run", "--dry_run", "--gin.DROPOUT_RATE=0.0") == 0
    out = capsys.readouterr().out
    assert "TRAIN_STEPS = 6" in out
    assert " ".join(
        ["encoder/layers_0/attention/query/kernel", "16", "x", "2", "x", "8", "embed,", "heads,", "head_dim"]
    ) in " ".join(out.split())
    assert "parameters          268,528" in out
    assert "tokens per step     640 at most" in out
    assert "GiB per device" in out
    assert not (tmp_path / "run").exists()


def test_digests_tell_one_flipped_bit_and_two_swapped_numbers() -> None:
    import jax.numpy as jnp

    x = jnp.arange(12, dtype=jnp.float32).reshape(3, 4)
    flipped, swapped = x.at[1, 2].set(jnp.nextafter(x[1, 2], jnp.float32(9))), x.at[0, 1].set(4.0).at[1, 0].set(1.0)
    assert len({int(integrity.digest(value)) for value in (x, flipped, swapped)}) == 3
