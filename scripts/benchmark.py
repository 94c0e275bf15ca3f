#!/usr/bin/env python3
"""Measures this machine: `scripts/benchmark.py --case NAME` prints one JSON line.

Keys: case, dtype, seconds_per_step (median), tokens_per_second, matmul_peak_gflops (measured in the same process and
dtype), share_of_peak, peak_memory_gib, versions; and what else the case knows.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np

import t5x_like
from t5x_like import gin_config
from t5x_like.models.encoder_decoder import EncoderDecoderModel
from t5x_like.sharding import Partitioner
from t5x_like.training import train_state
from t5x_like.training.flops import matmul_flops, matmul_peak
from t5x_like.training.optimizers import adafactor
from t5x_like.training.step import TrainStep
from t5x_like.training.trainer import peak_memory_gib


def train_t5(size: str, dtype: str, steps: int) -> dict[str, object]:
    """T5 1.1 of a size: batch 8, 512 + 114 tokens, Adafactor, dropout 0.1; random tokens, no padding."""
    files, bindings = [f"models/t5_1_1_{size}.gin"], [f"DTYPE={dtype}", "DROPOUT_RATE=0.1"]
    model = gin_config.run(gin_config.load(EncoderDecoderModel, files, bindings))
    assert isinstance(model, EncoderDecoderModel)
    rng, batch_size, lengths = np.random.default_rng(0), 8, {"inputs": 512, "targets": 114}
    rows = [[{name: rng.integers(3, 8000, size) for name, size in lengths.items()}] for _ in range(batch_size)]
    batch = model.converter.convert(rows, lengths, packed=False)
    partitioner, optimizer = Partitioner.single_device(), adafactor(1e-3)
    state = train_state.create_sharded(model, optimizer, batch, 0, partitioner)
    shardings = train_state.state_shardings(model, optimizer, batch, partitioner)
    step = TrainStep(model, optimizer).compiled(partitioner, shardings)
    batch = jax.device_put(batch, partitioner.sharding("batch"))
    flops = 3 * matmul_flops(lambda params: model.loss(params, batch).loss.total, state.params)
    peak = matmul_peak(dtype)
    seconds = []
    for _ in range(steps + 1):  # the first one compiles
        start = time.perf_counter()
        state, report = step(state, batch)
        loss = float(report.scalars["loss"])
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    return {
        "seconds_per_step": round(median, 4),
        "tokens_per_second": round(batch_size * sum(lengths.values()) / median, 1),
        "matmul_peak_gflops": round(peak / 1e9, 1),
        "share_of_peak": round(flops / median / peak, 3),
        "model_tflop_per_step": round(flops / 1e12, 4),
        "parameters": train_state.count_parameters(state.params),
        "first_step_seconds": round(seconds[0], 2),
        "loss": round(loss, 4),
    }


CASES: dict[str, Callable[[str, int], dict[str, object]]] = {"train_t5_small": functools.partial(train_t5, "small")}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one case."""
    parser = argparse.ArgumentParser(description="Measures this machine; prints one JSON line.")
    parser.add_argument("--case", choices=sorted(CASES), required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matrix products")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default: 5)")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    result = CASES[arguments.case](arguments.dtype, arguments.steps)
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    versions |= {"t5x_like": t5x_like.__version__, "python": sys.version.split()[0]}
    facts = {"case": arguments.case, "dtype": arguments.dtype, "device": jax.devices()[0].device_kind}
    print(json.dumps(facts | result | {"peak_memory_gib": round(peak_memory_gib(), 2), "versions": versions}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
