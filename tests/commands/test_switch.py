"""A Switch Transformer by the same commands as T5, and the ways between dense, sparse and fewer experts."""

import json
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import SWITCH_CONFIG, TRAIN_CONFIG, random_batch, train_tiny

from t5x_like import InteractiveModel, cli, gin_config
from t5x_like.architectures.variables import named_leaves
from t5x_like.checkpoints.experts import LOGGED_ROWS, Merge, Prune, ReduceExperts, Upcycle
from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.errors import UserError
from t5x_like.models.encoder_decoder import EncoderDecoderModel
from t5x_like.training.run_log import read_evaluations
from t5x_like.training.trainer import Monitor
from t5x_like.typing import Params

SIZES = ("EMBED_DIM=16", "NUM_HEADS=2", "HEAD_DIM=8", "MLP_DIM=32", "DTYPE=float32", "DROPOUT_RATE=0.0")
LAYERS = ("encoder/layers_1", "decoder/layers_1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of a Switch Transformer with four experts, never interrupted."""
    folder = tmp_path_factory.mktemp("switch") / "run"
    assert train_tiny(folder, config=SWITCH_CONFIG) == 0
    return folder


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a T5 1.0 with two layers on either side."""
    folder = tmp_path_factory.mktemp("dense") / "run"
    config = TRAIN_CONFIG.replace("t5_1_1_tiny", "t5_1_0_tiny").replace("CODER_LAYERS = 1", "CODER_LAYERS = 2")
    assert train_tiny(folder, "--gin.TRAIN_STEPS=2", "--gin.EVAL_EXAMPLES=1", config=config) == 0
    return folder


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics" / "metrics.jsonl").read_text().splitlines()]


def digests(folder: Path) -> dict[str, int]:
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints.saved_digests(6)


def switch(*bindings: str) -> tuple[EncoderDecoderModel, Params]:
    """A Switch Transformer of the runs' sizes and its first parameters."""
    sizes = [*SIZES, "NUM_ENCODER_BLOCKS=1", "NUM_DECODER_BLOCKS=1", "NUM_EXPERTS=4", *bindings]
    model = gin_config.run(gin_config.load(EncoderDecoderModel, ["models/switch_tiny.gin"], sizes))
    assert isinstance(model, EncoderDecoderModel)
    return model, jax.jit(lambda: model.init(jax.random.key(7), random_batch(2)))()


def test_what_routers_do_is_logged_by_layer(run: Path) -> None:
    for row in rows(run):
        for layer in LAYERS:
            load, dropped = row[f"router/{layer}/load"], row[f"router/{layer}/dropped"]
            assert len(load) == 4
            assert sum(load) + dropped == pytest.approx(1.0, abs=1e-6)
            assert row[f"router/{layer}/balance_loss"] == pytest.approx(1.0, abs=0.5)
            assert 0.25 <= row[f"router/{layer}/confidence"] <= 1.0
            assert 0.0 < row[f"router/{layer}/entropy"] <= np.log(4) + 1e-6
        both = [row[f"router/{layer}/entropy"] for layer in LAYERS]
        assert min(both) <= row["router/entropy"] <= max(both)
    assert "encoder/layers_1" in (run / "report.html").read_text()


def test_a_stopped_run_goes_on_bitwise(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, add = tmp_path / "run", Monitor.add

    def stop(self: Monitor, step: int, *rest: object) -> None:
        add(self, step, *rest)
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Monitor, "add", stop)
        assert train_tiny(folder, config=SWITCH_CONFIG) == 0
    assert max(int(path.name) for path in (folder / "checkpoints").iterdir()) == 4
    assert train_tiny(folder, config=SWITCH_CONFIG) == 0
    assert digests(folder) == digests(run)
    assert [row["router/encoder/layers_1/load"] for row in rows(folder)] == [
        row["router/encoder/layers_1/load"] for row in rows(run)
    ]


def test_evaluate_and_infer_need_no_more_than_the_folder(run: Path, tmp_path: Path) -> None:
    expected = read_evaluations(run)[6]
    (run / "metrics" / "evaluations.jsonl").unlink()
    assert cli.main(["evaluate", f"--gin.MODEL_DIR={run}"]) == 0
    assert read_evaluations(run) == {6: expected}
    source, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("supersense: dog: an animal\nsupersense: oak: a tree\n")
    arguments = [f"--gin.infer.infer.source={source}", f"--gin.infer.infer.output={out}"]
    assert cli.main(["infer", f"--gin.MODEL_DIR={run}", *arguments]) == 0
    texts = [json.loads(line)["predictions"] for line in out.read_text().splitlines()]
    assert texts == InteractiveModel.load(run).generate(source.read_text().splitlines(), max_length=32)


@pytest.mark.parametrize("choices", [1, 2])
def test_an_upcycled_model_begins_as_the_dense_one(dense_run: Path, choices: int) -> None:
    dense = InteractiveModel.load(dense_run)
    bindings = ("routing.TopK.normalize=True", "EVAL_EXPERT_CAPACITY_FACTOR=4.0", f"NUM_SELECTED_EXPERTS={choices}")
    model, params = switch(*bindings)
    upcycled, batch = Upcycle(str(dense_run))(params), random_batch(3)
    real = np.asarray(batch["decoder_loss_weights"]) > 0  # sparse layers leave padding alone
    np.testing.assert_allclose(model.logits(upcycled, batch)[real], dense.logits(batch)[real], atol=2e-5)
    ours, before = dict(named_leaves(upcycled)), dict(named_leaves(params))
    theirs = dict(named_leaves(dense.params))
    for name, leaf in ours.items():
        if "/router/" in name:
            np.testing.assert_array_equal(leaf, before[name])
        else:
            expected = theirs[name.replace("/expert/", "/")]
            np.testing.assert_array_equal(leaf, np.broadcast_to(expected, leaf.shape))


def parameters(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in named_leaves(InteractiveModel.load(folder).params)}


def loads(folder: Path, layer: str) -> np.ndarray:
    return np.mean([row[f"router/{layer}/load"] for row in rows(folder)][-LOGGED_ROWS:], axis=0)


def test_pruning_keeps_the_busiest_experts(run: Path) -> None:
    _, params = switch("NUM_EXPERTS=2")
    ours, theirs = dict(named_leaves(ReduceExperts(str(run), Prune())(params))), parameters(run)
    for name, leaf in theirs.items():
        layer = name.rpartition("/mlp/")[0]
        kept = sorted(np.argsort(-loads(run, layer))[:2]) if layer in LAYERS else None
        if "/expert/" in name:
            np.testing.assert_array_equal(ours[name], leaf[kept])
        elif "/router/" in name:
            np.testing.assert_array_equal(ours[name], leaf[:, kept])
        else:
            np.testing.assert_array_equal(ours[name], leaf)


def test_merging_averages_the_others_into_the_kept_ones_by_load(run: Path) -> None:
    _, params = switch("NUM_EXPERTS=2")
    ours, theirs = dict(named_leaves(ReduceExperts(str(run), Merge())(params))), parameters(run)
    for layer in LAYERS:
        load, router = loads(run, layer), theirs[f"{layer}/mlp/router/router_weights/kernel"]
        kept = sorted(np.argsort(-load)[:2])
        groups: list[list[int]] = [[], []]
        for expert in range(4):
            likeness = [
                router[:, expert] @ router[:, k] / np.linalg.norm(router[:, expert]) / np.linalg.norm(router[:, k])
                for k in kept
            ]
            groups[kept.index(expert) if expert in kept else int(np.argmax(likeness))].append(expert)
        for i, group in enumerate(groups):
            weights = load[group] / load[group].sum()
            for kernel in ("wi", "wo"):
                name = f"{layer}/mlp/expert/{kernel}/kernel"
                expected = sum(w * theirs[name][e] for w, e in zip(weights, group, strict=True))
                np.testing.assert_allclose(ours[name][i], expected, atol=1e-6)
            column = sum(w * router[:, e] for w, e in zip(weights, group, strict=True))
            np.testing.assert_allclose(ours[f"{layer}/mlp/router/router_weights/kernel"][:, i], column, atol=1e-6)


def test_mistakes_are_explained(run: Path, dense_run: Path) -> None:
    _, params = switch("NUM_EXPERTS=8")
    with pytest.raises(UserError, match=r"has 4 experts in (en|de)coder/layers_1, fewer than the 8 wanted"):
        ReduceExperts(str(run), Prune())(params)
    with pytest.raises(UserError, match=r"Upcycle: .*has no checkpoint of step 3"):
        Upcycle(str(dense_run), step=3)(params)
    with pytest.raises(UserError, match="this model has no experts"):
        Upcycle(str(dense_run))({"mlp": params["encoder"]["layers_0"]["mlp"]})
    with pytest.raises(UserError, match="needs sparse layers that are not scanned"):
        ReduceExperts(str(run), Merge())(params["encoder"]["layers_0"])


def test_a_dense_student_learns_from_a_switch_teacher(run: Path, tmp_path: Path) -> None:
    """The shipped config, shrunk: the teacher stays as it was, the student's shared weights begin as its own."""
    shrunk = [line for line in SWITCH_CONFIG.splitlines() if " = " in line]
    lines = ["from __gin__ import dynamic_registration", "include 'experiments/switch_distill.gin'", *shrunk]
    config = "\n".join([*lines, f"SWITCH_RUN = '{run}'", "GROUP_SIZE = None"])
    folder = tmp_path / "run"
    assert train_tiny(folder, "--gin.TRAIN_STEPS=2", "--gin.EVAL_EXAMPLES=2", config=config) == 0
    ours, teacher = parameters(folder), parameters(run)
    for name, leaf in teacher.items():
        np.testing.assert_array_equal(ours[f"teacher/{name}"], leaf)
    students = {name.removeprefix("student/"): leaf for name, leaf in ours.items() if name.startswith("student/")}
    assert students["encoder/layers_1/mlp/wi/kernel"].shape == (16, 32)
    for name in (
        "token_embedder/embedding",
        "encoder/layers_1/attention/query/kernel",
        "decoder/layers_0/mlp/wo/kernel",
    ):
        moved = np.abs(students[name] - teacher[name]).max() / np.abs(teacher[name]).max()
        assert 0.0 < moved < 0.05, name  # two small steps from the teacher's
    row = rows(folder)[0]
    assert row["loss"] == pytest.approx(0.75 * row["hard_loss"] + 0.25 * row["soft_loss"], rel=1e-6)
    assert InteractiveModel.load(folder).generate(["supersense: dog: an animal"], max_length=4)[0] is not None
