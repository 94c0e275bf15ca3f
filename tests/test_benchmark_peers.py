"""The benchmark beside a peer: turns, medians, ratios, what is said of mistakes, and the table of targets."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from tiny import SIZES

SCRIPTS = Path(__file__).parent.parent / "scripts"

# Both scripts write down each of their turns, and whether JAX was to keep what it compiles.
PEER = """
import json, os, pathlib, sys
options = dict(argument.removeprefix("--").split("=") for argument in sys.argv[1:])
log = pathlib.Path(__file__).with_name("log")
log.open("a").write(f"peer {options['case']} {options['dtype']} {options['steps']} {options['warmup']}\\n")
times = [4.0, 6.0] if log.read_text().count("peer") == 1 else [5.0, 9.0]
print("loading\\n" + json.dumps({"times": times, "torch": "2.13.0"}))
"""
OURS = """
import json, os, pathlib, sys
options = dict(argument.removeprefix("--").split("=") for argument in sys.argv[1:])
cached = "cached" if "JAX_COMPILATION_CACHE_DIR" in os.environ else "uncached"
pathlib.Path(__file__).with_name("log").open("a").write(f"ours {options['case']} {options['dtype']} {cached}\\n")
line = {"case": options["case"], "dtype": options["dtype"], "device": "cpu", "versions": {"jax": "0.10.2"}}
line |= {"seconds": [2.0, 4.0] if options["dtype"] == "float32" else [1.0, 2.0], "peak_memory_gib": 4.5}
if options["case"].startswith("decode"):
    line["tokens_per_batch"] = 912
if options["case"] == "startup":
    line["seconds"] = 14.5
