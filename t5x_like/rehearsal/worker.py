"""`python -m t5x_like.rehearsal.worker RECORD FAULT train ...`: `t5x_like train ...`, watched, and struck in one place.

RECORD gets a JSON object for every step: which rows of the global batch this process fed, and a digest of each. FAULT
is `KIND@STEP` or `none`. Nothing of the command is replaced: two of its methods are listened to.
"""

import functools
import json
import os
import runpy
import signal
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from t5x_like.data.loader import TrainLoader
from t5x_like.training.step import StepReport
from t5x_like.training.trainer import Monitor

SLOW_SECONDS = 0.25
TERM_SECONDS = 1.0  # JAX looks for the signal once a second; a small model's run would be over by then
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "resize": signal.SIGTERM, "freeze": signal.SIGSTOP}


def main() -> None:
    """Watches, and runs the rest of the command line."""
    record, fault, *argv = sys.argv[1:]
    _watch(Path(record), fault)
    sys.argv = ["t5x_like", *argv]
    runpy.run_module("t5x_like", run_name="__main__", alter_sys=True)


def _watch(record: Path, fault: str) -> None:
    file = record.open("a", encoding="utf-8", buffering=1)  # a line at a time: the process may end at any moment
    make, add = TrainLoader.__init__, Monitor.add
    kind, _, when = fault.partition("@")
    rows: list[int] = []

    @functools.wraps(make)
    def watched_make(self: TrainLoader, *arguments: object, **named: object) -> None:
        make(self, *arguments, **named)  # type: ignore[arg-type]
        rows[:] = self.rows

    @functools.wraps(add)
    def watched_add(self: Monitor, step: int, report: StepReport, batch: Mapping[str, np.ndarray], last: bool) -> None:
        add(self, step, report, batch, last)
        file.write(json.dumps({"step": step, "rows": dict(zip(rows, digests(batch), strict=True))}) + "\n")
        if kind == "none" or step < int(when):
            return
        if step == int(when):
            file.write(json.dumps({"struck": time.time()}) + "\n")
            if kind in SIGNALS:
                os.kill(os.getpid(), SIGNALS[kind])
        time.sleep(SLOW_SECONDS if kind == "slow" else TERM_SECONDS)

    TrainLoader.__init__ = watched_make  # type: ignore[method-assign]
    Monitor.add = watched_add  # type: ignore[method-assign]


def digests(batch: Mapping[str, np.ndarray]) -> list[int]:
    """A checksum of every row of a batch, over all its features."""
    sums: list[int] = [0] * len(next(iter(batch.values())))
    for name in sorted(batch):
        sums = [
            zlib.crc32(np.ascontiguousarray(row).tobytes(), value) for row, value in zip(batch[name], sums, strict=True)
        ]
    return sums


if __name__ == "__main__":
    main()
