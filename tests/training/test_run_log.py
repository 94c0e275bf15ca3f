import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from rich.console import Console

from t5x_like.errors import UserError
from t5x_like.training.heatmap import EVEN, NOT_FINITE, palette
from t5x_like.training.run_log import (
    JsonlWriter,
    ProgressBar,
    ProgressLines,
    RunLog,
    SilentRunLog,
    TensorBoardWriter,
    WandbWriter,
    git_revision,
    read_evaluations,
    read_jsonl,
    read_rows,
    replace_text,
    write_run_json,
)


def scalars(loss: float) -> dict[str, float]:
    return {"loss": loss, "tokens_per_second": 1234.5}


def tensorboard_events(folder: Path) -> Iterator[tf.compat.v1.Event]:
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
            yield tf.compat.v1.Event.FromString(record)


def tensorboard_scalars(folder: Path) -> list[tuple[int, str, float]]:
    events = tensorboard_events(folder)
    return [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]


def test_every_report_lands_in_every_file_and_on_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, total_steps=2) as log:
        log.step(1, scalars(5.5))
        # Flushed: a reader sees the row while the run goes on.
        assert (tmp_path / "metrics/metrics.jsonl").read_text() == (
            '{"step": 1, "loss": 5.5, "tokens_per_second": 1234.5}\n'
        )
        log.step(2, scalars(4.25))
        log.evaluation(2, "bible", {"bleu": 3.5, "chrf": 20.25})
        log.message("saved step 2")

    assert read_jsonl(tmp_path / "metrics/metrics.jsonl") == [
        (1, {"loss": 5.5, "tokens_per_second": 1234.5}),
        (2, {"loss": 4.25, "tokens_per_second": 1234.5}),
    ]
    assert read_jsonl(tmp_path / "metrics/evaluations.jsonl") == [
        (2, {"eval/bible/bleu": 3.5, "eval/bible/chrf": 20.25})
    ]
    assert tensorboard_scalars(tmp_path / "metrics") == [
        (1, "loss", 5.5),
        (1, "tokens_per_second", 1234.5),
        (2, "loss", 4.25),
        (2, "tokens_per_second", 1234.5),
        (2, "eval/bible/bleu", 3.5),
        (2, "eval/bible/chrf", 20.25),
    ]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 1/2  loss 5.5000  1,234 tokens/s  ETA -:--:--  elapsed 0:00:00"
    assert lines[2:] == ["step 2  bible:  bleu 3.5  chrf 20.25", "saved step 2"]


def test_a_resumed_run_drops_the_rows_past_its_step_and_has_no_duplicates(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=4) as log:
        for step in (1, 2, 3):
            log.step(step, scalars(10.0 - step))
            log.evaluation(step, "bible", {"bleu": float(step)})
    with RunLog(tmp_path, total_steps=4, resumed_step=2) as log:
        log.step(3, scalars(7.5))
        log.evaluation(3, "bible", {"bleu": 30.0})

    rows = read_jsonl(tmp_path / "metrics/metrics.jsonl")
    assert [(step, row["loss"]) for step, row in rows] == [(1, 9.0), (2, 8.0), (3, 7.5)]
    rows = read_jsonl(tmp_path / "metrics/evaluations.jsonl")
    assert [(step, row["eval/bible/bleu"]) for step, row in rows] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    # TensorBoard purges steps >= that of a START event, in files of version 2.
    events = list(tensorboard_events(tmp_path / "metrics"))
    starts = [event.step for event in events if event.session_log.status == tf.compat.v1.SessionLog.START]
    assert starts == [1, 3]
    assert [event.file_version for event in events if event.file_version] == ["brain.Event:2"] * 2


def test_a_log_that_resumes_nothing_only_adds(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=2) as log:
        log.step(1, scalars(1.0))
        log.step(2, scalars(2.0))
    with RunLog(tmp_path, total_steps=2, resumed_step=None) as log:
        log.evaluation(1, "bible", {"bleu": 1.0})
    assert [step for step, _ in read_jsonl(tmp_path / "metrics/metrics.jsonl")] == [1, 2]
    starts = [event for event in tensorboard_events(tmp_path / "metrics") if event.HasField("session_log")]
    assert [event.step for event in starts] == [1]


