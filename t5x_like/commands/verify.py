"""`t5x_like verify`: a proof sheet for one's own config."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from t5x_like import gin_config
from t5x_like.data.loader import DatasetConfig
from t5x_like.errors import RunFailed, UserError
from t5x_like.models.contract import Model
from t5x_like.recipe import Recipe
from t5x_like.sharding import Partitioner, ShardingRules
from t5x_like.training.trainer import Trainer
from t5x_like.verification.sheet import Outcome, chosen, outcomes
from t5x_like.verification.shrink import shrink
from t5x_like.verification.subject import MOST_DEVICES, Subject


def verify(recipe: Recipe, check: Sequence[str] = (), json_file: str | None = None) -> None:
    """Shrinks a config, keeping its structure, and checks that all that is to be equal is.

    Args:
      recipe: what `train` would be given.
      check: names of the checks to run; none: all of them.
      json_file: where to write, for everything that was checked, `check passed margin first_difference` and more.

    Raises:
      UserError: a mistake in the config, or a check that does not exist.
      RunFailed: a check failed.
    """
    start, checks = time.perf_counter(), chosen(check)
    _make_devices()
    subject, notes = _subject(recipe)
    console, errors = (Console(stderr=e, highlight=False, markup=False, soft_wrap=True) for e in (False, True))
    console.print("\n".join(notes))
    sheet: list[Outcome] = []
    with errors.status("") if errors.is_terminal else contextlib.nullcontext() as status:
        for each in checks:
            if status is not None:
                status.update(f"{each.name}: {each.claim}")
            for outcome in outcomes(subject, each):
                errors.print(f"{time.perf_counter() - start:6.1f} s  {outcome.check:<40} {_verdict(outcome)}")
                sheet.append(outcome)
    _print(console, sheet)
    if json_file is not None:
        Path(json_file).write_text(json.dumps([_facts(o) for o in sheet if o.comparison], indent=2) + "\n")
    ran = [outcome for outcome in sheet if outcome.comparison]
    failed = [outcome.check for outcome in ran if _verdict(outcome) == "FAILED"]
    seconds = f"in {time.perf_counter() - start:.0f} s on {jax.device_count()} {jax.devices()[0].platform} devices"
    if failed:
        raise RunFailed(f"{len(failed)} of {len(ran)} {seconds}: {', '.join(failed)}")
    console.print(f"all {len(ran)} passed {seconds}" if ran else "nothing that was asked for applies")


@dataclasses.dataclass(frozen=True)
class _Job:
    """What of a training job matters here; its mesh need not exist."""

    model: Model
    dataset: DatasetConfig
    trainer: Trainer


def _subject(recipe: Recipe) -> tuple[Subject, list[str]]:
    """What is to be verified, and what is to be said of it."""
    config = recipe.load()
    job = gin_config.run(config, instead=_Job)
    assert isinstance(job, _Job)
    small = shrink(job.model, job.dataset.task_feature_lengths)
    notes = [f"made small: {', '.join(small.changes) or 'nothing'}"]
    rules = ShardingRules()
    try:
        partitioner = gin_config.run(config, instead=_partitioner)
        rules = partitioner.rules if isinstance(partitioner, Partitioner) else rules
    except UserError as error:
        notes.append(f"with the default sharding rules, as the config's mesh cannot be made here: {error}")
    if len(jax.devices()) < MOST_DEVICES:
        notes.append(
            f"meshes have {len(jax.devices())} devices, as JAX had started before there could be {MOST_DEVICES}"
        )
    return Subject(small.model, small.lengths, job.trainer.optimizer, rules, job.dataset.pack, job.trainer.seed), notes


def _partitioner(partitioner: Partitioner | None = None) -> Partitioner | None:
    return partitioner


def _make_devices() -> None:
    """Virtual CPU devices, unless JAX has started already or has been told how many to make."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_platforms", "cpu")
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", MOST_DEVICES)


def _verdict(outcome: Outcome) -> str:
    if outcome.comparison is None:
        return f"does not apply: {outcome.reason}"
    return "passed" if outcome.comparison.passed else "FAILED"


def _print(console: Console, sheet: Sequence[Outcome]) -> None:
    table = Table("check", "", "difference", "bound", "margin", "seconds", box=None)
    for outcome in sheet:
        if outcome.comparison is not None:
            measured = outcome.comparison
            numbers = f"{measured.difference:.1e}", f"{measured.bound:.0e}", f"{measured.margin:.2f}"
            numbers = ("0", "exact", "1.00") if measured.bound == measured.difference == 0 else numbers
            table.add_row(outcome.check, _verdict(outcome), *numbers, f"{outcome.seconds:.1f}")
    Console(width=100, highlight=False).print(table)
    for outcome in sheet:
        if outcome.comparison is None:
            console.print(f"{outcome.check}: {_verdict(outcome)}")
        elif not outcome.comparison.passed:
            console.print(f"{outcome.check}: FAILED at {outcome.comparison.first_difference}")


def _facts(outcome: Outcome) -> dict[str, object]:
    assert outcome.comparison is not None
    measured = outcome.comparison
    return {
        "check": outcome.check,
        "passed": measured.passed,
        "margin": measured.margin,
        "first_difference": measured.first_difference,
        "difference": min(measured.difference, 1e30),  # JSON has no infinity
        "bound": measured.bound,
        "seconds": round(outcome.seconds, 2),
    }
