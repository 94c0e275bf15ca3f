"""What a run reports while it runs: metrics files, TensorBoard, Weights & Biases and a progress bar.

Process 0 holds a `RunLog`, every other process a `SilentRunLog`. To report somewhere else too, write a class
with `Writer`'s two methods.
"""

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, Protocol

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from t5x_like import __version__
from t5x_like.errors import UserError
from t5x_like.training.heatmap import History, encode_png, levels, ratios_to_mean

REPORTED_VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "seqio", "tensorflow", "numpy")
IMAGE_COLUMNS = 200
IMAGE_DESCRIPTION = (
    "Left to right: training so far. Top to bottom: entries (experts), the first at the top. Colour: ratio to the "
    "mean over the entries, for experts an even share: dark blue 0, near white 1, dark red 4 or more; grey: not finite."
)


class Writer(Protocol):
    """Somewhere that numbers go."""

    def write(self, step: int, scalars: Mapping[str, float], vectors: Mapping[str, Sequence[float]] = {}) -> None:
        """Records the numbers of one step; they are safe on disk, or on their way, when this returns."""

    def close(self) -> None:
        """Lets go of files and connections."""


class Progress(Protocol):
    """What a person sees while the run goes on."""

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        """Shows a step; the scalars hold at least `loss` and `tokens_per_second`."""

    def message(self, text: str) -> None:
        """Shows a line that stays."""

    def close(self) -> None:
        """Gives the terminal back."""


class RunLog:
    """Sends what a run reports to every writer and to the terminal.

    Use it as a context manager. It writes `metrics/metrics.jsonl` (a row per logged step),
    `metrics/evaluations.jsonl` (a row per task and evaluated step, under `eval/TASK/METRIC`) and TensorBoard
    events beside them.
    """

    def __init__(
        self,
        model_dir: str | Path,
        total_steps: int,
        resumed_step: int | None = 0,
        wandb_project: str | None = None,
    ) -> None:
        """Opens a run's files.

        Args:
            model_dir: the run's folder.
            total_steps: the step at which the run ends.
            resumed_step: the step of the state that training goes on from. What was reported past it is
                dropped, because those steps are about to be run again. None drops nothing: for a command that
                only evaluates.
            wandb_project: the Weights & Biases project to report to as well (needs the extra `wandb`).

        Raises:
            UserError: `wandb_project` is given and wandb is not installed.
        """
        folder = Path(model_dir) / "metrics"
        shared: list[Writer] = [TensorBoardWriter(folder, resumed_step)]
        if wandb_project is not None:
            shared.append(WandbWriter(wandb_project, folder))
        self._step_writers: Sequence[Writer] = (JsonlWriter(folder / "metrics.jsonl", resumed_step), *shared)
        self._evaluation_writers: Sequence[Writer] = (
            JsonlWriter(folder / "evaluations.jsonl", resumed_step),
            *shared,
        )
        self._progress: Progress = ProgressBar(total_steps) if sys.stderr.isatty() else ProgressLines(total_steps)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.close()
        for writer in {*self._step_writers, *self._evaluation_writers}:
            writer.close()

    def step(self, step: int, scalars: Mapping[str, float], vectors: Mapping[str, Sequence[float]] = {}) -> None:
        """Reports a training step.

        Args:
            step: steps done; it grows from call to call.
            scalars: at least `loss` and `tokens_per_second`.
            vectors: by name, such as the load of each expert of a layer; a name keeps its length.
        """
        for writer in self._step_writers:
            writer.write(step, scalars, vectors)
        self._progress.update(step, scalars)

    def evaluation(self, step: int, task: str, metrics: Mapping[str, float]) -> None:
        """Reports the metrics of one task at one step; readers take the last report of a step."""
        scalars = {f"eval/{task}/{name}": value for name, value in metrics.items()}
        for writer in self._evaluation_writers:
            writer.write(step, scalars)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.message(f"step {step:,}  {task}:  {shown}")

    def message(self, text: str) -> None:
        """Shows a line of text, above the progress bar where there is one."""
        self._progress.message(text)


class SilentRunLog(RunLog):
    """The log of every process but the first: the same methods, no file and no terminal."""

    def __init__(self) -> None:
        self._step_writers = self._evaluation_writers = ()
        self._progress = NoProgress()


