"""Decoding with a cache of keys and values: T5.1.1 small writes 114 tokens for each of 8 inputs of 512."""

import dataclasses
import statistics
import time

import jax

from benchmarks.steps import T5_SMALL, Training
from t5x_like.decoding.contract import DecodeFn
from t5x_like.models.encoder_decoder import EncoderDecoderModel
from t5x_like.models.predictor import Predictor
from t5x_like.sharding import Partitioner
from t5x_like.training.flops import matmul_peak


def decode(decoder: DecodeFn, dtype: str, steps: int, training: Training = T5_SMALL) -> dict[str, object]:
    """Seconds in which a batch is encoded and decoded to its full length, and tokens written per second.

    Args:
      decoder: greedy or beam search.
      dtype: of the matrix products.
      steps: batches timed.
      training: names the model and the lengths; its parameters are random.
    """
    model = training.model(dtype)
    assert isinstance(model, EncoderDecoderModel)
    model = dataclasses.replace(model, eos_id=-1)  # no token: nothing ends before its full length
    partitioner, batch, length = Partitioner.single_device(), training.batch(model), training.lengths["targets"]
    with partitioner.active():
        params = jax.jit(model.init, out_shardings=partitioner.sharding())(jax.random.key(0), batch)
    inputs = {"encoder_input_tokens": batch["encoder_input_tokens"]}
    predictor, seconds = Predictor(model, partitioner), []
    for _ in range(steps + 1):  # the first one compiles
        start = time.perf_counter()
        predictor.generate(params, inputs, decoder, length)
        seconds.append(time.perf_counter() - start)
    median, tokens = statistics.median(seconds[1:]), training.batch_size * length
    return {
        "seconds_per_batch": round(median, 4),
        "seconds": [round(each, 4) for each in seconds[1:]],
        "tokens_per_batch": tokens,
        "tokens_per_second": round(tokens / median, 1),
        "matmul_peak_gflops": round(matmul_peak(dtype) / 1e9, 1),
    }
