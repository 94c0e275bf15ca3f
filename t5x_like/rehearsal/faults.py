"""What may go wrong with a host, and when it is to."""

import re
from typing import NamedTuple

from t5x_like.errors import UserError, nearest

KINDS = {
    "kill": "the process is gone at once (SIGKILL)",
    "term": "it is told to stop, as before a preemption (SIGTERM)",
    "freeze": "it does nothing any more (SIGSTOP)",
    "slow": "it takes longer for every step",
    "resize": "the job is told to stop, and goes on with another number of processes",
}


HALFWAY = -1


class Fault(NamedTuple):
    """One fault.

    Attributes:
      kind: one of `KINDS`.
      step: the step after which it strikes, or `HALFWAY`.
      process: which process it strikes.
      processes: how many the job goes on with; `resize` alone changes that.
    """

    kind: str
    step: int
    process: int
    processes: int

    def within(self, steps: int) -> "Fault":
        """The same in a run of so many steps; raises `UserError` where it would not strike before the last."""
        fault = self if self.step != HALFWAY else self._replace(step=max(1, steps // 2))
        if not 1 <= fault.step < steps:
            raise UserError(f"--fault={fault}: the run has {steps} steps; it must strike at 1 to {steps - 1}")
        return fault

    def __str__(self) -> str:
        size = f"={self.processes}" if self.kind == "resize" else ""
        return f"{self.kind}{size}@{self.step}:{self.process}"


def parse(text: str, processes: int) -> Fault:
    """Reads `KIND[=M][@STEP][:PROCESS]`; without a process it strikes the last one, without a step halfway.

    Args:
      text: M is the new number of processes of `resize`.
      processes: of the job.

    Raises:
      UserError: names what is wrong.
    """
    match = re.fullmatch(r"(\w+?)(?:=(\d+))?(?:@(\d+))?(?::(\d+))?", text)
    if match is None:
        raise UserError(f"--fault={text}: write KIND@STEP or KIND@STEP:PROCESS, for example kill@3:1, or resize=2@3")
    kind, size, step, process = match.groups()
    if kind not in KINDS:
        raise UserError(f"--fault={text}: {kind!r} is no fault.{nearest(kind, KINDS)} There are {', '.join(KINDS)}")
    if (kind == "resize") != (size is not None):
        raise UserError(f"--fault={text}: resize, and no other, needs the new number of processes: resize=2@3")
    fault = Fault(kind, int(step or HALFWAY), int(process or processes - 1), int(size or processes))
    if fault.process >= processes or fault.processes < 1:
        raise UserError(f"--fault={text}: processes are 0 to {processes - 1}, and at least one must be left")
    return fault


def default_faults(processes: int, steps: int) -> list[Fault]:
    """One of every kind, and the loss of process 0, where the others meet."""
    early, half, last = max(1, steps // 3), max(1, steps // 2), processes - 1
    return [
        Fault("kill", half, last, processes),
        Fault("kill", half, 0, processes),
        Fault("term", early, last, processes),
        Fault("freeze", half, last, processes),
        Fault("slow", early, 0, processes),
        Fault("resize", early, 0, max(1, processes // 2)),
    ]
