"""Real jobs of several processes, on this machine."""

import json
from pathlib import Path

import pytest
from tiny import TRAIN_CONFIG

from t5x_like import cli

CONFIG = TRAIN_CONFIG + "train.train.evaluator = None\n"
CONFIG = CONFIG.replace("include 'models", "from t5x_like.commands import train\ninclude 'models", 1)


def rehearse(folder: Path, *arguments: str) -> int:
    config = folder / "config.gin"
    config.write_text(CONFIG)
    return cli.main(["rehearse", f"--gin_file={config}", *arguments])


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "run" / "metrics" / "metrics.jsonl").read_text().splitlines()]


def test_a_job_of_two_processes_that_loses_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # process 0 compiles once, not three times
    folder, findings = tmp_path / "runs", tmp_path / "findings.json"
    options = ["--processes=2", "--devices_per_process=1", "--fault=kill@3:1", "--patience=10"]
    code = rehearse(tmp_path, *options, f"--folder={folder}", f"--json={findings}")
    out, err = capfd.readouterr()
    assert code == 0, err
    none, kill = json.loads(findings.read_text())
    assert (none["fault"], none["restarts"], none["steps_lost"], none["compared_with"]) == ("none", 0, 0, "one process")
    assert none["largest_difference"] <= 1e-5
    assert (kill["fault"], kill["restarts"], kill["compared_with"]) == ("kill@3:1", 1, "no fault")
    assert 1 <= kill["steps_lost"] <= 3  # from the save after step 2, if it was through, or from the start
    assert 0 < kill["seconds_to_notice"] <= 30
    for each in (none, kill):
        assert each["curve_equal"]
        assert each["order_equal"]
        assert each["first_difference"] is None
        assert each["fault"] in out
    assert kill["bitwise"]

    # The same once more, by hand.
    losses = [[row["loss"] for row in rows(folder / run)] for run in ("one_process", "no_fault", "kill@3:1")]
    assert [len(each) for each in losses] == [6, 6, 6]
    assert losses[1] == losses[2]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    records = [
        json.loads(line) for line in (folder / "no_fault" / "attempt_0.process_1.jsonl").read_text().splitlines()
    ]
    assert [list(record["rows"]) for record in records] == [["4", "5", "6", "7"]] * 6
    sessions = json.loads((folder / "kill@3:1" / "run" / "run.json").read_text())["sessions"]
    assert [session["devices"]["processes"] for session in sessions] == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--processes=3", "--devices_per_process=1"],
            "3 processes x 1 devices split a batch 3 ways, it has 8 rows",
        ),
        (["--processes=2", "--fault=resize=3@2"], "3 processes x 2 devices split a batch 6 ways, it has 8 rows"),
        (["--fault=kill@6"], "--fault=kill@6:3: the run has 6 steps; it must strike at 1 to 5"),
        (["--processes=0"], "--processes and --devices_per_process must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert rehearse(tmp_path, *arguments) == 2
    assert message in capfd.readouterr().err


@pytest.mark.full
def test_a_job_of_four_processes_survives_one_fault_of_every_kind(tmp_path: Path) -> None:
    bindings = ("--gin.TRAIN_STEPS=12", "--gin.SAVE_PERIOD=3")
    assert rehearse(tmp_path, *bindings, f"--json={tmp_path / 'findings.json'}") == 0
    findings = json.loads((tmp_path / "findings.json").read_text())
    assert [each["restarts"] for each in findings] == [0, 1, 1, 1, 1, 0, 1]
    assert [each["processes"] for each in findings] == [4, 4, 4, 4, 4, 4, 2]
