"""XLNet by the same commands as T5."""

import json
import math
import signal
from pathlib import Path

import pytest
from tiny import train_tiny

from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.training.trainer import Monitor

CONFIG = """
from __gin__ import dynamic_registration
include 'models/xlnet_tiny.gin'
include 'runs/pretrain_permutation_lm.gin'
TASK_FEATURE_LENGTHS = {'inputs': 24, 'targets': 4}
EMBED_DIM = 16
NUM_HEADS = 2
HEAD_DIM = 8
MLP_DIM = 32
NUM_LAYERS = 1
BATCH_SIZE = 8
TRAIN_STEPS = 30
WARMUP_STEPS = 10
SAVE_PERIOD = 30
EVAL_PERIOD = 30
EVAL_EXAMPLES = 5
DROPOUT_RATE = 0.1
"""


def test_a_run_that_goes_on_is_one_that_was_never_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    add = Monitor.add

    def stop(self: Monitor, step: int, *rest: object) -> None:
        add(self, step, *rest)
        if step == 12:  # seen after the step that follows
            signal.raise_signal(signal.SIGTERM)

    assert train_tiny(once, config=CONFIG) == 0
    with monkeypatch.context() as patched:
        patched.setattr(Monitor, "add", stop)
        assert train_tiny(twice, config=CONFIG) == 0
    assert [path.name for path in (twice / "checkpoints").iterdir()] == ["13"]
    assert train_tiny(twice, config=CONFIG) == 0
    digests = []
    for folder in (once, twice):
        with Checkpoints(folder / "checkpoints") as checkpoints:
            digests.append(checkpoints.saved_digests(30))
    assert digests[0] == digests[1]

    rows = [json.loads(line) for line in (once / "metrics" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert rows[-1]["loss"] < rows[0]["loss"] < 1.1 * math.log(8192)
    lines = (once / "eval" / "austen_permutation_lm" / "30.jsonl").read_text().splitlines()
    assert len(lines) == 5
    assert all(json.loads(line)["score"] < 0 and json.loads(line)["predictions"] is None for line in lines)
