"""The training loop: batches in, states out, and hooks (evaluation, checkpoints) between the steps."""

import dataclasses
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
import optax

from t5x_like.data.loader import Position, host_to_devices, prefetch
from t5x_like.distributed import stop_agreed
from t5x_like.errors import RunFailed, UserError
from t5x_like.training.run_log import RunLog
from t5x_like.training.step import StepReport, step_key
from t5x_like.training.train_state import TrainState

CompiledStep = Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, StepReport]]


class Progress(NamedTuple):
    """Where a run stands after a step.

    Attributes:
      step: steps done.
      state: after them; the next step takes its memory, so a hook that keeps it must copy it.
      position: of the data after them.
      last: no step follows.
      interrupted: the run was asked to stop (SIGTERM or SIGINT) and will go on with the same command.
    """

    step: int
    state: TrainState
    position: Position
    last: bool
    interrupted: bool


@runtime_checkable
class Hook(Protocol):
    """Something that happens between steps."""

    def due(self, progress: Progress) -> bool:
        """Whether it is to happen now."""
        ...

    def __call__(self, progress: Progress) -> bool:
        """Does it; True ends the run (hooks that follow are asked again, with `last` set)."""
        ...


@dataclasses.dataclass(frozen=True)
class Trainer:
    """How a run is trained. What it trains on, and where, the command says.

    Attributes:
      optimizer: any optax transformation.
      train_steps: the step at which the run ends.
      seed: of initialisation and dropout.
      microbatches: parts of the batch whose gradients are summed before an update (gradient accumulation).
      log_period: steps from one logged step to the next; the first and the last are logged too, and every step of a
        run shorter than 100.
      max_skipped_updates: so many steps in a row with a non-finite loss or gradient end the run.
    """

    optimizer: optax.GradientTransformation
    train_steps: int
    seed: int = 0
    microbatches: int = 1
    log_period: int = 10
    max_skipped_updates: int = 10

    def __post_init__(self) -> None:
        for name in ("train_steps", "microbatches", "log_period", "max_skipped_updates"):
            if getattr(self, name) < 1:
                raise UserError(f"Trainer.{name} is {getattr(self, name)}; it must be at least 1")

    def fit(
        self,
        state: TrainState,
        step_fn: CompiledStep,
        batches: Iterable[tuple[Mapping[str, np.ndarray], Position]],
        sharding: jax.sharding.NamedSharding,
        monitor: "Monitor",
        hooks: Sequence[Hook],
    ) -> TrainState:
        """Trains until `train_steps`, a hook's word or a signal, and returns the last state.

        Each report is read one step late, so that the devices always have a next step to work on.

        Raises:
          RunFailed: too many updates in a row were not finite; the offending batch and key are saved.
        """
        start = int(state.step)
        if start >= self.train_steps:
            return state
        with _signals() as interrupted:
            for step, (batch, position) in enumerate(prefetch(batches), start + 1):
                state, report = step_fn(state, host_to_devices(batch, sharding))
                stopped = interrupted(step)
                last = step == self.train_steps or stopped
                monitor.add(step, report, batch, last)
                progress = Progress(step, state, position, last, stopped)
                for hook in hooks:
                    if hook.due(progress):
                        with monitor.paused():
                            progress = progress._replace(last=hook(progress) or progress.last)
                if progress.last:
                    monitor.flush()
                    return state
        raise RunFailed("the data ended before the run did")


