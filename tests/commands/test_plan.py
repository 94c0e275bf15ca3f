"""`t5x_like plan` on the devices that are here: virtual CPUs. TPUs were planned for by hand (docs/plan.md)."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import TRAIN_CONFIG

from t5x_like import cli
from t5x_like.commands import plan as plan_command
from t5x_like.planning.compiled import CannotCompile
from t5x_like.planning.plan import Compiler, Result


class InThisProcess(Compiler):
    """Spares the start of a process; one test starts it."""

    def __call__(self, function: Callable[..., Result], *arguments: object) -> Result:
        return function(*arguments)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(plan_command, "Compiler", InThisProcess)
    file = tmp_path / "run.gin"
    file.write_text(TRAIN_CONFIG)
    return file


def test_a_plan_of_a_mesh_says_what_it_takes_and_is_checked_against_real_steps(config: Path) -> None:
    files = {name: config.with_name(f"plan.{name}") for name in ("json", "html", "gin")}
    code = cli.main(
        [
            *("plan", f"--gin_file={config}", "--mesh=data=2,model=4", "--remat=none", "--price=2.5"),
            *(f"--json={files['json']}", f"--html={files['html']}", f"--gin_out={files['gin']}", "--gin.NUM_HEADS=4"),
        ]
    )
    assert code == 0
    (plan,) = json.loads(files["json"].read_text())
    assert plan["topology"] == "cpu"
    assert plan["mesh"] == {"replica": 1, "data": 2, "expert": 1, "model": 4}
    assert (plan["batch_size"], plan["remat"], plan["microbatches"], plan["fits"]) == (8, "none", 1, True)
    # By hand: 8 rows of 48 + 32 tokens through 1 + 1 layers of width 16, 4 heads of 8, gated MLPs of 32 and 8,192 ids.
    attention, mlp, vocabulary = 2 * 16 * 32 * 4, 2 * 16 * 32 * 3, 2 * 16 * 8192
    encoder = 48 * (attention + mlp) + 2 * 2 * 48 * 48 * 32
    cross = 32 * 2 * 16 * 32 * 2 + 48 * 2 * 16 * 32 * 2 + 2 * 2 * 32 * 48 * 32
    decoder = 32 * (attention + mlp + vocabulary) + 2 * 2 * 32 * 32 * 32 + cross
    assert plan["model_flops"] == 3 * 8 * (encoder + decoder)
    assert plan["flops_per_chip"] * 8 == pytest.approx(plan["model_flops"], rel=0.03)
    assert plan["peak_memory_gib"] >= plan["argument_gib"] > plan["parameters_gib"] > 0
    assert plan["predicted_seconds_per_step"] >= plan["compute_seconds"] > 0
    assert plan["measured_seconds_per_step"] > 0
    ratio = plan["measured_seconds_per_step"] / plan["predicted_seconds_per_step"]
    assert plan["prediction_error"] == pytest.approx(ratio - 1)
    assert plan["tokens_per_second"] == pytest.approx(8 * (48 + 32) / plan["predicted_seconds_per_step"])
    assert plan["price"] == pytest.approx(2.5 * plan["chip_hours"])
    assert plan["chip_hours"] == pytest.approx(6 * plan["predicted_seconds_per_step"] * 8 / 3600)
    assert plan["decode"]["fits"]
    kinds = {each["kind"] for each in plan["collectives"]}
    assert "all-gather" in kinds
    assert all(set(each["axes"]) <= {"data", "model"} for each in plan["collectives"])
    assert "<table>" in files["html"].read_text()
    assert (
        cli.main(["train", f"--gin_file={files['gin']}", f"--gin.MODEL_DIR={config.parent / 'run'}", "--dry_run"]) == 0
    )


def test_a_search_compiles_the_best_and_says_why_others_lost(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = config.with_name("plan.json")
    arguments = ["plan", f"--gin_file={config}", "--remat=full", "--microbatches=1", "--max_compiles=2", "--no_decode"]
    assert cli.main([*arguments, f"--json={file}"]) == 0
    (best,) = json.loads(file.read_text())
    (other,) = best["runners_up"]
    assert best["predicted_seconds_per_step"] <= other["predicted_seconds_per_step"]
    assert "slower" in other["reason"]
    said = " ".join(capsys.readouterr().out.split())
    assert "not compiled:" in said
    assert "measured of this processor" in said
    assert "of the prediction" in said


def test_a_mesh_that_does_not_divide_is_named_with_the_nearest_that_does(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config.with_name("plan.json")
    code = cli.main(["plan", f"--gin_file={config}", "--mesh=model=8", f"--json={file}"])
    assert code == 1
    (plan,) = json.loads(file.read_text())
    assert (plan["fits"], plan["peak_memory_gib"]) == (False, None)
    assert "the nearest that does: replica=1,data=4,expert=1,model=2" in plan["compile_error"]
    assert plan["batch_size"] == 8
    said = capsys.readouterr()
    assert plan["compile_error"] in said.out  # in a line of its own, not wrapped in the table
    assert "nothing that was compiled fits" in said.err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--remat=ful", "--remat=ful: not one of full, .* Did you mean 'full'?"),
        ("--mesh=data=3", "--mesh=data=3: 3 is not 8, the number of devices; try data=8"),
        ("--topology=v5q:2x2", "--topology=v5q:2x2:"),
        (
            "--gin.BATCH_SIZE=7",
            "no mesh of 8 devices divides this job's parameters and its batch of 7; try --gin.BATCH_SIZE=8",
        ),
    ],
)
def test_mistakes(config: Path, capsys: pytest.CaptureFixture[str], argument: str, message: str) -> None:
    assert cli.main(["plan", f"--gin_file={config}", argument]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert all(part in error for part in message.split(".*"))


def test_a_compiler_that_crashes_is_started_again() -> None:
    compiler = Compiler(on_cpu=True)
    try:
        with pytest.raises(CannotCompile, match="the compiler crashed"):
            compiler(os.abort)
        assert compiler(os.getpid) != os.getpid()
    finally:
        compiler.close()
