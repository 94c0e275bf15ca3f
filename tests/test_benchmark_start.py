"""The benchmark cases of what surrounds the steps: at the smallest size, their figures fit together."""

import importlib.util
from pathlib import Path
from types import ModuleType

import jax
import pytest


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parent.parent / "scripts" / "benchmarks" / "start.py"
    spec = importlib.util.spec_from_file_location("benchmark_start", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in {"SIZE": "tiny", "BATCHES": 3, "LENGTHS": {"inputs": 64, "targets": 24}}.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_input_is_read_and_counted(start: ModuleType) -> None:
    result = start.input_pipeline("float32", 1)
    # 4 batches of 8 rows, full but for the targets' last token or two, took at least the time of the first.
    assert 0 < result["tokens_per_second"] <= 4 * 8 * (64 + 24) / result["seconds_first_batch"]


def test_parameters_are_made_without_the_cache_which_stays_on(start: ModuleType) -> None:
    before = jax.config.jax_enable_compilation_cache
    result = start.init("float32", 1)
    assert result["parameters"] == 3_673_088
    assert 0 < result["seconds_least"] <= result["seconds"]
    assert jax.config.jax_enable_compilation_cache == before


def test_a_checkpoint_is_saved_and_restored(start: ModuleType) -> None:
    result = start.checkpoint("float32", 2)
    assert result["megabytes"] > 4 * 3_673_088 / 1e6  # float32 parameters, and then the optimiser's
    assert 0 < result["save_blocks_seconds_least"] <= result["save_blocks_seconds"]
    assert result["save_blocks_seconds"] < result["seconds_save_until_committed"]
    assert 0 < result["restore_seconds_least"] <= result["restore_seconds"]


def test_the_real_command_is_timed_to_its_first_step(start: ModuleType) -> None:
    result = start.startup("float32", 1)
    assert result["seconds_cold"] > 1.0  # imports alone take longer
    assert result["seconds"] < result["seconds_cold"]
