"""The smallest T5 that still has every part, and batches for it."""

from pathlib import Path

import numpy as np

from t5x_like import cli, gin_config
from t5x_like.models.encoder_decoder import EncoderDecoderModel

SIZES = ("EMBED_DIM=16", "NUM_HEADS=2", "HEAD_DIM=8", "MLP_DIM=32", "NUM_ENCODER_LAYERS=2", "NUM_DECODER_LAYERS=2")
LENGTHS = {"inputs": 12, "targets": 8}


def tiny_model(*bindings: str, vocab_size: int = 64) -> EncoderDecoderModel:
    """T5 1.1 from the shipped config, shrunk; `bindings` as on the command line."""
    overrides = [*SIZES, f"VOCAB_SIZE={vocab_size}", "DTYPE=float32", "DROPOUT_RATE=0.0", *bindings]
    return gin_config.run(gin_config.load(EncoderDecoderModel, ["models/t5_1_1_tiny.gin"], overrides))


def random_batch(rows: int, seed: int = 0, pack: bool = False) -> dict[str, np.ndarray]:
    """Rows of different lengths, so that there is padding; `pack` puts two examples in each."""
    rng = np.random.default_rng(seed)

    def example(shorten: int) -> dict[str, np.ndarray]:
        return {name: rng.integers(2, 64, rng.integers(2, size // shorten + 1)) for name, size in LENGTHS.items()}

    count = 2 if pack else 1
    examples = [[example(count) for _ in range(count)] for _ in range(rows)]
    return tiny_model().converter.convert(examples, LENGTHS, packed=pack)


TRAIN_CONFIG = """
from __gin__ import dynamic_registration
include 'models/t5_1_1_tiny.gin'
include 'runs/finetune.gin'
EMBED_DIM = 16
NUM_HEADS = 2
HEAD_DIM = 8
MLP_DIM = 32
NUM_ENCODER_LAYERS = 1
NUM_DECODER_LAYERS = 1
TASK_FEATURE_LENGTHS = {'inputs': 48, 'targets': 32}
BATCH_SIZE = 8
TRAIN_STEPS = 6
SAVE_PERIOD = 2
EVAL_PERIOD = 4
EVAL_EXAMPLES = 5
"""


SWITCH_CONFIG = (
    TRAIN_CONFIG.replace("t5_1_1_tiny", "switch_tiny")
    .replace("NUM_ENCODER_LAYERS", "NUM_ENCODER_BLOCKS")
    .replace("NUM_DECODER_LAYERS", "NUM_DECODER_BLOCKS")
    + "NUM_EXPERTS = 4\n"
)
"""The same run of a Switch Transformer: one dense and one sparse layer on either side."""


def train_tiny(folder: Path, *arguments: str, config: str = TRAIN_CONFIG) -> int:
    """`t5x_like train` into `folder` with a config and more arguments; the exit code."""
    file = folder.with_name(f"{folder.name}.gin")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(config)
    return cli.main(["train", f"--gin_file={file}", f"--gin.MODEL_DIR={folder}", *arguments])
