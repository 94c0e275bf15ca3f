"""One way to run a job, compiled for its devices: what it takes of each, and how long that takes at least."""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from t5x_like.decoding.greedy import Greedy
from t5x_like.planning import hlo
from t5x_like.planning.choice import Choice
from t5x_like.planning.hardware import Target
from t5x_like.recipe import Experiment, Recipe, example_batch
from t5x_like.sharding import Partitioner, building_for
from t5x_like.training import train_state
from t5x_like.training.flops import matmul_flops
from t5x_like.training.step import TrainStep
from t5x_like.training.train_state import TrainState
from t5x_like.typing import Batch, PyTree

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What each device sends in a step, of one kind along some mesh axes.

    Attributes:
      kind: such as `all-gather`.
      axes: mesh axes.
      network: `ICI`, or `DCN` between slices.
      gib: GiB that each device sends.
      seconds: at the full bandwidth of its links.
    """

    kind: str
    axes: tuple[str, ...]
    network: str
    gib: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """A compiled program on one device.

    Attributes:
      fits: in the memory that the compiler lets it use.
      peak_memory_gib: GiB at the fullest moment; if it does not fit, what the compiler says it would need.
      argument_gib: GiB of it that come in: state and batch.
      temporary_gib: GiB of it that the program makes.
      host_gib: GiB kept in the host's memory.
      flops_per_chip: floating point operations in matrix products, recomputation included, loops by their trips.
      memory_bytes: bytes to and from main memory.
      traffic: to other devices.
      compute_seconds: a roofline: products at their peak, ...
      memory_seconds: ... memory at full bandwidth, ...
      on_chip_seconds: ... the longer of the two, instruction by instruction.
      compile_seconds: how long the compiler took.
    """

    fits: bool
    peak_memory_gib: float
    argument_gib: float = 0.0
    temporary_gib: float = 0.0
    host_gib: float = 0.0
    flops_per_chip: float = 0.0
    memory_bytes: float = 0.0
    traffic: tuple[Traffic, ...] = ()
    compute_seconds: float = 0.0
    memory_seconds: float = 0.0
    on_chip_seconds: float = 0.0
    compile_seconds: float = 0.0

    def network_seconds(self, network: str) -> float:
        """At full bandwidth, one message after another."""
        return sum((each.seconds for each in self.traffic if each.network == network), 0.0)

    @property
    def seconds(self) -> float:
        """The roofline: as long as the slowest of device, links and data-centre network takes, if they never wait."""
        return max(self.on_chip_seconds, self.network_seconds("ICI"), self.network_seconds("DCN"))


class CannotCompile(Exception):
    """The compiler's reason, in one line."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A job made for its devices, before it is compiled.

    Attributes:
      experiment: built for `target`.
      partitioner: its mesh over these devices.
      batch: shapes.
      state: shapes, with shardings.
      shardings: of the state.
    """

    experiment: Experiment
    partitioner: Partitioner
    batch: Batch
    state: TrainState
    shardings: TrainState

    @classmethod
    def of(cls, recipe: Recipe, target: Target, choice: Choice) -> "Job":
        """Builds what gin files say, for these devices, in this way.

        Raises:
          UserError: a mistake in the files, or a mesh that does not divide something.
        """
        with building_for(target.devices):
            experiment = choice.of(recipe).build()
            partitioner = experiment.partitioner or Partitioner()
            model, dataset, optimizer = experiment.model, experiment.dataset, experiment.trainer.optimizer
            batch = example_batch(model, dataset, dataset.batch_size)
            shardings = train_state.state_shardings(model, optimizer, batch, partitioner)
            return cls(
                experiment, partitioner, batch, train_state.abstract(model, optimizer, batch, shardings), shardings
            )

    @property
    def step(self) -> TrainStep:
        """What `train` does once."""
        trainer = self.experiment.trainer
        return TrainStep(self.experiment.model, trainer.optimizer, trainer.seed, trainer.microbatches)

    def train_step(self) -> jax.stages.Lowered:
        """The program of a training step, not compiled yet."""
        return self.step.lowered(self.partitioner, self.shardings, self.state, self.batch)

    def decode_step(self) -> jax.stages.Lowered:
        """The program that writes a batch of outputs greedily, as long as the targets may be."""
        model, sharding = self.experiment.model, self.partitioner.sharding("batch")
        lengths = self.experiment.dataset.task_feature_lengths
        length = lengths.get("targets") or max(lengths.values())
        decode = jax.jit(
            lambda params, batch: model.generate(params, batch, Greedy(), length),
            in_shardings=(self.shardings.params, sharding),
        )
        with self.partitioner.active():
            return decode.lower(self.state.params, self.batch)

    def seconds_per_step(self, steps: int) -> float:
        """Measured on devices that are here: the fastest of a few training steps."""
        model, trainer = self.experiment.model, self.experiment.trainer
        state = train_state.create_sharded(model, trainer.optimizer, self.batch, trainer.seed, self.partitioner)
        batch = jax.device_put(dict(self.batch), self.partitioner.sharding("batch"))
        run = self.step.compiled(self.partitioner, self.shardings)
        seconds = []
        for _ in range(steps + 1):
            start = time.perf_counter()
            state, report = run(state, batch)
            jax.block_until_ready(report)
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])

    @property
    def tokens(self) -> int:
        """In a batch, at most; decoder inputs are its targets again."""
        names = (name for name in self.batch if name.endswith("_tokens") and name != "decoder_input_tokens")
        return sum(self.batch[name].size for name in names)

    def model_flops(self) -> float:
        """What a step needs of all devices together, nothing computed twice: three times the forward pass.

        Chowdhery et al. 2022, appendix B.
        """
        model, batch = self.experiment.model, self.batch
        forward = matmul_flops(
            lambda params: model.loss(params, batch, jax.random.key(0)).loss.total, self.state.params
        )
        return 3.0 * forward


def shard_gib(tree: PyTree) -> float:
    """What one device holds of a tree of shapes with shardings."""
    sizes = (math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return sum(sizes) / GIB


def cost(program: Callable[[], jax.stages.Lowered], target: Target, partitioner: Partitioner) -> Cost:
    """Compiles a program for a target, unless it has been before, and reads what it costs a device.

    Raises:
      CannotCompile: for another reason than memory.
    """
    with building_for(target.devices):
        lowered = program()
    order = [device.id for device in partitioner.mesh.devices.flat]
    versions = [_version("jaxlib"), _version("libtpu"), target.name, target.chip.config]
    digest = hashlib.sha256(repr((lowered.as_text(), order, versions)).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "t5x_like" / "plans"
    path = folder / f"{digest[:32]}.json.gz"
    if path.exists():
        found = json.loads(gzip.decompress(path.read_bytes()))
    else:
        found = _compile(lowered, target)
        folder.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_bytes(gzip.compress(json.dumps(found).encode()))
        new.rename(path)
    if "refused" in found:
        return _refused(found["refused"], found["seconds"])
    return _read(
        hlo.parse(found["text"]), target, partitioner, Cost(**found["memory"], compile_seconds=found["seconds"])
    )


def _compile(lowered: jax.stages.Lowered, target: Target) -> dict[str, Any]:
    """What the compiler says, as JSON: text and memory of the program, or why there is none."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # The text is taken from a dump, since reading it back from the executable fails for some programs (jaxlib
        # 0.10.2: "async-update instruction should have 1 operands").
        dump: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=dump if target.devices[0].platform == "tpu" else {})
        except Exception as error:
            return {"refused": " ".join(str(error).split()), "seconds": time.monotonic() - start}
        seconds = time.monotonic() - start
        dumped = list(Path(folder).glob("*.after_optimizations.txt"))
        text = dumped[0].read_text() if dumped else compiled.as_text()
    memory = compiled.memory_analysis()
    assert memory is not None and text is not None
    # XLA's own peak counts buffers on the host, too, and on other platforms than TPUs no temporaries (jaxlib 0.10.2,
    # CPU): then all that is made on the device stands for it.
    made = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + made
    if target.devices[0].platform == "tpu" and not memory.host_temp_size_in_bytes:
        peak = min(peak, memory.peak_memory_in_bytes)
    sizes = {
        "fits": peak / GIB <= target.chip.memory_gib,
        "peak_memory_gib": peak / GIB,
        "argument_gib": memory.argument_size_in_bytes / GIB,
        "temporary_gib": memory.temp_size_in_bytes / GIB,
        "host_gib": memory.host_temp_size_in_bytes / GIB,
    }
    return {"text": text, "seconds": seconds, "memory": sizes}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _read(program: hlo.Program, target: Target, partitioner: Partitioner, cost: Cost) -> Cost:
    flops = compute = moved = memory = on_chip = 0.0
    for place, instruction, times in program.executed():
        work, size = hlo.instruction_flops(program, place, instruction), hlo.memory_bytes(program, place, instruction)
        flops, moved = flops + times * work, moved + times * size
        busy, waiting = work / target.chip.peak_flops, size / target.chip.memory_bandwidth
        compute, memory, on_chip = (
            compute + times * busy,
            memory + times * waiting,
            on_chip + times * max(busy, waiting),
        )
    return dataclasses.replace(
        cost,
        flops_per_chip=flops,
        memory_bytes=moved,
        traffic=tuple(_traffic(program, target, partitioner)),
        compute_seconds=compute,
        memory_seconds=memory,
        on_chip_seconds=on_chip,
    )


