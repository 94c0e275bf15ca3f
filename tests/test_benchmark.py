"""The benchmark prints one JSON line with the keys that others rely on, and figures that fit together."""

import functools
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
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


@pytest.fixture
def small(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sparse layer at sizes that compile in a moment."""
    for name, size in {"LAYER_BATCH": 2, "LAYER_LENGTH": 32, "EMBED_DIM": 16, "MLP_DIM": 64}.items():
        monkeypatch.setattr(benchmark, name, size)


@pytest.mark.usefixtures("small")
def test_the_rivals_of_the_sparse_layer_are_timed_and_add_up(
    benchmark: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    assert benchmark.main(["--case", "switch_layer", "--experts", "4", "--steps", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["experts"] == 4
    for name, one, other in (
        ("ratio", "sparse", "dense"),
        ("ratio_flax_dense", "sparse", "flax_dense"),
        ("ratio_one_hot", "one_hot", "dense"),
    ):
        ratio, seconds, over = result[name], result[f"seconds_{one}"], result[f"seconds_{other}"]
        rounding = 5.1e-5 * (1 + ratio) + 5.1e-4 * over  # seconds have 4 decimals, ratios 3
        assert ratio * over == pytest.approx(seconds, rel=0, abs=rounding), name


@pytest.mark.usefixtures("small")
def test_one_hot_dispatch_computes_the_same_layer(benchmark: ModuleType) -> None:
    capacity = benchmark.CapacityFactor(1.0, 1.0, 1)
    layers = [
        kind(benchmark.Experts(4, 64), capacity=capacity) for kind in (benchmark.SparseMlp, benchmark.OneHotSwitch)
    ]
    results = [run(*arguments) for run, arguments in (benchmark.layer_gradient(layer, "float32") for layer in layers)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *results)


@pytest.mark.usefixtures("small")
def test_plain_flax_computes_the_same_dense_layer(benchmark: ModuleType) -> None:
    ours, arguments = benchmark.layer_gradient(benchmark.MlpBlock(64), "float32")
    flax, _ = benchmark.layer_gradient(benchmark.FlaxDense(64, "float32"), "float32")
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(compare, ours(*arguments), flax(*arguments))


@pytest.mark.usefixtures("small")
def test_flops_by_hand(benchmark: ModuleType, capsys: pytest.CaptureFixture) -> None:
    assert benchmark.main(["--case", "switch_flops", "--experts", "4"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["flops_arithmetic"] == 3 * (2 * 64 * 2 * 16 * 64 + 2 * 64 * 16 * 4)
    assert result["ratio"] == round(result["flops_counted"] / result["flops_arithmetic"], 4)
    assert result["ratio"] > 1.0


def test_an_unknown_case_is_the_users_mistake(benchmark: ModuleType, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        benchmark.main(["--case", "train_t5_smal"])
    assert exit_.value.code == 2
    assert "train_t5_small" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        benchmark.main(["--case", "train_t5_small", "--experts", "8"])
    assert exit_.value.code == 2
    assert "--experts means nothing to train_t5_small" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["attention", "sliding_attention"])
def test_forms_of_attention_are_timed_and_compute_the_same(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, case: str
) -> None:
    monkeypatch.setattr(benchmark, "HEADS", 2)
    monkeypatch.setattr(benchmark, "RADIUS", 8)
    assert benchmark.main(["--case", case, "--length", "64", "--steps", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["length"] == 64
    rounding = 5.1e-5 * (1 + result["ratio"]) + 5.1e-4 * result["seconds_plain"]  # seconds have 4 decimals, ratios 3
    assert result["ratio"] * result["seconds_plain"] == pytest.approx(result["seconds_linear"], rel=0, abs=rounding)
    mask = benchmark.within(64, causal=True)
    forms = {"attention": (benchmark.Chunked(16, 16), None), "sliding_attention": (benchmark.SlidingWindow(8), mask)}
    plain_mask = benchmark.dataclasses.replace(mask, radius=8) if case == "sliding_attention" else None
    values = []
    for form, seen in (forms[case], (benchmark.DotProduct(), plain_mask)):
        run, arguments = benchmark.attention_gradient(form, "float32", 64, seen, case == "attention")
        values.append(run(*arguments))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), *values)