def test_a_row_cut_short_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    writer = JsonlWriter(path)
    writer.write(2, {"loss": 1.0})
    writer.close()
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"loss": math.nan, "grad_norm": math.inf, "z_loss": -math.inf, "accuracy": 0.5})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "loss": null, "grad_norm": null, "z_loss": null, "accuracy": 0.5}\n'
    )


def test_tensorboard_keeps_nan(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    writer.write(7, {"loss": math.nan})
    writer.close()
    [(step, tag, value)] = tensorboard_scalars(tmp_path)
    assert (step, tag) == (7, "loss")
    assert math.isnan(value)


def test_vectors_are_lists_in_json_and_in_tensorboard_pictures_of_training_so_far(tmp_path: Path) -> None:
    """Images at the first step, at half as long again, and at the end; a resumed run's go on from its rows."""
    dead = [0.0, 1.0]

    def images() -> list[tuple[int, str, np.ndarray]]:
        return [
            (event.step, value.tag, tf.io.decode_png(value.image.encoded_image_string).numpy())
            for event in tensorboard_events(tmp_path / "metrics")
            for value in event.summary.value
            if value.HasField("image")
        ]

    with RunLog(tmp_path, total_steps=4) as log:
        for step in (1, 2, 3):
            log.step(step, scalars(1.0), {"router/load": [math.nan, 0.5] if step == 2 else dead})
    assert json.loads((tmp_path / "metrics/metrics.jsonl").read_text().splitlines()[1])["router/load"] == [None, 0.5]
    rows = list(read_rows(tmp_path / "metrics/metrics.jsonl"))
    assert [row.vectors["router/load"] for row in rows] == [dead, [None, 0.5], dead]
    assert rows[0].scalars == scalars(1.0)
    assert [(step, tag) for step, tag, _ in images()] == [(1, "router/load"), (2, "router/load"), (3, "router/load")]
    nothing, even, twice, grey = palette()[[0, EVEN, EVEN + EVEN // 2, NOT_FINITE]].tolist()
    picture = images()[-1][2]
    height, width = picture.shape[0] // 2, picture.shape[1] // 3
    cells = [[picture[row * height, column * width].tolist() for column in range(3)] for row in range(2)]
    assert cells == [[nothing, grey, nothing], [twice, even, twice]]

    with RunLog(tmp_path, total_steps=4, resumed_step=2) as log:
        log.step(3, scalars(1.0), {"router/load": [1.0, 0.0]})
    picture = images()[-1][2]
    assert [picture[0, column * width].tolist() for column in range(3)] == [nothing, grey, twice]


def test_replacing_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    replace_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "new \ud800")
    assert path.read_text() == "old"


def test_the_other_processes_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with SilentRunLog() as log:
        log.step(1, scalars(1.0))
        log.evaluation(1, "bible", {"bleu": 1.0})
        log.message("hello")
    assert capsys.readouterr() == ("", "")


def test_lines_come_at_the_first_step_the_last_and_every_interval(capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    lines = ProgressLines(40, seconds_between_lines=30.0, clock=lambda: now[0])
    for step in range(1, 41):
        now[0] += 2.0  # seconds a step; the first report is at 102
        lines.update(step, scalars(1.0 / step))
    assert capsys.readouterr().err.splitlines() == [
        "step 1/40  loss 1.0000  1,234 tokens/s  ETA -:--:--  elapsed 0:00:02",
        "step 16/40  loss 0.0625  1,234 tokens/s  ETA 0:00:48  elapsed 0:00:32",  # 24 steps left at 2 s
        "step 31/40  loss 0.0323  1,234 tokens/s  ETA 0:00:18  elapsed 0:01:02",
        "step 40/40  loss 0.0250  1,234 tokens/s  ETA 0:00:00  elapsed 0:01:20",
    ]


def test_the_bar_shows_step_loss_speed_and_times_under_the_messages() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None, legacy_windows=False)
    bar = ProgressBar(1000, console)
    bar.update(1, scalars(5.5))
    bar.message("a message with [brackets]")
    bar.update(1000, scalars(3.25))
    bar.close()
    lines = console.file.getvalue().replace("\r", "\n").splitlines()
    assert any("step 1/1,000  loss 5.5000  1,234 tokens/s  ETA -:--:-- 0:00:00" in line for line in lines)
    assert any(line.endswith("a message with [brackets]") for line in lines)
    assert "step 1,000/1,000  loss 3.2500  1,234 tokens/s  ETA 0:00:00 0:00:00" in lines[-2]


def test_a_terminal_gets_the_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with RunLog(tmp_path, total_steps=2) as log:
        log.step(1, scalars(5.5))
    assert "━" in terminal.getvalue()


class FakeWandb:
    """What WandbWriter uses of the wandb module."""

    def __init__(self) -> None:
        self.inits: list[dict[str, str | None]] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **arguments: str | None) -> SimpleNamespace:
        self.inits.append(arguments)
        return SimpleNamespace(
            id=arguments["id"] or "abc123",
            log=lambda row, step: self.rows.append((step, row)),
            finish=lambda: setattr(self, "finished", self.finished + 1),
        )


def test_weights_and_biases_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step in (1, 2):
        with RunLog(tmp_path, total_steps=2, resumed_step=step - 1, wandb_project="tiny") as log:
            log.step(step, scalars(1.0))
            log.evaluation(step, "bible", {"bleu": 2.0})
    assert [init["id"] for init in wandb.inits] == [None, "abc123"]
    assert {init["project"] for init in wandb.inits} == {"tiny"}
    assert wandb.rows == [
        (1, {"loss": 1.0, "tokens_per_second": 1234.5}),
        (1, {"eval/bible/bleu": 2.0}),
        (2, {"loss": 1.0, "tokens_per_second": 1234.5}),
        (2, {"eval/bible/bleu": 2.0}),
    ]
    assert wandb.finished == 2


def test_a_missing_wandb_is_the_users_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 't5x_like\[wandb\]'"):
        WandbWriter("tiny", tmp_path)


def test_run_json_describes_every_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["t5x_like", "train", "--gin.MODEL_DIR=my runs"])
    write_run_json(tmp_path, {"mesh": {"data": 8}, "parameters": 1000, "seeds": {"seed": 0}})
    path = write_run_json(tmp_path, {"mesh": {"data": 4, "model": 2}, "parameters": 1000})

    assert path == tmp_path / "run.json"
    run = json.loads(path.read_text())
    assert run["mesh"] == {"data": 4, "model": 2}
    assert [session["mesh"] for session in run["sessions"]] == [{"data": 8}, {"data": 4, "model": 2}]
    assert run["sessions"][0]["seeds"] == {"seed": 0}
    assert run["command"] == "t5x_like train '--gin.MODEL_DIR=my runs'"
    assert run["devices"] == {"kind": "cpu", "count": 8, "processes": 1}
    assert run["versions"]["jax"] == metadata.version("jax")
    assert set(run["versions"]) >= {"python", "t5x_like", "jaxlib", "flax", "optax", "seqio", "tensorflow"}


def test_a_foreign_run_json_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"run\.json was not written by t5x_like"):
        write_run_json(tmp_path, {})
    assert (tmp_path / "run.json").read_text() == '{"mine": 1}'


def test_git_revision_is_the_commit_and_whether_it_was_changed(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=T", "-c", "user.email=t@example.org")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_revision(tmp_path) is None
    git("init", "--quiet")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "--quiet", "--message=first")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "a").write_text("2")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD") + "-dirty"


def test_evaluations_are_read_back_by_step(tmp_path: Path) -> None:
    assert read_evaluations(tmp_path) == {}
    with RunLog(tmp_path, total_steps=2) as log:
        log.evaluation(1, "bible", {"bleu": 1.0, "perplexity": math.inf})
        log.evaluation(1, "supersense", {"accuracy": 0.25})
        log.evaluation(2, "bible", {"bleu": 3.0})
        log.evaluation(2, "bible", {"bleu": 2.0})
    assert read_evaluations(tmp_path) == {
        1: {"bible/bleu": 1.0, "supersense/accuracy": 0.25},
        2: {"bible/bleu": 2.0},
    }
