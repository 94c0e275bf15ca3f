"""Training steps: seconds, share of the matmul peak, and memory; the latter also on a TPU that is not there."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import optax

from t5x_like import gin_config
from t5x_like.models.decoder_only import DecoderOnlyModel
from t5x_like.models.encoder_decoder import EncoderDecoderModel
from t5x_like.models.masked_lm import MaskedLMModel
from t5x_like.models.network import NetworkModel
from t5x_like.planning import hardware
from t5x_like.sharding import Partitioner, make_mesh
from t5x_like.training import train_state
from t5x_like.training.flops import matmul_flops, matmul_peak
from t5x_like.training.optimizers import adafactor, adamw
from t5x_like.training.step import TrainStep
from t5x_like.training.trainer import peak_memory_gib

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Training:
    """A model, its optimiser, and a batch of random tokens without padding.

    Attributes:
      kind: the class that `file` binds.
      file: a gin file of `configs/models`.
      vocab_size: tokens are drawn from the whole vocabulary, special ones aside.
      optimizer: makes the updates.
      batch_size: sequences in a batch.
      lengths: tokens of each task feature in a sequence.
      masked: how many tokens of `inputs` a masked language model is to guess: its targets.
      bindings: what differs from `file`, and from dropout of 0.1.
    """

    kind: type[NetworkModel]
    file: str
    vocab_size: int
    optimizer: optax.GradientTransformation
    batch_size: int
    lengths: Mapping[str, int]
    masked: int = 0
    bindings: tuple[str, ...] = ()

    def model(self, dtype: str) -> NetworkModel:
        """The model whose matrix products are of a dtype."""
        bindings = [f"DTYPE={dtype}", "DROPOUT_RATE=0.1", f"VOCAB_SIZE={self.vocab_size}", *self.bindings]
        model = gin_config.run(gin_config.load(self.kind, [self.file], bindings))
        assert isinstance(model, self.kind)
        return model

    def batch(self, model: NetworkModel) -> dict[str, np.ndarray]:
        """One batch, always the same."""
        rng = np.random.default_rng(0)
        lengths = {**self.lengths, "targets": self.lengths.get("targets", self.masked)}
        rows = []
        for _ in range(self.batch_size):
            example = {name: rng.integers(5, self.vocab_size, length) for name, length in lengths.items()}
            if self.masked:
                example["target_positions"] = np.sort(rng.permutation(lengths["inputs"])[: self.masked])
            rows.append([example])
        return model.converter.convert(rows, lengths, packed=False)


ADAMW = adamw(1e-4, weight_decay=0.01)

T5_SMALL = Training(
    EncoderDecoderModel,
    "models/t5_1_1_small.gin",
    vocab_size=32_128,
    optimizer=adafactor(1e-3),
    batch_size=8,
    lengths={"inputs": 512, "targets": 114},
)
GPT2_124M = Training(
    DecoderOnlyModel,
    "models/gpt2_small.gin",
    vocab_size=50_257,
    optimizer=ADAMW,
    batch_size=2,
    lengths={"inputs": 0, "targets": 512},
)
BERT_BASE = Training(
    MaskedLMModel,
    "models/bert_base.gin",
    vocab_size=30_522,
    optimizer=ADAMW,
    batch_size=4,
    lengths={"inputs": 128},
    masked=19,  # 15 %
    bindings=("features.MaskedLMFeatures.next_sentence=False", "heads.MaskedLanguageModelHead.next_sentence=None"),
)
SWITCH = Training(  # 4 + 4 layers, every second one with 8 experts, which take up to 64 tokens of a sequence
    EncoderDecoderModel,
    "models/switch_tiny.gin",
    vocab_size=32_128,
    optimizer=ADAMW,
    batch_size=8,
    lengths={"inputs": 128, "targets": 32},
    bindings=(
        *("EMBED_DIM=256", "NUM_HEADS=4", "HEAD_DIM=64", "MLP_DIM=1024", "NUM_EXPERTS=8"),
        *("moe.SparseMlp.capacity=@routing.FixedCapacity()", "routing.FixedCapacity.slots=64"),
    ),
)


def train(training: Training, dtype: str, steps: int, topology: str | None = None) -> dict[str, object]:
    """Seconds and memory of a training step on one device; with a `topology`, also its memory on a chip of that.

    Raises:
      UserError: the topology is none, or libtpu is missing.
    """
    chips = hardware.topology(topology).devices if topology else ()  # first, for a mistake there is soon told
    model = training.model(dtype)
    partitioner, optimizer = Partitioner.single_device(), training.optimizer
    batch = jax.device_put(training.batch(model), partitioner.sharding("batch"))
    state = train_state.create_sharded(model, optimizer, batch, 0, partitioner)
    shardings = train_state.state_shardings(model, optimizer, batch, partitioner)
    flops = 3 * matmul_flops(lambda params: model.loss(params, batch).loss.total, state.params)
    parameters = train_state.count_parameters(state.params)
    peak = matmul_peak(dtype)
    start = time.perf_counter()
    step = TrainStep(model, optimizer).lowered(partitioner, shardings, state, batch).compile()
    compiling = time.perf_counter() - start
    seconds = []
    for _ in range(steps + 1):  # the first one takes its memory
        start = time.perf_counter()
        state, report = step(state, batch)
        loss = float(report.scalars["loss"])
        seconds.append(time.perf_counter() - start)
    median, memory = statistics.median(seconds[1:]), step.memory_analysis()
    tokens = training.batch_size * sum(training.lengths.values())
    result: dict[str, object] = {
        "seconds_per_step": round(median, 4),
        "seconds": [round(each, 4) for each in seconds[1:]],
        "tokens_per_second": round(tokens / median, 1),
        "matmul_peak_gflops": round(peak / 1e9, 1),
        "share_of_peak": round(flops / median / peak, 3),
        "model_tflop_per_step": round(flops / 1e12, 4),
        "parameters": parameters,
        "loss": round(loss, 4),
        "temporary_mib": round(memory.temp_size_in_bytes / MIB, 1),
        "argument_mib": round(memory.argument_size_in_bytes / MIB, 1),
        "peak_memory_gib": round(peak_memory_gib(), 2),  # before anything is compiled for a TPU
    }
    if not jax.config.jax_compilation_cache_dir:  # else the program may have been compiled before
        result["first_step_seconds"] = round(compiling + seconds[0], 2)
    if topology:
        result |= {"topology": topology, "temporary_mib_tpu": round(temporary_mib(training, chips[0]), 1)}
    return result


def temporary_mib(training: Training, device: jax.Device) -> float:
    """Temporary memory of a step with bfloat16 products, compiled from shapes for a device that need not be there."""
    partitioner, optimizer, model = (
        Partitioner(make_mesh(devices=[device])),
        training.optimizer,
        training.model("bfloat16"),
    )
    batch = training.batch(model)
    shardings = train_state.state_shardings(model, optimizer, batch, partitioner)
    state = train_state.abstract(model, optimizer, batch, shardings)
    with _without_compilation_cache():
        step = TrainStep(model, optimizer).lowered(partitioner, shardings, state, batch).compile()
    return step.memory_analysis().temp_size_in_bytes / MIB


@contextlib.contextmanager
def _without_compilation_cache() -> Iterator[None]:
    """What is compiled for devices that are not there cannot be read back from the cache."""
    name = "jax_persistent_cache_min_compile_time_secs"
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, seconds)