class Monitor:
    """Reads the reports of steps, logs them, and stops a run that has gone astray."""

    def __init__(
        self,
        trainer: Trainer,
        log: RunLog,
        model_dir: str | Path,
        flops_per_step: float,
        peak_flops: float,
        parts: float = 1.0,
    ) -> None:
        """Starts the clock.

        Args:
          trainer: its periods, limits and seed.
          log: where scalars go.
          model_dir: the run's folder; bad batches are saved under `non_finite/` in it.
          flops_per_step: model FLOPs of a step (forward and backward matrix products), all devices together.
          peak_flops: FLOP/s in matrix products that all devices together were measured to reach.
          parts: how many times the rows that this process feeds make a batch.
        """
        self._trainer, self._log, self._folder = trainer, log, Path(model_dir) / "non_finite"
        self._flops, self._peak, self._parts = flops_per_step, peak_flops, parts
        self._pending: tuple[int, StepReport, Mapping[str, np.ndarray], bool] | None = None
        self._clock, self._steps, self._tokens, self._skipped, self._in_a_row = (
            time.perf_counter(),
            0,
            0,
            0,
            0,
        )

    def add(self, step: int, report: StepReport, batch: Mapping[str, np.ndarray], last: bool) -> None:
        """Takes a step's report, and reads that of the step before."""
        self.flush()
        self._pending = (step, report, batch, last)

    def flush(self) -> None:
        """Reads the report that is waiting."""
        if self._pending is None:
            return
        (step, report, batch, last), self._pending = self._pending, None
        self._steps += 1
        self._tokens += round(_count_tokens(batch) * self._parts)
        finite = bool(report.finite)  # waits for the step to end
        self._in_a_row = 0 if finite else self._in_a_row + 1
        self._skipped += not finite
        if last or step == 1 or step % self._trainer.log_period == 0 or self._trainer.train_steps < 100:
            self._report(step, report)
        if self._in_a_row >= self._trainer.max_skipped_updates:
            self._fail(step, batch)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, time does not count as training: steps under way are waited for first."""
        self.flush()
        start = time.perf_counter()
        yield
        self._clock += time.perf_counter() - start

    def _report(self, step: int, report: StepReport) -> None:
        now = time.perf_counter()
        seconds = (now - self._clock) / self._steps
        scalars = {name: float(value) for name, value in jax.device_get(report.scalars).items()}
        scalars |= {
            "target_tokens": float(report.tokens),
            "skipped_updates": float(self._skipped),
            "seconds_per_step": seconds,
            "tokens_per_second": self._tokens / (seconds * self._steps),
            "model_flops_per_second": self._flops / seconds,
            "share_of_matmul_peak": self._flops / seconds / self._peak,
            "memory_gib": peak_memory_gib(),
        }
        vectors = {name: values.tolist() for name, values in jax.device_get(report.vectors).items()}
        self._log.step(step, scalars, vectors)
        self._clock, self._steps, self._tokens = now, 0, 0

    def _fail(self, step: int, batch: Mapping[str, np.ndarray]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step_{step}.process_{jax.process_index()}.npz"
        np.savez(path, **{name: np.asarray(rows) for name, rows in batch.items()})  # type: ignore[arg-type]
        key = jax.random.key_data(step_key(self._trainer.seed, step - 1)).tolist()
        facts = {"step": step, "seed": self._trainer.seed, "key": key, "batch": path.name}
        path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
        raise RunFailed(
            f"step {step}: loss or gradient was not finite {self._in_a_row} steps in a row; the parameters are those "
            f"of step {step - self._in_a_row}. The batch and key of this step are in {path}; a lower learning rate, "
            "gradient clipping or more warm-up usually helps"
        )


def peak_memory_gib() -> float:
    """The most memory used so far: of the fullest local device, or of this process on a CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    used = max(s.get("peak_bytes_in_use", 0) for s in stats)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in kilobytes on Linux
    return (used or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit) / 2**30


def _count_tokens(batch: Mapping[str, np.ndarray]) -> int:
    """Real tokens read and predicted; inputs of a decoder are its targets over again."""
    names = [name for name in batch if name.endswith("_tokens") and name != "decoder_input_tokens"]
    return sum(int(np.count_nonzero(batch[name])) for name in names)


@contextmanager
def _signals() -> Iterator[Callable[[int], bool]]:
    """Whether to stop after a step because SIGTERM (a preempted machine) or SIGINT (Ctrl-C) has come.

    The second one of them is obeyed at once. Of several processes all stop after the same step.
    """
    received: list[int] = []
    shared = jax.distributed.is_initialized()
    handled = (signal.SIGINT,) if shared else (signal.SIGTERM, signal.SIGINT)  # JAX hears SIGTERM for all processes

    def handle(number: int, _: object) -> None:
        received.append(number)
        for each in handled:
            signal.signal(each, previous[each])
        if shared:
            os.kill(os.getpid(), signal.SIGTERM)

    def interrupted(step: int) -> bool:
        return stop_agreed(step) if shared else bool(received)

    try:
        previous = {each: signal.getsignal(each) for each in handled}
        for each in handled:
            signal.signal(each, handle)
    except ValueError:  # not in the main thread, as in some notebooks: the interpreter's own handlers stay
        yield interrupted
        return
    try:
        yield interrupted
    finally:
        for each in handled:
            signal.signal(each, previous[each])
