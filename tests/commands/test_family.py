"""Every system of the family as a user runs it: train, go on bitwise, evaluate, infer. The smallest of each."""

import json
import shutil
from pathlib import Path

import pytest
from tiny import train_tiny

from t5x_like import cli
from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.interactive import InteractiveModel

SIZES = """
EMBED_DIM = 16
NUM_HEADS = 2
HEAD_DIM = 8
MLP_DIM = 32
BATCH_SIZE = 8
TRAIN_STEPS = 4
SAVE_PERIOD = 2
EVAL_PERIOD = 4
EVAL_EXAMPLES = 5
"""
SYSTEMS = {  # model, run, and what else makes it small
    "transformer": ("transformer", "translate", "'inputs': 48, 'targets': 32", "NUM_ENCODER_LAYERS NUM_DECODER_LAYERS"),
    "bert": ("bert", "pretrain_masked_lm", "'inputs': 32, 'targets': 5", "NUM_LAYERS"),
    "roberta": ("roberta", "pretrain_full_sentences", "'inputs': 32, 'targets': 5", "NUM_LAYERS"),
    "longformer": ("longformer", "pretrain_full_sentences", "'inputs': 64, 'targets': 10", "NUM_LAYERS"),
    "gpt2": ("gpt2", "pretrain_causal_lm", "'inputs': 0, 'targets': 32", "NUM_LAYERS"),
    "gpt3": ("gpt3", "pretrain_causal_lm", "'inputs': 0, 'targets': 32", ""),
    "lamda": ("lamda", "pretrain_causal_lm", "'inputs': 0, 'targets': 32", "NUM_LAYERS"),
    "prefix_lm": ("prefix_lm", "pretrain_prefix_lm", "'inputs': 32, 'targets': 32", "NUM_LAYERS"),
}
WARMUP = ("bert", "roberta", "longformer", "gpt2", "gpt3", "lamda", "labels")


def config(name: str) -> str:
    model, run, lengths, layers = SYSTEMS[name]
    lines = [f"{macro} = 1" for macro in layers.split()] + ["WARMUP_STEPS = 2"] * (name in WARMUP)
    includes = (
        f"from __gin__ import dynamic_registration\ninclude 'models/{model}_tiny.gin'\ninclude 'runs/{run}.gin'\n"
    )
    return includes + SIZES + f"TASK_FEATURE_LENGTHS = {{{lengths}}}\n" + "\n".join(lines) + "\n"


def digests(folder: Path) -> dict[str, int]:
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints.saved_digests(4)


@pytest.mark.parametrize("name", SYSTEMS)
def test_trains_and_goes_on_bitwise_and_scores_and_infers(name: str, tmp_path: Path) -> None:
    folder, text = tmp_path / "run", config(name)
    assert train_tiny(folder, config=text) == 0
    uninterrupted = digests(folder)
    shutil.rmtree(folder / "checkpoints" / "4")
    assert train_tiny(folder, config=text) == 0
    assert digests(folder) == uninterrupted
    (evaluated,) = (folder / "eval").glob("*/4.jsonl")
    rows = [json.loads(line) for line in evaluated.read_text().splitlines()]
    assert len(rows) == 5
    assert all(row["score"] < 0 for row in rows)

    inputs = tmp_path / "inputs.txt"
    inputs.write_text("It is a [MASK] truth\nShe was\n")
    assert cli.main(["infer", f"--gin.MODEL_DIR={folder}", f"--gin.infer.infer.source={inputs}"]) == 0
    found = [json.loads(line) for line in (folder / "inference" / "inputs-4.jsonl").read_text().splitlines()]
    assert [row["inputs"] for row in found] == ["It is a [MASK] truth", "She was"]
    assert found[0]["predictions"]
    model = InteractiveModel.load(folder)
    assert model.perplexity(["It is a truth"], ["Verily,"]) > 1


def test_a_classifier_starts_from_a_pretrained_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrained, folder = tmp_path / "pretrained", tmp_path / "run"
    assert train_tiny(pretrained, config=config("bert")) == 0
    SYSTEMS["labels"] = ("bert", "classify", "'inputs': 24, 'targets': 1", "NUM_LAYERS")
    text = config("labels").replace("include 'runs", "include 'architectures/classifier.gin'\ninclude 'runs")
    restore = [
        "--gin.train.train.restore=@restore.RestoreFrom()",
        f"--gin.restore.RestoreFrom.path={pretrained}",
        "--gin.restore.RestoreFrom.include=(token_embedder|encoder)/.*",
    ]
    assert train_tiny(folder, *restore, config=text) == 0
    rows = [json.loads(x) for x in (folder / "eval/wordnet_supersense_label/4.jsonl").read_text().splitlines()]
    assert {row["targets"] for row in rows} <= set(InteractiveModel.load(folder).target_vocabulary.names)
    inputs = tmp_path / "inputs.tsv"
    inputs.write_text("cat: a small animal\tanimal\noak: a tree\n")
    assert cli.main(["infer", f"--gin.MODEL_DIR={folder}", f"--gin.infer.infer.source={inputs}"]) == 0
    model = InteractiveModel.load(folder)
    found = [json.loads(line)["predictions"] for line in (folder / "inference/inputs-4.jsonl").read_text().splitlines()]
    assert found == model.generate(["cat: a small animal", "oak: a tree"])
    with_other = Path(folder, "config.gin").read_text()
    assert "RestoreFrom" in with_other
    capsys.readouterr()