class JsonlWriter:
    """A JSON object per step: `{"step": 1, "loss": 5.2, "load": [0.75, 0.25]}`. NaN and infinities become null.

    Vectors are rounded to seven digits, about what a float32 holds: most of a sparse model's file is vectors.
    """

    def __init__(self, path: Path, last_step: int | None = None) -> None:
        """Opens a file to append to, without its rows past `last_step` and those that a crash cut short."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = (line for line, row in _parsed(path) if last_step is None or row.step <= last_step)
            replace_text(path, "".join(line.rstrip("\n") + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, scalars: Mapping[str, float], vectors: Mapping[str, Sequence[float]] = {}) -> None:
        """Appends a row."""
        row = {"step": step} | {name: _finite(value) for name, value in scalars.items()}
        rounded = {name: [_finite(float(f"{x:.7g}")) for x in values] for name, values in vectors.items()}
        self._file.write(json.dumps(row | rounded) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardWriter:
    """TensorBoard events as plain records: `tf.summary` needs the tensorboard package, and takes a GPU.

    A vector becomes an image of all training so far: steps from left to right in at most `IMAGE_COLUMNS` columns,
    entries (experts) from the top down. Images come with the first step, then whenever training is half as long again
    as at the image before, and when the file is closed: 24 layers of 128 experts add about 5 MB to a run of a million
    steps. TensorBoard's slider goes through the images; the last one tells the whole story.
    """

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        """Opens a new event file, and has TensorBoard forget what older ones hold past `resumed_step`.

        The images of a resumed run go on from the vectors in `metrics.jsonl` beside it.
        """
        import tensorflow as tf

        folder.mkdir(parents=True, exist_ok=True)
        self._tf = tf.compat.v1
        self._file = tf.io.TFRecordWriter(str(folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"))
        self._event(file_version="brain.Event:2")
        if resumed_step is not None:
            start = self._tf.SessionLog(status=self._tf.SessionLog.START)
            self._event(step=resumed_step + 1, session_log=start)
        self._histories: dict[str, History] = {}
        self._last_image, self._next_image = 0, 0.0
        metrics, last = folder / "metrics.jsonl", resumed_step or 0
        for row in read_rows(metrics) if last and metrics.exists() else ():
            if row.step <= last:
                self._remember(row.step, row.vectors)

    def write(self, step: int, scalars: Mapping[str, float], vectors: Mapping[str, Sequence[float]] = {}) -> None:
        """Appends one event that holds every scalar, and images where they are due."""
        summary = self._tf.Summary()
        for name, value in scalars.items():
            summary.value.add(tag=name, simple_value=float(value))
        self._event(step=step, summary=summary)
        self._remember(step, vectors)
        if vectors and step >= self._next_image:
            self._write_images(step)

    def close(self) -> None:
        """Writes the last images and closes the file."""
        last = max((history.last_step for history in self._histories.values()), default=0)
        if last > self._last_image > 0:
            self._write_images(last)
        self._file.close()

    def _remember(self, step: int, vectors: Mapping[str, Sequence[float | None]]) -> None:
        for name, values in vectors.items():
            if name not in self._histories:
                self._histories[name] = History(len(values), IMAGE_COLUMNS)
            self._histories[name].add(step, values)

    def _write_images(self, step: int) -> None:
        self._last_image, self._next_image = step, 1.5 * step
        summary = self._tf.Summary()
        for name, history in self._histories.items():
            cells = levels(ratios_to_mean(history.means()))
            # Not smaller than a person can see, and about as large at the next step.
            rows, columns = (max(1, size // cells) for size, cells in zip((160, 400), cells.shape, strict=True))
            pixels = cells.repeat(rows, axis=0).repeat(columns, axis=1)
            height, width = pixels.shape
            value = summary.value.add(tag=name)
            value.image.MergeFrom(
                self._tf.Summary.Image(
                    height=height, width=width, colorspace=3, encoded_image_string=encode_png(pixels)
                )
            )
            value.metadata.summary_description = IMAGE_DESCRIPTION
        self._event(step=step, summary=summary)

    def _event(self, **fields: object) -> None:
        self._file.write(self._tf.Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()


class WandbWriter:
    """A Weights & Biases run; a resumed run goes on under the id that the first one left in `wandb_id`."""

    def __init__(self, project: str, folder: Path) -> None:
        """Starts or continues a run; raises UserError where wandb is not installed."""
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "wandb_project is set, but wandb is not installed: pip install 't5x_like[wandb]'"
            ) from error
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "wandb_id"
        self._wandb = wandb
        known = id_file.read_text() if id_file.exists() else None
        self._run = wandb.init(project=project, dir=str(folder), id=known, resume="allow")
        id_file.write_text(self._run.id)

    def write(self, step: int, scalars: Mapping[str, float], vectors: Mapping[str, Sequence[float]] = {}) -> None:
        """Sends the scalars, and a histogram of each vector's finite entries."""
        histograms = {name: self._wandb.Histogram([*filter(math.isfinite, values)]) for name, values in vectors.items()}
        self._run.log({**scalars, **histograms}, step=step)

    def close(self) -> None:
        """Ends the run on the server."""
        self._run.finish()


class ProgressBar:
    """A bar at the foot of the terminal, with step, loss, tokens/s, time left and time elapsed."""

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        """Shows nothing yet: the bar appears with the first step, on `console` (standard error when None)."""
        self._pace = _Pace(total_steps)
        self._bar = RichProgress(
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            TimeElapsedColumn(),
            console=console or Console(stderr=True),
            expand=True,
        )
        self._task = self._bar.add_task("", total=total_steps)

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step, description=self._pace.describe(step, scalars))
        self._bar.start()

    def message(self, text: str) -> None:
        """Prints above the bar."""
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.stop()


