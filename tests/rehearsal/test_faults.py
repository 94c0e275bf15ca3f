"""What may be written behind --fault."""

import re

import pytest

from t5x_like.errors import UserError
from t5x_like.rehearsal.faults import KINDS, Fault, default_faults, parse


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kill@3:1", Fault("kill", 3, 1, 4)),
        ("freeze@7", Fault("freeze", 7, 3, 4)),
        ("slow", Fault("slow", 5, 3, 4)),
        ("resize=2@6", Fault("resize", 6, 3, 2)),
        ("resize=8", Fault("resize", 5, 3, 8)),
        ("term:0", Fault("term", 5, 0, 4)),
    ],
)
def test_a_fault_is_read(text: str, fault: Fault) -> None:
    """Four processes, ten steps; what is left out is the last process, and halfway."""
    assert parse(text, processes=4).within(10) == fault
    assert parse(str(fault), processes=4) == fault


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kil@3", "'kil' is no fault. Did you mean 'kill'? There are kill, term, freeze, slow, resize"),
        ("kill at 3", "write KIND@STEP or KIND@STEP:PROCESS"),
        ("kill@3:4", "processes are 0 to 3"),
        ("kill=2@3", "resize, and no other"),
        ("resize@3", "resize, and no other"),
        ("resize=0@3", "at least one must be left"),
        ("kill@10:1", "the run has 10 steps; it must strike at 1 to 9"),
        ("kill@0:1", "the run has 10 steps; it must strike at 1 to 9"),
    ],
)
def test_a_mistake_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"--fault={re.escape(text)}: .*{re.escape(message)}"):
        parse(text, processes=4).within(10)


@pytest.mark.parametrize(("processes", "steps"), [(4, 12), (2, 2)])
def test_the_default_has_every_kind(processes: int, steps: int) -> None:
    faults = default_faults(processes, steps)
    assert {fault.kind for fault in faults} == set(KINDS)
    assert all(fault.within(steps) == fault and fault.process < processes for fault in faults)
    assert {fault.process for fault in faults if fault.kind == "kill"} == {0, processes - 1}
