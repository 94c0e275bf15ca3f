"""The proof sheet: all checks, from top to bottom, and what becomes of them."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from t5x_like.errors import UserError, nearest
from t5x_like.verification import equivalences, experts, sequences, states
from t5x_like.verification.compare import Comparison, said
from t5x_like.verification.equivalences import Findings
from t5x_like.verification.subject import NotApplicable, Subject


class Check(NamedTuple):
    """A claim about every model, and what tries to refute it."""

    name: str
    claim: str
    run: Callable[[Subject], Findings]


CHECKS = (
    Check("mesh", "a mesh computes what one device does: loss and every gradient", equivalences.meshes),
    Check("packing", "packed examples get what they get alone", sequences.packing),
    Check("leak", "an example sees nothing of its neighbours in a row", sequences.leak),
    Check("scan", "scanned layers compute what a loop of layers does", equivalences.scan),
    Check("remat", "recomputed activations are those that were not kept", equivalences.remat),
    Check("microbatches", "a batch in parts is the whole batch", equivalences.microbatches),
    Check("attention", "attention in blocks is plain attention", equivalences.attention),
    Check("dropout", "a key acts in every kind of layer, and replays", equivalences.dropout),
    Check("decoding", "a decoding cache is teacher forcing", sequences.decoding),
    Check("resume", "a run that stopped goes on as if it had not", states.resume),
    Check("restore", "a checkpoint is the same on another mesh", states.restore),
    Check("sparse", "dispatched tokens get what their experts make of each", experts.sparse),
    Check("bfloat16", "bfloat16 is near float32", equivalences.bfloat16),
    Check("conversion", "weights come back from Hugging Face's format", states.conversion),
)
"""To add one, write a generator of `(what was tried, Comparison)` over a `Subject`, and list it here."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One line of the sheet.

    Attributes:
      check: its name, and what was tried.
      comparison: how it went; None where the check says nothing about this model.
      reason: why it does not.
      seconds: taken, compilation included.
    """

    check: str
    comparison: Comparison | None
    reason: str | None
    seconds: float


def chosen(names: Sequence[str]) -> tuple[Check, ...]:
    """The checks of these names, in the order of the sheet; all of them where none is named.

    Raises:
      UserError: there is no such check.
    """
    known = [check.name for check in CHECKS]
    for name in names:
        if name not in known:
            raise UserError(f"--check {name}: no such check.{nearest(name, known)} There are {', '.join(known)}")
    return tuple(check for check in CHECKS if not names or check.name in names)


def outcomes(subject: Subject, check: Check) -> Iterator[Outcome]:
    """Runs a check. One that breaks down has failed."""
    start = time.perf_counter()

    def outcome(what: str, comparison: Comparison | None, reason: str | None = None) -> Outcome:
        nonlocal start
        begun, start = start, time.perf_counter()
        return Outcome(f"{check.name} {what}".strip(), comparison, reason, start - begun)

    try:
        for what, comparison in check.run(subject):
            yield outcome(what, comparison)
    except (NotApplicable, UserError) as error:
        yield outcome("", None, str(error))
    except Exception as error:  # whatever a broken layer raises
        yield outcome("", said(False, f"{type(error).__name__}: {error}"))