def _traffic(program: hlo.Program, target: Target, partitioner: Partitioner) -> Iterator[Traffic]:
    devices = partitioner.mesh.devices.flat
    total: dict[tuple[str, tuple[str, ...], str], tuple[float, float]] = {}
    for each in hlo.collectives(program, partitioner.mesh.size):
        group = [devices[place] for place in each.group]
        sent = each.sent * each.times
        network = "DCN" if target.crosses_slices(group) else "ICI"
        key = each.kind, hlo.mesh_axes(each.group, dict(partitioner.mesh.shape)), network
        size, seconds = total.get(key, (0.0, 0.0))
        total[key] = size + sent, seconds + sent / target.bandwidth(group)
    for (kind, axes, network), (size, seconds) in sorted(total.items(), key=lambda item: -item[1][1]):
        yield Traffic(kind, axes, network, size / GIB, seconds)


_UNITS = {"B": 1 / GIB, "K": 2**10 / GIB, "M": 2**20 / GIB, "G": 1.0, "T": 2.0**10}


def _refused(reason: str, seconds: float) -> Cost:
    """What the compiler says of memory, as a cost that does not fit.

    Raises:
      CannotCompile: it says something else.
    """
    sizes = re.search(r"\(([\d.]+)([BKMGT])\) exceeds|Used ([\d.]+)([BKMGT]) of", reason)
    if "RESOURCE_EXHAUSTED" not in reason or sizes is None:
        raise CannotCompile(reason.partition(" See https")[0][:400])
    number, unit = (sizes[1], sizes[2]) if sizes[1] else (sizes[3], sizes[4])
    return Cost(fits=False, peak_memory_gib=float(number) * _UNITS[unit], compile_seconds=seconds)