class ProgressLines:
    """Plain lines for a log file: the first step, the last one, and one every half minute between them."""

    def __init__(
        self,
        total_steps: int,
        seconds_between_lines: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prints nothing yet; lines go to standard error."""
        self._total_steps = total_steps
        self._seconds = seconds_between_lines
        self._clock = clock
        self._pace = _Pace(total_steps, clock)
        self._start = clock()
        self._last_line = -math.inf

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        """Prints a line when one is due."""
        text, now = self._pace.describe(step, scalars), self._clock()
        if now - self._last_line >= self._seconds or step >= self._total_steps:
            self._last_line = now
            self.message(f"{text}  elapsed {timedelta(seconds=int(now - self._start))}")

    def message(self, text: str) -> None:
        """Prints a line at once."""
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing to do."""


class NoProgress:
    """Shows nothing."""

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        """Nothing to do."""

    def message(self, text: str) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class _Pace:
    """Says how far a run is; the time left is reckoned from the first report on, so without compiling."""

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_steps = total_steps
        self._clock = clock
        self._first: tuple[int, float] | None = None

    def describe(self, step: int, scalars: Mapping[str, float]) -> str:
        """E.g. `step 120/1,000  loss 3.4120  12,345 tokens/s  ETA 0:03:10`."""
        now = self._clock()
        self._first = self._first or (step, now)
        steps_done, seconds = step - self._first[0], now - self._first[1]
        eta = "-:--:--"
        if steps_done > 0:
            eta = str(timedelta(seconds=int(seconds / steps_done * (self._total_steps - step))))
        return (
            f"step {step:,}/{self._total_steps:,}  loss {scalars['loss']:.4f}  "
            f"{scalars['tokens_per_second']:,.0f} tokens/s  ETA {eta}"
        )


class Row(NamedTuple):
    """What a `JsonlWriter` wrote of one step; None stands for numbers that were not finite."""

    step: int
    scalars: dict[str, float | None]
    vectors: dict[str, list[float | None]]


def read_rows(path: Path) -> Iterator[Row]:
    """The rows that a `JsonlWriter` wrote, without one that a crash cut short."""
    return (row for _, row in _parsed(path))


def read_jsonl(path: Path) -> list[tuple[int, dict[str, float | None]]]:
    """The steps and scalars of `read_rows`."""
    return [(row.step, row.scalars) for row in read_rows(path)]


def read_evaluations(model_dir: str | Path) -> dict[int, dict[str, float]]:
    """What `RunLog.evaluation` has reported so far: step -> value by `TASK/METRIC`; empty where nothing has."""
    path = Path(model_dir) / "metrics" / "evaluations.jsonl"
    reported: dict[int, dict[str, float]] = {}
    for step, scalars in read_jsonl(path) if path.exists() else ():
        finite = {name.removeprefix("eval/"): value for name, value in scalars.items() if value is not None}
        reported.setdefault(step, {}).update(finite)
    return reported


def _parsed(path: Path) -> Iterator[tuple[str, Row]]:
    """The whole lines of a metrics file and what they say."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue
            step = values.pop("step")
            vectors = {name: value for name, value in values.items() if isinstance(value, list)}
            yield line, Row(step, {name: value for name, value in values.items() if name not in vectors}, vectors)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def replace_text(path: Path, text: str) -> None:
    """Writes a whole file, or leaves the old one as it was: never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_run_json(model_dir: str | Path, facts: Mapping[str, object]) -> Path:
    """Writes `run.json`: what ran, on what, with which versions. Holds no host name.

    The top level describes the session that writes; `sessions` lists every one, oldest first, so that
    a resumed run still tells how it began.

    Args:
        model_dir: the run's folder.
        facts: what only the caller knows, e.g. `mesh`, `parameters`, `seeds`; anything JSON can hold.

    Returns:
        The path of the file.

    Raises:
        UserError: there is a run.json that is not JSON.
    """
    import jax

    path = Path(model_dir) / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    devices = jax.devices()
    session = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "git_revision": git_revision(Path(__file__).parent),
        "devices": {"kind": devices[0].device_kind, "count": len(devices), "processes": jax.process_count()},
        "versions": {
            "t5x_like": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in REPORTED_VERSIONS},
        },
        **facts,
    }
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))["sessions"] if path.exists() else []
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{path} was not written by t5x_like ({error}): move it away") from error
    replace_text(path, json.dumps({**session, "sessions": [*earlier, session]}, indent=2) + "\n")
    return path


def git_revision(folder: Path) -> str | None:
    """The commit of a folder's files, with `-dirty` after it if they differ; None outside a repository."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
