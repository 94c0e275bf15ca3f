"""`t5x_like verify` as users type it: what it prints, what it writes, and how it ends."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from t5x_like import cli
from t5x_like.layers.attention import MultiHeadAttention

EXPERIMENTS = sorted((Path(__file__).parents[2] / "configs" / "experiments").glob("*.gin"))
QUICKSTART = ["verify", "--gin_file=experiments/quickstart.gin"]


def test_a_sheet_of_three_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sheet.json"
    assert cli.main([*QUICKSTART, "--check", "leak", "sparse", "--check", "decoding", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert "made small: vocab_size 8192 -> 64, embed_dim 128 -> 16" in out
    assert re.search(r"^ leak +passed +0 +exact +1\.00 ", out, re.MULTILINE)
    assert re.search(r"^ decoding +passed +[0-9.]+e-0[78] +1e-05 +0\.9\d ", out, re.MULTILINE)
    assert "sparse: does not apply: no sparse layers" in out
    assert re.search(r"all 2 passed in \d+ s on 8 cpu devices", out)
    assert re.search(r"\d s  leak +passed", err)
    rows = json.loads(file.read_text())
    assert [(row["check"], row["passed"], row["first_difference"]) for row in rows] == [
        ("leak", True, None),
        ("decoding", True, None),
    ]
    assert rows[0]["margin"] == 1.0
    assert 0.9 < rows[1]["margin"] < 1.0


def test_a_failed_check_is_named_and_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = MultiHeadAttention._append
    monkeypatch.setattr(MultiHeadAttention, "_append", lambda self, name, x, at: original(self, name, x, at + 1))
    file = tmp_path / "sheet.json"
    assert cli.main([*QUICKSTART, "--check", "decoding", "--json", str(file)]) == 1
    out, err = capsys.readouterr()
    assert re.search(r"decoding: FAILED at log-probability\[\d+, \d+\]: -\d\.\d+ instead of -\d\.\d+", out)
    assert re.search(r"^failed: 1 of 1 in \d+ s on 8 cpu devices: decoding$", err, re.MULTILINE)
    [row] = json.loads(file.read_text())
    assert row["passed"] is False
    assert row["margin"] == -1.0
    assert row["first_difference"].startswith("log-probability[")


def test_a_check_that_does_not_exist_is_the_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*QUICKSTART, "--check", "decodin"]) == 2
    assert "--check decodin: no such check. Did you mean 'decoding'? There are mesh, packing" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("config", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_passes(config: Path, tmp_path: Path) -> None:
    """In a process of its own, which makes its eight devices itself."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PJRT_NPROC")}
    command = [sys.executable, "-m", "t5x_like", "verify", f"--gin_file={config}", "--json", str(tmp_path / "sheet")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 8 cpu devices" in done.stdout
    rows = json.loads((tmp_path / "sheet").read_text())
    assert {"mesh data=8", "scan", "remat full", "resume at step 2 of 4"} <= {row["check"] for row in rows}
    assert all(row["passed"] for row in rows)
