"""The table of the Switch experiments, from runs written out by hand."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "switch_experiments.py"
spec = importlib.util.spec_from_file_location("switch_experiments", SCRIPT)
assert spec is not None and spec.loader is not None
experiments = importlib.util.module_from_spec(spec)
spec.loader.exec_module(experiments)


def write_run(folder: Path, losses: dict[int, float], load: list[float] | None, dropped: float = 0.0) -> None:
    (folder / "metrics").mkdir(parents=True)
    name = "eval/austen_span_corruption/perplexity"
    rows = [json.dumps({"step": step, name: math.exp(loss)}) for step, loss in losses.items()]
    (folder / "metrics" / "evaluations.jsonl").write_text("\n".join(rows))
    row = {"step": 9, "seconds_per_step": 0.5}
    if load is not None:
        row |= {"router/encoder/layers_1/load": load, "router/dropped": dropped}
    (folder / "metrics" / "metrics.jsonl").write_text(json.dumps(row))
    (folder / "report.html").touch()


def test_the_table_compares_seed_by_seed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_run(tmp_path / "dense-seed0", {100: 6.0, 200: 5.0}, None)
    write_run(tmp_path / "dense-seed1", {100: 6.0, 200: 5.5}, None)
    write_run(tmp_path / "8_experts-seed0", {100: 5.5, 200: 4.5}, [0.25, 0.25], dropped=0.5)
    write_run(tmp_path / "8_experts-seed1", {100: 6.0, 200: 5.75}, [0.5, 0.0], dropped=0.25)
    assert experiments.main(["--runs", str(tmp_path), "--no_train"]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert rows[2] == ["dense", "2", "5.250", "0.354", "-", "-", "-", "-", "0.500"]
    # Seed 0 reaches 5.0 half-way between its evaluations; seed 1 never reaches 5.5. One load is even, one is not.
    assert rows[3] == ["8 experts", "2", "5.125", "0.884", "0.500, -0.250", "1.33, never", "37.5%", "0.500", "0.500"]


def test_a_run_that_has_not_ended_is_not_read(tmp_path: Path) -> None:
    write_run(tmp_path / "dense-seed0", {100: 6.0}, None)
    (tmp_path / "dense-seed0" / "report.html").unlink()
    assert experiments.read(tmp_path / "dense-seed0") is None
