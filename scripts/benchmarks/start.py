"""What comes before and between the steps of T5.1.1 small: input, start-up, first parameters, checkpoints.

Every case is a function of the dtype of the matrix products and of how often to measure, and returns what it found.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from t5x_like import gin_config
from t5x_like.checkpoints.manager import CheckpointPolicy, Checkpoints
from t5x_like.data.loader import DatasetConfig, TrainLoader, prefetch
from t5x_like.models.encoder_decoder import EncoderDecoderModel
from t5x_like.sharding import Partitioner
from t5x_like.training import optimizers, train_state
from t5x_like.training.train_state import TrainState

SIZE = "small"
BATCH_SIZE = 8
LENGTHS = {"inputs": 512, "targets": 114}
BATCHES = 500  # in one measurement of the input pipeline: more than two passes over the corpus
POSITION = {"0": {"block": 0, "row": 0, "tasks": {"austen_span_corruption": [0, 0]}}}

COMMAND = "import sys; from t5x_like.cli import main; sys.exit(main())"


def input_pipeline(dtype: str, steps: int) -> dict[str, object]:
    """Packed span corruption on the shipped novels, as the training loop gets it; `dtype` changes nothing."""
    config = DatasetConfig("austen_span_corruption", LENGTHS, BATCH_SIZE, pack=True)
    rates, first = [], []
    for _ in range(steps):
        start = time.perf_counter()
        batches = prefetch(TrainLoader(config, _model(dtype).converter).batches())
        next(batches)
        first.append(time.perf_counter() - start)
        tokens = 0
        for _ in range(BATCHES):
            batch, _ = next(batches)
            names = ("encoder_input_tokens", "decoder_target_tokens")
            tokens += sum(int(np.count_nonzero(batch[name])) for name in names)
        rates.append(tokens / (time.perf_counter() - start))
        batches.close()
    rate = statistics.median(rates)
    return {
        "tokens_per_second": round(rate),
        "seconds_first_batch": round(min(first), 3),
        "batches": BATCHES,
    }


def init(dtype: str, steps: int) -> dict[str, object]:
    """Fresh parameters and optimiser state, traced and compiled anew each time, with no cache of compiled programs."""
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        seconds, state = [], None
        for _ in range(steps):
            jax.clear_caches()
            state = None  # or two states would be in memory
            start = time.perf_counter()
            state = jax.block_until_ready(_state(dtype))
            seconds.append(time.perf_counter() - start)
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
    assert state is not None
    return _median(seconds) | {"parameters": train_state.count_parameters(state.params)}


def checkpoint(dtype: str, steps: int) -> dict[str, object]:
    """A save of parameters and Adafactor's state as the loop waits for it, until it is on disk, and a restore of it."""
    state = jax.block_until_ready(_state(dtype))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    blocked, committed, restored = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        with Checkpoints(folder, CheckpointPolicy(keep_last=1)) as checkpoints:
            for step in range(steps + 1):
                start = time.perf_counter()
                checkpoints.save(step, state, POSITION)
                blocked.append(time.perf_counter() - start)
                assert checkpoints.steps()[-1] == step  # waits for it
                committed.append(time.perf_counter() - start)
        with Checkpoints(folder) as checkpoints:
            for _ in range(steps):
                start = time.perf_counter()
                jax.block_until_ready(checkpoints.restore_latest(like))
                restored.append(time.perf_counter() - start)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    return {
        "megabytes": round(size / 1e6, 1),
        "seconds_save_blocks_first": round(blocked[0], 3),  # with what it compiles
        "seconds_save_until_committed": round(statistics.median(committed[1:]), 3),
        **{f"save_blocks_{name}": value for name, value in _median(blocked[1:]).items()},
        **{f"restore_{name}": value for name, value in _median(restored).items()},
    }


def startup(dtype: str, steps: int) -> dict[str, object]:
    """From command to the end of the first training step, `t5x_like train` on shipped text: once cold, then warm."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = [_first_step(Path(folder), name, dtype) for name in ("cold", *(f"warm_{i}" for i in range(steps)))]
    return {"seconds_cold": round(seconds[0], 2), **_median(seconds[1:])}


def _first_step(folder: Path, name: str, dtype: str) -> float:
    """Seconds until a new run reports its first step; compiled programs are kept in `folder`."""
    bindings = {"MODEL_DIR": folder / name, "BATCH_SIZE": BATCH_SIZE, "TASK_FEATURE_LENGTHS": LENGTHS}
    bindings |= {"TRAIN_STEPS": 1, "DTYPE": dtype, "train.train.evaluator": None}
    files = [f"--gin_file=models/t5_1_1_{SIZE}.gin", "--gin_file=runs/pretrain.gin"]
    command = [sys.executable, "-c", COMMAND, "train", *files, *(f"--gin.{key}={bindings[key]}" for key in bindings)]
    kept = ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",)  # as the command line sets it
    environment = {key: value for key, value in os.environ.items() if key not in kept}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    start = time.time()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    metrics = folder / name / "metrics" / "metrics.jsonl"  # written once, when the only step has ended
    assert [json.loads(row)["step"] for row in metrics.read_text().splitlines()] == [1]
    return metrics.stat().st_mtime - start


def _model(dtype: str) -> EncoderDecoderModel:
    bindings = [f"DTYPE={dtype}", "DROPOUT_RATE=0.0"]
    return gin_config.run(gin_config.load(EncoderDecoderModel, [f"models/t5_1_1_{SIZE}.gin"], bindings))


def _state(dtype: str) -> TrainState:
    model = _model(dtype)
    batch = model.converter.convert([[]] * BATCH_SIZE, LENGTHS, packed=True)
    return train_state.create_sharded(model, optimizers.adafactor(1e-3), batch, 0, Partitioner())


def _median(seconds: list[float]) -> dict[str, object]:
    """The median and the least."""
    return {"seconds": round(statistics.median(seconds), 3), "seconds_least": round(min(seconds), 3)}
