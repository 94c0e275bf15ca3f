"""Evaluation and inference of a trained run, from the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from t5x_like import InteractiveModel, cli
from t5x_like.models.predictor import Predictor
from t5x_like.training.run_log import read_evaluations


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run, to write into."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_evaluate_needs_no_more_than_the_folder_and_agrees_with_training(run: Path) -> None:
    expected, samples = read_evaluations(run)[6], read(run / "eval" / "wordnet_supersense" / "6.jsonl")
    (run / "metrics" / "evaluations.jsonl").unlink()
    shutil.rmtree(run / "eval")
    assert cli.main(["evaluate", f"--gin.MODEL_DIR={run}"]) == 0
    assert read_evaluations(run) == {6: expected}
    assert read(run / "eval" / "wordnet_supersense" / "6.jsonl") == samples
    assert {name.partition("/")[2] for name in expected} == {
        "perplexity",
        "unigram_perplexity",
        "bleu",
        "chrf",
        "accuracy",
        "majority_accuracy",
    }


def test_evaluate_all_steps_another_split_and_a_step_that_is_not_there(run: Path, capfd: pytest.CaptureFixture) -> None:
    (run / "metrics" / "evaluations.jsonl").unlink()
    few = ["--gin.eval/loader.DatasetConfig.split=test", "--gin.EVAL_EXAMPLES=3"]
    assert cli.main(["evaluate", f"--gin.MODEL_DIR={run}", "--gin.evaluate.evaluate.step=all", *few]) == 0
    assert sorted(read_evaluations(run)) == [2, 4, 6]
    assert cli.main(["evaluate", f"--gin.MODEL_DIR={run}", "--gin.evaluate.evaluate.step=5"]) == 2
    assert "has no checkpoint of step 5; it has 2, 4, 6" in capfd.readouterr().err


def test_perplexity_is_the_exponential_of_the_scores_per_token(run: Path) -> None:
    model = InteractiveModel.load(run)
    for task in ("bible_en_es", "wordnet_supersense"):
        rows = read(run / "eval" / task / "6.jsonl")
        lengths = [min(len(model.vocabulary.encode(row["targets"])) + 1, 32) for row in rows]
        perplexity = np.exp(-sum(row["score"] for row in rows) / sum(lengths))
        np.testing.assert_allclose(read_evaluations(run)[6][f"{task}/perplexity"], perplexity, rtol=1e-6)


INPUTS = ["supersense: dog: an animal", "translate English to Spanish: In the beginning", "supersense: oak: a tree"]


@pytest.mark.parametrize(
    ("ending", "text", "targets"),
    [
        (".txt", "".join(f"{line}\n" for line in INPUTS), ["", "", ""]),
        (".tsv", "".join(f"{line}\tx\n" for line in INPUTS), ["x", "x", "x"]),
        (".jsonl", "".join(json.dumps({"inputs": line, "targets": "y"}) + "\n" for line in INPUTS), ["y", "y", "y"]),
    ],
)
def test_infer_reads_files(run: Path, tmp_path: Path, ending: str, text: str, targets: list[str]) -> None:
    source = tmp_path / f"some{ending}"
    source.write_text(text)
    assert cli.main(["infer", f"--gin.MODEL_DIR={run}", f"--gin.infer.infer.source={source}"]) == 0
    rows = read(run / "inference" / "some-6.jsonl")
    assert [row["inputs"] for row in rows] == INPUTS
    assert [row["targets"] for row in rows] == targets
    assert [row["predictions"] for row in rows] == InteractiveModel.load(run).generate(INPUTS, max_length=32)
    assert all(row["scores"] < 0 for row in rows)


def test_infer_reads_tasks_and_agrees_with_evaluation(run: Path) -> None:
    sources = ["--gin.MIXTURE_OR_TASK_NAME=bible_en_es", "--gin.infer/loader.DatasetConfig.split=test"]
    assert cli.main(["infer", f"--gin.MODEL_DIR={run}", *sources, "--gin.BATCH_SIZE=256"]) == 0
    assert cli.main(["evaluate", f"--gin.MODEL_DIR={run}", "--gin.eval/loader.DatasetConfig.split=test"]) == 0
    inferred = read(run / "inference" / "bible_en_es-6.jsonl")
    evaluated = read(run / "eval" / "bible_en_es" / "6.jsonl")
    assert len(inferred) == 1579
    assert [(r["inputs"], r["predictions"]) for r in inferred[:5]] == [
        (r["inputs"], r["predictions"]) for r in evaluated
    ]


def test_infer_goes_on_where_it_stopped_and_shards_share_the_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, whole = tmp_path / "many.txt", tmp_path / "whole.jsonl"
    source.write_text("".join(f"supersense: number {i}: a number\n" for i in range(21)))
    arguments = ["infer", f"--gin.MODEL_DIR={run}", f"--gin.infer.infer.source={source}", "--gin.BATCH_SIZE=8"]
    assert cli.main([*arguments, f"--gin.infer.infer.output={whole}"]) == 0

    calls = []
    generate = Predictor.generate

    def counted(self: Predictor, *rest: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("power cut")
        return generate(self, *rest)

    monkeypatch.setattr(Predictor, "generate", counted)
    assert cli.main(arguments) == 1
    assert not (run / "inference" / "many-6.jsonl").exists()
    assert cli.main(arguments) == 0
    assert len(calls) == 4  # one batch, the cut, and the two that were missing
    assert (run / "inference" / "many-6.jsonl").read_text() == whole.read_text()

    for index in range(2):
        shards = ["--gin.infer.infer.num_shards=2", f"--gin.infer.infer.shard_index={index}"]
        assert cli.main([*arguments, *shards]) == 0
    parts = [read(run / "inference" / f"many-6-0000{i}-of-00002.jsonl") for i in range(2)]
    assert [len(part) for part in parts] == [13, 8]
    assert parts[0][:8] + parts[1] + parts[0][8:] == read(whole)


def test_beams_and_samples_come_as_lists_best_first(run: Path, tmp_path: Path) -> None:
    (source := tmp_path / "one.txt").write_text("supersense: dog: an animal\n")
    output = tmp_path / "out.jsonl"
    base = [
        "infer",
        f"--gin.MODEL_DIR={run}",
        f"--gin.infer.infer.source={source}",
        f"--gin.infer.infer.output={output}",
    ]
    for decoder in (["@beam.BeamSearch()"], ["@sampling.Sampling()", "--gin.sampling.Sampling.num_samples=4"]):
        assert cli.main([*base, f"--gin.infer.infer.decoder={decoder[0]}", *decoder[1:]]) == 0
        (row,) = read(output)
        assert len(row["predictions"]) == len(row["scores"]) == 4
        assert row["scores"] == sorted(row["scores"], reverse=True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "x\ty\n1\t2\t3\n", "a.tsv:2: 3 columns"),
        ("a.jsonl", '{"inputs": "x"}\n{"input": "x"}\n', "a.jsonl:2: not an object like"),
        ("a.jsonl", '{"inputs": 3}\n', "a.jsonl:1: not an object like"),
        ("a.csv", "x\n", "cannot read .csv; use one of .txt, .tsv, .jsonl"),
        ("a.txt", "", "a.txt: is empty"),
        ("missing.txt", None, "missing.txt: No such file or directory"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert cli.main(["infer", f"--gin.MODEL_DIR={run}", f"--gin.infer.infer.source={tmp_path / name}"]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_folder_without_checkpoints_is_named(run: Path, capfd: pytest.CaptureFixture) -> None:
    shutil.rmtree(run / "checkpoints")
    assert cli.main(["evaluate", f"--gin.MODEL_DIR={run}"]) == 2
    assert "has the run been trained?" in capfd.readouterr().err
