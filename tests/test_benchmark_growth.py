"""How cost grows with the work: figures that fit together, and what stays when chips and batch grow together."""

import dataclasses
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from t5x_like.errors import UserError
from t5x_like.planning import hardware
from t5x_like.planning.choice import Choice
from t5x_like.planning.compiled import Cost, Job, Traffic, cost, shard_gib
from t5x_like.planning.plan import Plan
from t5x_like.recipe import Recipe

SCRIPTS = Path(__file__).parent.parent / "scripts"
SMALL = (
    *("EMBED_DIM=32", "NUM_HEADS=4", "HEAD_DIM=8", "MLP_DIM=64", "VOCAB_SIZE=8192"),
    "TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 16}",
)


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("benchmark")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_what_grows_here_is_measured_size_by_size(benchmark: ModuleType) -> None:
    def bindings(size: int) -> tuple[str, ...]:
        return (*SMALL, "BATCH_SIZE=8", f"NUM_EXPERTS={size}")

    line = benchmark.growth.here(
        dataclasses.replace(benchmark.growth.EXPERTS, sizes=(2, 8), bindings=bindings), "float32", 1
    )
    few, many = line["points"]
    assert (few["experts"], many["experts"]) == (2, 8)
    assert few["gflop_per_token"] <= many["gflop_per_token"] < 1.2 * few["gflop_per_token"]  # routers, and whole slots
    experts = 4 * 6 * 2 * 32 * 64 / 2**30  # two matrices in float32, in one layer of either side
    assert many["state_gib"] - few["state_gib"] == pytest.approx(2 * experts, abs=1.1e-3)
    assert all(point["memory_gib"] > point["state_gib"] and point["tokens_per_second"] > 0 for point in line["points"])


@pytest.mark.parametrize("fsdp", [False, True])
def test_with_more_devices_and_as_many_more_examples_each_does_the_same(benchmark: ModuleType, fsdp: bool) -> None:
    points, state = [], []
    for devices in (2, 4, 8):
        sizes = ("NUM_ENCODER_LAYERS=2", "NUM_DECODER_LAYERS=2", f"BATCH_SIZE={4 * devices}")
        recipe = Recipe(["models/t5_1_1_tiny.gin", "runs/pretrain.gin"], ("SCAN_LAYERS=True", *SMALL, *sizes))
        whole = hardware.present()
        target = dataclasses.replace(whole, devices=whole.devices[:devices])
        choice = Choice((1, devices, 1, 1), "none", 1, fsdp)
        job = Job.of(recipe, target, choice)
        plan = Plan(
            *("cpu", devices, choice, dict(job.partitioner.mesh.shape)),
            parameters_gib=shard_gib(job.state.params),
            optimizer_gib=shard_gib(job.state.opt_state),
            train=cost(job.train_step, target, job.partitioner),
        )
        points.append(benchmark.growth.on_chips(plan))
        state.append(plan.parameters_gib + plan.optimizer_gib)
    for name in ("gflop", "endless_gib"):
        values = [point[name] for point in points]
        assert 0 < max(values) <= 1.1 * min(values), name
    assert (state[2] < state[0] / 3) == fsdp


def test_what_a_chip_would_send_along_an_endless_axis(benchmark: ModuleType) -> None:
    traffic = (
        Traffic("all-gather", ("data",), "ICI", 3.0, 1.0),  # 3 of 4 parts come from others
        Traffic("all-reduce", ("data", "model"), "ICI", 7.0, 1.0),
    )
    plan = Plan(
        *("v5p:2x2x2", 8, Choice(), {"replica": 1, "data": 4, "expert": 1, "model": 2}),
        parameters_gib=1.0,
        train=Cost(True, 5.0, flops_per_chip=2e9, traffic=traffic),
    )
    point = benchmark.growth.on_chips(plan)
    assert (point["sent_gib"], point["endless_gib"], point["gflop"], point["state_gib"]) == (10.0, 12.0, 2.0, 1.0)


HERE = {"tokens_per_second": 100.0, "gflop_per_token": 2.0, "share_of_peak": 0.5, "memory_gib": 2.0, "state_gib": 1.0}
ON_CHIPS = {"gflop": 5.0, "memory_gib": 2.0, "sent_gib": 3.0}


@pytest.mark.parametrize(("spread", "verdict"), [(1.1, "flat"), (1.2, "NOT FLAT")])
def test_all_growth_is_listed_and_drawn(
    benchmark: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    spread: float,
    verdict: str,
) -> None:
    """Processes that take minutes are stood in for; every case of the suite is one that the command knows."""

    def turn(case: str, dtype: str, steps: int, cached: bool) -> dict[str, object]:
        assert case in benchmark.CASES
        along = case.removeprefix("growth_")
        if along == "chips":
            points = [ON_CHIPS | {"chips": chips} for chips in (8, 2048)]
            ways = [{"way": "T5, FSDP", "points": points, "most_over_least": {"gflop": 1.01, "memory_gib": spread}}]
            return {"case": case, "dtype": dtype, "along": along, "ways": ways}
        return {"case": case, "dtype": dtype, "along": along, "points": [{along: n, **HERE} for n in (1, 4)]}

    monkeypatch.setattr(benchmark.peers, "our_turn", turn)
    plot = tmp_path / "growth.svg"
    assert benchmark.main(["--growth", f"--plot={plot}"]) == (verdict != "flat")
    said = capsys.readouterr().out.splitlines()
    lines = [json.loads(line) for line in said if line.startswith("{")]
    assert [line["along"] for line in lines] == ["length", "batch", "layers", "experts", "chips"]
    assert "| 5.0 | 2.0 | 3.0 | 2,048 |" in said
    assert said[-1] == f"T5, FSDP, most over least: gflop 1.010, memory_gib {spread:.3f}: {verdict}"
    drawn = plot.read_text()
    assert drawn.count(">T5, FSDP</text>") == 3
    assert "tokens/s here, by experts" in drawn


@pytest.mark.parametrize(("plot", "wrong"), [("growth.txt", ".svg"), ("nowhere/growth.svg", "no folder nowhere")])
def test_a_plot_that_cannot_be_drawn_is_said_first(benchmark: ModuleType, plot: str, wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        benchmark.growth.check_plot(Path(plot))
    assert benchmark.main(["--growth", f"--plot={plot}"]) == 2


def test_a_plot_belongs_to_growth(benchmark: ModuleType, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--case=init", "--plot=growth.svg"])
    assert "--plot belongs to --growth" in capsys.readouterr().err
