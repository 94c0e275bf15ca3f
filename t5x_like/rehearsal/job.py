"""A job as a cluster manager runs it: processes started together, started again when one is lost."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from t5x_like import distributed
from t5x_like.errors import RunFailed, UserError
from t5x_like.rehearsal.faults import Fault

POLL_SECONDS = 0.1
MAX_ATTEMPTS = 4
END_SECONDS = 15
"""For a process to end once it has noticed that another one is lost."""


class Seen(NamedTuple):
    """What one process noted down of one attempt.

    Attributes:
      rows: by step, the digest of every row of the global batch that it fed.
      struck: when the fault struck it.
    """

    rows: dict[int, dict[int, int]]
    struck: float | None


class Outcome(NamedTuple):
    """A job that came to its end.

    Attributes:
      folder: the run's.
      attempts: what the processes of each attempt noted down.
      seconds_to_notice: from the loss of a process until another one ended because of it.
    """

    folder: Path
    attempts: list[list[Seen]]
    seconds_to_notice: float | None

    def steps_lost(self) -> int:
        """Steps that had to be computed again."""
        done = [{step for seen in attempt for step in seen.rows} for attempt in self.attempts]
        return sum(map(len, done)) - len(set().union(*done))


@dataclasses.dataclass(frozen=True)
class Job:
    """`t5x_like train` on several processes of this machine.

    Attributes:
      arguments: what stands behind `t5x_like train`, less the run's folder.
      steps: at which the run ends.
      folder: for this job alone.
      devices_per_process: virtual CPU devices of each.
      patience: seconds of silence after which a process counts as dead.
      limit: seconds without a step after which the job is given up.
    """

    arguments: Sequence[str]
    steps: int
    folder: Path
    devices_per_process: int
    patience: int
    limit: int = 600

    @property
    def run_folder(self) -> Path:
        """The run's."""
        return self.folder / "run"

    def run(self, processes: int, fault: Fault | None = None) -> Outcome:
        """Runs the job to its end, whatever the fault takes.

        Raises:
          UserError: what `train` says of its configuration.
          RunFailed: a process failed for another reason than the fault, or nobody noticed that one was lost.
        """
        attempts: list[list[Seen]] = []
        noticed = None
        while len(attempts) < MAX_ATTEMPTS:
            records, codes, ended = self._attempt(processes, None if attempts else fault, len(attempts))
            attempts.append([_read(record) for record in records])
            struck = next((seen.struck for seen in attempts[-1] if seen.struck is not None), None)
            if not any(codes) and any(self.steps in seen.rows for seen in attempts[-1]):
                if fault is not None and fault.kind != "slow" and len(attempts) == 1:
                    raise RunFailed(f"{fault}: the run was over before it stopped; give it more steps (TRAIN_STEPS)")
                return Outcome(self.run_folder, attempts, noticed)
            if struck is None or fault is None or any(codes) != (fault.kind in ("kill", "freeze")):
                raise self._failure(records, codes)
            noticed = ended - struck if any(codes) else None
            processes = fault.processes
        raise RunFailed(f"{self.folder}: not through after {MAX_ATTEMPTS} attempts")

    def _attempt(self, count: int, fault: Fault | None, number: int) -> tuple[list[Path], list[int], float]:
        """Starts all processes; where one fails, ends the others, as cluster managers do.

        Returns:
          Where each noted down what it did, their exit codes, and when the first one ended.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        records = [self.folder / f"attempt_{number}.process_{index}.jsonl" for index in range(count)]
        address = f"127.0.0.1:{_free_port()}"
        running: list[subprocess.Popen[bytes]] = []
        try:
            for index, record in enumerate(records):
                strikes = fault is not None and fault.process == index
                words = ["-m", "t5x_like.rehearsal.worker", str(record)]
                words += [f"{fault.kind}@{fault.step}" if fault and strikes else "none", "train", *self.arguments]
                words += [f"--gin.MODEL_DIR={self.run_folder}", f"--coordinator={address}", f"--num_processes={count}"]
                words += [f"--process_id={index}", f"--heartbeat_seconds={self.patience}"]
                with record.with_suffix(".log").open("wb") as log:
                    running.append(
                        subprocess.Popen(
                            [sys.executable, *words],
                            env=self._environment(),
                            stdout=log,
                            stderr=log,
                            stdin=subprocess.DEVNULL,
                            start_new_session=True,  # Ctrl-C is for us alone
                        )
                    )
            ended = self._wait(running, records, fault)
        finally:
            for process in running:
                process.kill()
            for process in running:
                process.wait()
        return records, [process.returncode for process in running], ended

    def _wait(self, running: list["subprocess.Popen[bytes]"], records: list[Path], fault: Fault | None) -> float:
        """Until all have ended well, or one has failed; returns when the first one that was not killed ended."""
        start = time.time()
        while True:
            codes = [process.poll() for process in running]
            others = [code for code in codes if code != -signal.SIGKILL]
            if all(code is not None for code in codes) or any(others):
                return time.time()
            progress = max([start, *(record.stat().st_mtime for record in records if record.exists())])
            lost = fault is not None and fault.kind in ("kill", "freeze") and _read(records[fault.process]).struck
            limit = self.patience + END_SECONDS if lost else self.limit
            if time.time() - progress > limit:
                raise RunFailed(f"{self.folder}: no process has done a step or ended for {limit} s; see the logs there")
            time.sleep(POLL_SECONDS)

    def _environment(self) -> dict[str, str]:
        flags = f"{other_flags()} --xla_force_host_platform_device_count={self.devices_per_process}"
        kept = {name: value for name, value in os.environ.items() if name not in distributed.VARIABLES.values()}
        return kept | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}

    def _failure(self, records: list[Path], codes: list[int]) -> Exception:
        """What the process that failed said; one that was killed, by us, had nothing to say."""
        if not any(codes):
            return RunFailed(f"{self.folder}: the run ended before its last step, {self.steps}")
        index = next((i for i, code in enumerate(codes) if code not in (0, -signal.SIGKILL)), 0)
        log = records[index].with_suffix(".log")
        lines = log.read_text(errors="replace").splitlines()
        if codes[index] == 2:
            at = next((number for number, line in enumerate(lines) if line.startswith("error: ")), 0)
            return UserError("\n".join(lines[at:]).removeprefix("error: "))
        return RunFailed(
            f"process {index} ended with code {codes[index]}; the end of {log}:\n" + "\n".join(lines[-15:])
        )


def other_flags() -> str:
    """XLA_FLAGS, less a number of virtual devices."""
    return re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))


def _read(record: Path) -> Seen:
    rows: dict[int, dict[int, int]] = {}
    struck = None
    for entry in _entries(record):
        if "struck" in entry:
            struck = entry["struck"]
        else:
            rows[entry["step"]] = {int(row): digest for row, digest in entry["rows"].items()}
    return Seen(rows, struck)


def _entries(record: Path) -> Iterator[dict[str, Any]]:
    if record.exists():
        for line in record.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:  # the process ended in the middle of it
                continue


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
