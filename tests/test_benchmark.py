"""The benchmark prints one JSON line with the keys that others rely on, and figures that fit together."""

import dataclasses
import functools
import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import SIZES

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("benchmark")


@pytest.fixture
def layers(benchmark: ModuleType) -> ModuleType:
    return benchmark.layers


@pytest.fixture
def tiny(benchmark: ModuleType) -> object:
    """The smallest size, at the lengths of the small one."""
    return dataclasses.replace(benchmark.steps.T5_SMALL, file="models/t5_1_1_tiny.gin", vocab_size=8192)


@pytest.fixture
def tinier(tiny: object) -> object:
    """What compiles in a moment."""
    return dataclasses.replace(tiny, bindings=SIZES, batch_size=2, lengths={"inputs": 16, "targets": 5})


def test_a_case_prints_one_line_that_adds_up(
    benchmark: ModuleType, tiny: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The smallest size stands for the one that the case is about, which takes a minute."""
    monkeypatch.setitem(benchmark.CASES, "train_t5_tiny", functools.partial(benchmark.steps.train, tiny))
    assert benchmark.main(["--case", "train_t5_tiny", "--steps", "1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert (result["case"], result["dtype"], result["parameters"]) == ("train_t5_tiny", "float32", 3_673_088)
    seconds, peak = result["seconds_per_step"], 1e9 * result["matmul_peak_gflops"]
    assert result["seconds"] == [seconds]
    assert result["tokens_per_second"] == pytest.approx(8 * (512 + 114) / seconds, rel=1e-3)
    assert result["share_of_peak"] == pytest.approx(1e12 * result["model_tflop_per_step"] / seconds / peak, abs=2e-3)
    assert result["peak_memory_gib"] > 0.1
    assert result["versions"]["jax"] == __import__("jax").__version__


@pytest.mark.parametrize(
    ("name", "parameters", "predicted", "read"),
    [
        ("T5_SMALL", 76_961_152, 8 * 114, 8 * 512),
        ("GPT2_124M", 124_439_808, 2 * 512, 2 * 511),  # the first token follows the start, whose id is 0
        ("BERT_BASE", 109_514_298, 4 * 19, 4 * 128),
        ("SWITCH", 30_258_944, 8 * 32, 8 * 128),
    ],
)
def test_models_and_batches_are_those_of_the_peers(
    benchmark: ModuleType, name: str, parameters: int, predicted: int, read: int
) -> None:
    """The counts of parameters are those of Hugging Face's models of the same shapes."""
    training = getattr(benchmark.steps, name)
    model = training.model("float32")
    batch = training.batch(model)
    made = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(made)) == parameters
    targets, weights = model.targets(batch)
    assert weights.sum() == predicted == np.count_nonzero(targets)
    tokens = batch["encoder_input_tokens" if "encoder_input_tokens" in batch else "decoder_input_tokens"]
    assert np.count_nonzero(tokens) == read
    assert 0.9 * training.vocab_size < tokens.max() < training.vocab_size
    if "target_positions" in batch:
        assert all(len(set(row)) == 19 for row in batch["target_positions"])


def test_memory_of_a_step_here_and_on_a_device_of_a_topology(
    benchmark: ModuleType, tinier: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another CPU stands for the TPU: there the same program takes the same memory."""
    there = SimpleNamespace(devices=jax.devices()[3:])
    monkeypatch.setattr(benchmark.steps.hardware, "topology", lambda name: there)
    result = benchmark.steps.train(tinier, "bfloat16", 1, topology="v5e:2x2")
    assert result["topology"] == "v5e:2x2"
    assert result["temporary_mib_tpu"] == result["temporary_mib"] > 0.0
    # Parameters, and as large their second moment: Adafactor factors no matrix so small.
    assert result["argument_mib"] == pytest.approx(2 * 4 * result["parameters"] / 2**20, abs=0.06)
    assert "first_step_seconds" not in result, "the cache of these tests may have held the program"


@pytest.mark.parametrize("decoder", ["Greedy", "BeamSearch"])
def test_decoding_runs_to_its_full_length(
    benchmark: ModuleType, tinier: object, monkeypatch: pytest.MonkeyPatch, decoder: str
) -> None:
    asked = []

    class Spy(benchmark.decode.Predictor):
        def generate(self, *args: object) -> tuple:
            tokens, scores = super().generate(*args)
            asked.append((self.model.eos_id, tokens.shape, np.isfinite(scores).all()))
            return tokens, scores

    monkeypatch.setattr(benchmark.decode, "Predictor", Spy)
    result = benchmark.decode.decode(getattr(benchmark, decoder)(), "float32", 2, tinier)
    assert asked == [(-1, (2, 1 if decoder == "Greedy" else 4, 5), True)] * 3
    assert result["tokens_per_batch"] == 10
    assert result["seconds_per_batch"] == pytest.approx(sum(result["seconds"]) / 2, abs=1.1e-4)
    assert result["tokens_per_second"] == pytest.approx(10 / result["seconds_per_batch"], rel=0.05)


@pytest.fixture
def small(layers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sparse layer at sizes that compile in a moment."""
    for name, size in {"LAYER_BATCH": 2, "LAYER_LENGTH": 32, "EMBED_DIM": 16, "MLP_DIM": 64}.items():
        monkeypatch.setattr(layers, name, size)


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
def test_one_hot_dispatch_computes_the_same_layer(layers: ModuleType) -> None:
    capacity = layers.CapacityFactor(1.0, 1.0, 1)
    rivals = [kind(layers.Experts(4, 64), capacity=capacity) for kind in (layers.SparseMlp, layers.OneHotSwitch)]
    results = [run(*arguments) for run, arguments in (layers.layer_gradient(rival, "float32") for rival in rivals)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *results)


@pytest.mark.usefixtures("small")
def test_plain_flax_computes_the_same_dense_layer(layers: ModuleType) -> None:
    ours, arguments = layers.layer_gradient(layers.MlpBlock(64), "float32")
    flax, _ = layers.layer_gradient(layers.FlaxDense(64, "float32"), "float32")
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
    benchmark: ModuleType,
    layers: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    case: str,
) -> None:
    monkeypatch.setattr(layers, "HEADS", 2)
    monkeypatch.setattr(layers, "RADIUS", 8)
    assert benchmark.main(["--case", case, "--length", "64", "--steps", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["length"] == 64
    rounding = 5.1e-5 * (1 + result["ratio"]) + 5.1e-4 * result["seconds_plain"]  # seconds have 4 decimals, ratios 3
    assert result["ratio"] * result["seconds_plain"] == pytest.approx(result["seconds_linear"], rel=0, abs=rounding)
    mask = layers.within(64, causal=True)
    forms = {
        "attention": (layers.Chunked(16, 16), None),
        "sliding_attention": (layers.SlidingWindow(8), mask),
    }
    plain_mask = layers.dataclasses.replace(mask, radius=8) if case == "sliding_attention" else None
    values = []
    for form, seen in (forms[case], (layers.DotProduct(), plain_mask)):
        run, arguments = layers.attention_gradient(form, "float32", 64, seen, case == "attention")
        values.append(run(*arguments))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), *values)
