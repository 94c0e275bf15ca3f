"""One way to run a job on one target, compiled: what it takes, and how long."""

import dataclasses
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from t5x_like.errors import UserError
from t5x_like.planning import hardware
from t5x_like.planning.arithmetic import kept_gib
from t5x_like.planning.choice import Choice
from t5x_like.planning.compiled import CannotCompile, Cost, Job, cost, shard_gib
from t5x_like.planning.silence import quietly
from t5x_like.recipe import Recipe
from t5x_like.sharding import MESH_AXES

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to run a job on one target, compiled.

    Attributes:
      topology: the target.
      devices: how many.
      choice: the way.
      mesh: its sizes by axis.
      batch_size: examples.
      tokens: of a batch, at most.
      train_steps: of the whole run.
      model_flops: of a step on all devices, nothing computed twice.
      peak_flops: of a device.
      memory_limit_gib: what a program may use of one.
      parameters_gib: on one device, as the next two.
      optimizer_gib: state of the optimiser.
      activations_gib: what is kept for the backward pass; estimated, as if split evenly.
      train: what the compiled training step costs; None if it does not compile.
      decode: what greedy decoding of a batch costs; None if it was not asked for.
      measured_seconds: of a real step, on devices that are here.
      decode_error: why decoding does not compile.
      compile_error: why it does not compile, and the nearest that does.
    """

    topology: str
    devices: int
    choice: Choice
    mesh: dict[str, int]
    batch_size: int = 0
    tokens: int = 0
    train_steps: int = 0
    model_flops: float = 0.0
    peak_flops: float = 0.0
    memory_limit_gib: float = 0.0
    parameters_gib: float = 0.0
    optimizer_gib: float = 0.0
    activations_gib: float = 0.0
    train: Cost | None = None
    decode: Cost | None = None
    measured_seconds: float | None = None
    decode_error: str | None = None
    compile_error: str | None = None

    @property
    def fits(self) -> bool:
        """Whether training does; what does not compile does not."""
        return self.train is not None and self.train.fits

    @property
    def seconds(self) -> float | None:
        """A step takes at least so long; None where the compiler made no program."""
        return self.train.seconds if self.train is not None and self.train.on_chip_seconds else None

    @property
    def utilisation(self) -> float | None:
        """The bound on model FLOPs utilisation (MFU; Chowdhery et al. 2022, section 4.1)."""
        return self.model_flops / (self.devices * self.peak_flops * self.seconds) if self.seconds else None

    @property
    def bound(self) -> str | None:
        """What takes longest."""
        if self.train is None or not self.seconds:
            return None
        parts = {name: self.train.network_seconds(name) for name in ("ICI", "DCN")}
        on_chip = "compute" if self.train.compute_seconds >= self.train.memory_seconds else "memory"
        return max(parts, key=lambda name: parts[name]) if self.seconds in parts.values() else on_chip


def count_devices(topology: str | None) -> int:
    """Of a target."""
    return len(_target(topology).devices)


def _target(topology: str | None) -> hardware.Target:
    return hardware.topology(topology) if topology else hardware.present()


def measure(recipe: Recipe, topology: str | None, choice: Choice, steps: int = 3) -> Plan:
    """Compiles one way to run a job; on devices that are here, runs it too.

    Args:
      recipe: the job.
      topology: TPUs, as `hardware.topology` takes them; None for the devices that are here.
      choice: the way.
      steps: to time on devices that are here.

    Raises:
      UserError: a mistake in the gin files or the topology's name. A mesh that does not divide is none.
    """
    target = _target(topology)
    mesh = dict(zip(MESH_AXES, choice.mesh or (), strict=False))
    plan = Plan(target.name, len(target.devices), choice, mesh, memory_limit_gib=target.chip.memory_gib)
    try:
        job = Job.of(recipe, target, choice)
        plan = _described(plan, job, target, recipe)
        train = cost(job.train_step, target, job.partitioner)
    except UserError as error:
        if "does not divide" not in str(error):
            raise
        return dataclasses.replace(plan, batch_size=recipe.build().dataset.batch_size, compile_error=_in_a_line(error))
    except CannotCompile as error:
        return dataclasses.replace(plan, compile_error=str(error))
    took = None if topology or not train.fits else job.seconds_per_step(steps)
    return dataclasses.replace(plan, train=train, measured_seconds=took)


def _in_a_line(error: UserError) -> str:
    """A mesh that does not divide something: what, and the nearest that does."""
    reason, first, *others = str(error).splitlines()
    return f"{reason}; {first.strip()}" + (f", and {len(others)} more" if others else "")


def _described(plan: Plan, job: Job, target: hardware.Target, recipe: Recipe) -> Plan:
    """With what is known before anything is compiled."""
    trainer, dataset = job.experiment.trainer, job.experiment.dataset
    ways = job.partitioner.mesh.size * trainer.microbatches
    remat = plan.choice.remat or str(recipe.macro("REMAT") or "none")
    kept = 0.0 if plan.choice.keeps_on_host else kept_gib(job.experiment) * dataset.batch_size / ways
    return dataclasses.replace(
        plan,
        mesh=dict(job.partitioner.mesh.shape),
        choice=dataclasses.replace(plan.choice, remat=remat, microbatches=trainer.microbatches),
        batch_size=dataset.batch_size,
        tokens=job.tokens,
        train_steps=trainer.train_steps,
        model_flops=job.model_flops(),
        peak_flops=target.chip.peak_flops,
        parameters_gib=shard_gib(job.state.params),
        optimizer_gib=shard_gib(job.state.opt_state),
        activations_gib=kept,
    )


def measure_decoding(recipe: Recipe, topology: str | None, choice: Choice) -> Cost:
    """Compiles greedy decoding of a batch.

    Raises:
      CannotCompile: for another reason than memory.
    """
    target = _target(topology)
    job = Job.of(recipe, target, choice)
    return cost(job.decode_step, target, job.partitioner)


class Compiler:
    """Measures in a process of its own, which may crash, and whose libraries may talk."""

    def __init__(self, on_cpu: bool) -> None:
        """Starts none yet; `on_cpu` leaves accelerators alone that are here."""
        self._on_cpu = on_cpu
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, function: Callable[..., Result], *arguments: object) -> Result:
        """The function's result; a crash of the process is a `CannotCompile`."""
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, spawn, initializer=quietly, initargs=(self._on_cpu,))
        try:
            return self._pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            self._pool = None
            raise CannotCompile("the compiler crashed") from error

    def close(self) -> None:
        """Ends the process."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def with_decoding(plan: Plan, recipe: Recipe, topology: str | None, compiler: Compiler) -> Plan:
    """A plan with the cost of decoding, or with the reason why it has none."""
    try:
        return dataclasses.replace(plan, decode=compiler(measure_decoding, recipe, topology, plan.choice))
    except CannotCompile as error:
        return dataclasses.replace(plan, decode_error=str(error))
