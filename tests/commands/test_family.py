"""Every system of the family as a user runs it: train, go on bitwise, evaluate, infer. The smallest of each."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny import train_tiny

from t5x_like import cli
from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.interactive import InteractiveModel


class System(NamedTuple):
    """What a config includes, its lengths, and what else makes it small."""

    includes: tuple[str, ...]
    lengths: str
    small: tuple[str, ...] = ("NUM_LAYERS = 1", "WARMUP_STEPS = 2")

    def config(self) -> str:
        includes = [f"include '{name}.gin'" for name in self.includes]
        sizes = ["EMBED_DIM = 16", "NUM_HEADS = 2", "HEAD_DIM = 8", "MLP_DIM = 32", "BATCH_SIZE = 8"]
        steps = ["TRAIN_STEPS = 4", "SAVE_PERIOD = 2", "EVAL_PERIOD = 4", "EVAL_EXAMPLES = 5"]
        lengths = [f"TASK_FEATURE_LENGTHS = {{{self.lengths}}}"]
        lines = ["from __gin__ import dynamic_registration", *includes, *sizes, *steps, *lengths, *self.small]
        return "\n".join(lines) + "\n"


BERT = System(("models/bert_tiny", "runs/pretrain_masked_lm"), "'inputs': 32, 'targets': 5")
CLASSIFIER = System(
    ("models/bert_tiny", "architectures/classifier", "runs/classify"), "'inputs': 24, 'targets': 1", BERT.small
)
CAUSAL, CAUSAL_LENGTHS = "runs/pretrain_causal_lm", "'inputs': 0, 'targets': 32"
SYSTEMS = {
    "transformer": System(
        ("models/transformer_tiny", "runs/translate"),
        "'inputs': 48, 'targets': 32",
        ("NUM_ENCODER_LAYERS = 1", "NUM_DECODER_LAYERS = 1"),
    ),
    "bert": BERT,
    "roberta": System(("models/roberta_tiny", "runs/pretrain_full_sentences"), "'inputs': 32, 'targets': 5"),
    "longformer": System(("models/longformer_tiny", "runs/pretrain_full_sentences"), "'inputs': 64, 'targets': 10"),
    "gpt2": System(("models/gpt2_tiny", CAUSAL), CAUSAL_LENGTHS),
    "gpt3": System(("models/gpt3_tiny", CAUSAL), CAUSAL_LENGTHS, ("WARMUP_STEPS = 2",)),
    "lamda": System(("models/lamda_tiny", CAUSAL), CAUSAL_LENGTHS),
    "prefix_lm": System(
        ("models/prefix_lm_tiny", "runs/pretrain_prefix_lm"), "'inputs': 32, 'targets': 32", ("NUM_LAYERS = 1",)
    ),
    "xlnet": System(("models/xlnet_tiny", "runs/pretrain_permutation_lm"), "'inputs': 24, 'targets': 4"),
}


def digests(folder: Path) -> dict[str, int]:
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints.saved_digests(4)


def infer(folder: Path, inputs: Path) -> list[dict]:
    assert cli.main(["infer", f"--gin.MODEL_DIR={folder}", f"--gin.infer.infer.source={inputs}"]) == 0
    return [json.loads(line) for line in (folder / "inference" / f"{inputs.stem}-4.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", SYSTEMS)
def test_trains_and_goes_on_bitwise_and_scores_and_infers(name: str, tmp_path: Path) -> None:
    folder, config = tmp_path / "run", SYSTEMS[name].config()
    assert train_tiny(folder, config=config) == 0
    uninterrupted = digests(folder)
    shutil.rmtree(folder / "checkpoints" / "4")
    assert train_tiny(folder, config=config) == 0
    assert digests(folder) == uninterrupted
    (evaluated,) = (folder / "eval").glob("*/4.jsonl")
    evaluated.unlink()
    assert cli.main(["evaluate", f"--gin.MODEL_DIR={folder}", "--gin.EVAL_EXAMPLES=5"]) == 0
    rows = [json.loads(line) for line in evaluated.read_text().splitlines()]
    assert len(rows) == 5
    assert all(row["score"] < 0 for row in rows)

    inputs = tmp_path / "inputs.txt"
    inputs.write_text("It is a [MASK] truth\nShe was\n")
    found = infer(folder, inputs)
    assert [row["inputs"] for row in found] == ["It is a [MASK] truth", "She was"]
    assert bool(found[0]["predictions"]) == (name != "xlnet")  # which is asked for nothing here
    assert InteractiveModel.load(folder).perplexity(["It is a truth"], ["Verily,"]) > 1


def test_a_classifier_starts_from_a_pretrained_encoder(tmp_path: Path) -> None:
    pretrained, folder = tmp_path / "pretrained", tmp_path / "run"
    assert train_tiny(pretrained, config=BERT.config()) == 0
    restore = (
        "--gin.train.train.restore=@restore.RestoreFrom()",
        f"--gin.restore.RestoreFrom.path={pretrained}",
        "--gin.restore.RestoreFrom.include=(token_embedder|encoder)/.*",
    )
    assert train_tiny(folder, *restore, config=CLASSIFIER.config()) == 0
    model = InteractiveModel.load(folder)
    rows = [json.loads(x) for x in (folder / "eval/wordnet_supersense_label/4.jsonl").read_text().splitlines()]
    assert {row["targets"] for row in rows} <= set(model.target_vocabulary.names)
    inputs = tmp_path / "inputs.tsv"
    inputs.write_text("cat: a small animal\tanimal\noak: a tree\n")
    found = infer(folder, inputs)
    assert [row["targets"] for row in found] == ["animal", ""]
    assert [row["predictions"] for row in found] == model.generate(["cat: a small animal", "oak: a tree"])


@pytest.mark.parametrize(
    ("head", "run", "lengths"),
    [
        ("token_classifier", "classify_tokens", "'inputs': 72, 'targets': 52"),
        ("span_classifier", "find_span", "'inputs': 224, 'targets': 2"),
        ("multiple_choice", "choose", "'inputs': 320, 'targets': 1"),
    ],
)
def test_other_heads_train_and_answer(head: str, run: str, lengths: str, tmp_path: Path) -> None:
    system = System(("models/bert_tiny", f"architectures/{head}", f"runs/{run}"), lengths)
    assert train_tiny(tmp_path / "run", config=system.config()) == 0
    (evaluated,) = (tmp_path / "run" / "eval").glob("*/4.jsonl")
    rows = [json.loads(line) for line in evaluated.read_text().splitlines()]
    assert len(rows) == 5
    assert all(row["predictions"] and row["score"] < 0 for row in rows)
