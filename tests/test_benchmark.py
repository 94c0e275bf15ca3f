"""The benchmark prints one JSON line with the keys that others rely on, and figures that fit together."""

import functools
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parent.parent / "scripts" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("benchmark_script", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_case_prints_one_line_that_adds_up(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The smallest size stands for the one that the case is about, which takes a minute."""
    monkeypatch.setitem(benchmark.CASES, "train_t5_tiny", functools.partial(benchmark.train_t5, "tiny"))
    assert benchmark.main(["--case", "train_t5_tiny", "--steps", "1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert (result["case"], result["dtype"], result["parameters"]) == ("train_t5_tiny", "float32", 3_673_088)
    seconds, peak = result["seconds_per_step"], 1e9 * result["matmul_peak_gflops"]
    assert result["tokens_per_second"] == pytest.approx(8 * (512 + 114) / seconds, rel=1e-3)
    assert result["share_of_peak"] == pytest.approx(1e12 * result["model_tflop_per_step"] / seconds / peak, abs=2e-3)
    assert result["peak_memory_gib"] > 0.1
    assert result["versions"]["jax"] == __import__("jax").__version__


def test_an_unknown_case_is_the_users_mistake(benchmark: ModuleType, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        benchmark.main(["--case", "train_t5_smal"])
    assert exit_.value.code == 2
    assert "train_t5_small" in capsys.readouterr().err