print(json.dumps(line))
"""


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("benchmark")


@pytest.fixture
def peer(benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A peer that takes no time; and ours take none either."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    (tmp_path / "ours.py").write_text(OURS)
    monkeypatch.setattr(benchmark.peers, "BENCHMARK", tmp_path / "ours.py")
    (tmp_path / "peer.py").write_text(PEER)
    return f"--peer={tmp_path / 'peer.py'}"


def test_turns_alternate_and_medians_are_over_all_of_them(
    benchmark: ModuleType, peer: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert benchmark.main(["--case", "train_t5_small", "--compare", peer, "--steps", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (tmp_path / "log").read_text().splitlines() == [
        "ours train_t5_small float32 cached",
        "peer t5_train_adafactor float32 2 1",
        "ours train_t5_small float32 cached",
        "peer t5_train_adafactor float32 2 1",
    ]
    assert (result["our_seconds"], result["peer_seconds"]) == ([2.0, 4.0, 2.0, 4.0], [4.0, 6.0, 5.0, 9.0])
    assert (result["our_median"], result["peer_median"], result["ratio"]) == (3.0, 5.5, 0.545)
    assert (result["case"], result["dtype"], result["device"]) == ("train_t5_small", "float32", "cpu")
    assert (result["ours"]["peak_memory_gib"], result["peer"]["torch"]) == (4.5, "2.13.0")


def test_bfloat16_is_held_against_the_peers_float32(
    benchmark: ModuleType, peer: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--case", "train_t5_small", "--dtype", "bfloat16", "--compare", peer, "--rounds", "1", "--steps", "2"]
    assert benchmark.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["ratio"] == 0.3
    assert "peer t5_train_adafactor float32" in (tmp_path / "log").read_text()


def test_decoding_is_compared_by_tokens_per_second(
    benchmark: ModuleType, peer: str, capsys: pytest.CaptureFixture
) -> None:
    assert benchmark.main(["--case", "decode_beam4", "--compare", peer]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["our_tokens_per_second"], result["peer_tokens_per_second"]) == (304.0, 165.8)  # 912 / 3, 912 / 5.5
    assert result["ratio"] == 1.833


def test_a_turn_of_ours_is_the_benchmark_itself(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.py").write_text(f"""
import dataclasses, functools, sys
sys.path.insert(0, {str(SCRIPTS)!r})
import benchmark
from benchmarks import steps
tiny = dataclasses.replace(steps.T5_SMALL, bindings={SIZES!r}, vocab_size=64, lengths={{"inputs": 12, "targets": 8}})
benchmark.CASES["train_t5_small"] = functools.partial(steps.train, tiny)
sys.exit(benchmark.main())
""")
    monkeypatch.setattr(benchmark.peers, "BENCHMARK", tmp_path / "tiny.py")
    line = benchmark.peers.our_turn("train_t5_small", "bfloat16", 2, cached=True)
    assert (line["case"], line["dtype"], len(line["seconds"])) == ("train_t5_small", "bfloat16", 2)
    assert line["tokens_per_second"] == pytest.approx(8 * 20 / line["seconds_per_step"], rel=0.05)
    assert "first_step_seconds" not in line


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        (None, 2, "there is no such file"),
        ("print('hello')", 2, "must end with a line of JSON; it printed 'hello\\n'"),
        ("print('{}')", 2, "its last line lacks `times`, a list of seconds, for the case bert_train"),
        ("import sys; sys.exit('no module torch')", 1, "ended with exit code 1:\nno module torch"),
    ],
)
def test_a_peer_that_does_not_do_is_named(
    benchmark: ModuleType, peer: str, capsys: pytest.CaptureFixture, script: str | None, code: int, said: str
) -> None:
    path = Path(peer.removeprefix("--peer="))
    if script is None:
        path.unlink()
    else:
        path.write_text(script)
    assert benchmark.main(["--case", "train_bert_base", "--compare", peer]) == code
    error = capsys.readouterr().err
    assert str(path) in error
    assert said in error


def test_a_python_that_is_not_there(benchmark: ModuleType, peer: str, capsys: pytest.CaptureFixture) -> None:
    assert benchmark.main(["--case", "train_bert_base", "--compare", peer, "--peer_python", "no/python"]) == 2
    assert "no/python: No such file or directory; --peer_python takes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--case=train_t5_small", "--compare"], "--compare needs --peer=PATH"),
        (["--case=attention", "--compare", "--peer=x.py"], "no peer has a case like attention; --compare knows train"),
        (["--case=attention", "--all"], "not allowed with argument"),
        (["--all", "--topology=v5e:2x2"], "--topology means nothing to --all"),
        (["--all", "--steps=1"], "--all has its own --steps"),
        (["--all", "--rounds=0"], "must be at least 1"),
        (["--case=train_switch", "--compare", "--topology=v5e:2x2"], "--topology means nothing to --compare"),
        (["--case=decode_greedy", "--topology=v5e:2x2"], "--topology means nothing to decode_greedy"),
        (["--case=train_switch", "--rounds=0"], "must be at least 1"),
    ],
)
def test_arguments_that_do_not_fit(
    benchmark: ModuleType, capsys: pytest.CaptureFixture, arguments: list[str], said: str
) -> None:
    try:
        code = benchmark.main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert said in capsys.readouterr().err


def test_a_topology_needs_libtpu(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)
    assert benchmark.main(["--case", "train_t5_small", "--topology", "v5e:2x2"]) == 2
    assert "pip install 't5x_like[tpu]'" in capsys.readouterr().err


@pytest.fixture
def short_suite(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = benchmark.suite
    names = ("train_t5_small", "decode_greedy", "startup")
    monkeypatch.setattr(suite, "SUITE", {name: suite.SUITE[name] for name in names})
    monkeypatch.setattr(suite, "TARGETS", [target for target in suite.TARGETS if target.case in names])
    monkeypatch.setattr(suite.time, "strftime", lambda form: "2026-11-22")
    monkeypatch.setattr(suite.os, "cpu_count", lambda: 2)


@pytest.mark.usefixtures("short_suite")
def test_all_cases_end_in_a_table(
    benchmark: ModuleType, peer: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert benchmark.main(["--all", peer, "--rounds", "1"]) == 0
    *lines, _, _ = printed = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["case"] for line in lines[:4]] == ["train_t5_small"] * 2 + ["decode_greedy", "startup"]
    assert printed[4:] == [
        "2026-11-22, cpu, 2 cores; jax 0.10.2, torch 2.13.0.",
        "",
        "| case | ours | peer | ratio | target | met? |",
        "| --- | --- | --- | --- | --- | --- |",
        "| `train_t5_small` float32 | 3.0 s | 5.0 s | 0.6 | ≤ 0.65 | yes |",
        "| `train_t5_small` bfloat16 | 1.5 s | 5.0 s | 0.3 | ≤ 0.45 | yes |",
        "| `train_t5_small` peak_memory_gib | 4.5 GiB |  |  | ≤ 4.46 GiB | no |",
        "| `decode_greedy` float32 | 304.0 tokens/s | 130.3 tokens/s | 2.333 | ≥ 2 | yes |",
        "| `startup` seconds | 14.5 s |  |  | ≤ 15 s | yes |",
    ]
    assert (tmp_path / "log").read_text().splitlines()[-1] == "ours startup float32 uncached"


@pytest.mark.usefixtures("short_suite")
def test_what_fails_is_said_and_the_others_run(
    benchmark: ModuleType, peer: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    script = tmp_path / "ours.py"
    script.write_text("import sys\nif '--case=decode_greedy' in sys.argv: sys.exit('no memory')\n" + script.read_text())
    assert benchmark.main(["--all", peer, "--rounds", "1"]) == 1
    out, err = capsys.readouterr()
    assert "error: decode_greedy: " in err
    assert "no memory" in err
    assert "| `decode_greedy` float32 |  |  |  | ≥ 2 | not measured |" in out
    assert "| `train_t5_small` float32 | 3.0 s | 5.0 s | 0.6 | ≤ 0.65 | yes |" in out


@pytest.mark.usefixtures("short_suite", "peer")
def test_without_a_peer_ours_run_alone(benchmark: ModuleType, capsys: pytest.CaptureFixture) -> None:
    assert benchmark.main(["--all"]) == 0
    out = capsys.readouterr().out
    assert "| `train_t5_small` peak_memory_gib | 4.5 GiB |  |  | ≤ 4.46 GiB | no |" in out
    assert "| `train_t5_small` float32 |  |  |  | ≤ 0.65 | not measured |" in out
