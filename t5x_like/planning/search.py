"""Which ways to run a job are worth compiling, and which of those is best."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from t5x_like.errors import UserError
from t5x_like.planning import hardware
from t5x_like.planning.arithmetic import Estimate, Workload
from t5x_like.planning.choice import Choice, choices
from t5x_like.planning.compiled import CannotCompile
from t5x_like.planning.hardware import Target
from t5x_like.planning.plan import Compiler, Plan, measure
from t5x_like.recipe import Recipe


class Ranked(NamedTuple):
    """A way that was not compiled yet."""

    choice: Choice
    estimate: Estimate


def rank(recipe: Recipe, topology: str | None, given: Choice) -> list[Ranked]:
    """Ways to run a job, those first that are worth compiling.

    These are the fastest by arithmetic that fit, then the rest of the Pareto set of time and memory, then all others.

    Raises:
      UserError: as `measure`; or no mesh divides the job.
    """
    target = hardware.topology(topology) if topology else hardware.present()
    workload = Workload.of(recipe, target)
    ways = choices(len(target.devices), target.slices, workload.experts, given)
    estimates = ((choice, workload.estimate(choice, target)) for choice in ways)
    ranked = [Ranked(choice, estimate) for choice, estimate in estimates if estimate is not None]
    if not ranked:
        raise UserError(
            f"plan: no mesh of {len(target.devices)} devices divides this job's parameters and its batch of "
            f"{workload.batch}; try --gin.BATCH_SIZE={-(-workload.batch // len(target.devices)) * len(target.devices)}"
        )
    return _worth(ranked, target)


def _worth(ranked: Sequence[Ranked], target: Target, fastest: int = 3) -> list[Ranked]:
    """In the order of `rank`."""
    room = 0.9 * target.chip.memory_gib  # estimates know nothing of temporaries
    in_time = sorted(ranked, key=lambda way: (float(f"{way.estimate.seconds:.2g}"), way.estimate.work))
    fitting = [way for way in in_time if way.estimate.memory_gib <= room]
    first = fitting[:fastest] or sorted(ranked, key=lambda way: way.estimate.memory_gib)[:fastest]
    front, least = [], float("inf")
    for way in in_time:
        if way.estimate.memory_gib < 0.95 * least:
            least = way.estimate.memory_gib
            front.append(way)
    leaner = [way for way in front if way.estimate.memory_gib <= room and way not in first]
    chosen = [*first, *leaner]
    return [*chosen, *(way for way in in_time if way not in chosen)]


class Search(NamedTuple):
    """What was found for one target.

    Attributes:
      plans: those that were compiled, best first.
      others: those that were not, best first by arithmetic.
    """

    plans: list[Plan]
    others: list[Ranked]


def search(
    recipe: Recipe,
    topology: str | None,
    given: Choice,
    compiler: Compiler,
    max_compiles: int,
    minutes: float,
    progress: Callable[[str], None],
) -> Search:
    """Compiles the ways that arithmetic says are worth it, as many as are allowed, for as long as is.

    Args:
      recipe: the job.
      topology: as in `measure`.
      given: what is not to be searched over; with a mesh, nothing is.
      compiler: measures.
      max_compiles: so many ways at most.
      minutes: none is begun later.
      progress: told what is being done.

    Raises:
      UserError: as `rank`.
    """
    if given.mesh is not None or recipe.binds("partitioner"):
        progress(str(given))
        return Search([compile_plan(recipe, topology, given, compiler)], [])
    start = time.monotonic()
    progress("arithmetic")
    ranked = compiler(rank, recipe, topology, given)
    plans: list[Plan] = []
    for count, way in enumerate(ranked[:max_compiles], 1):
        if plans and time.monotonic() - start > 60 * minutes:
            break
        progress(f"{count} of {min(max_compiles, len(ranked))}: {way.choice}")
        plans.append(compile_plan(recipe, topology, way.choice, compiler))
    done = [plan.choice for plan in plans]
    return Search(sorted(plans, key=_order), [way for way in ranked if way.choice not in done])


def compile_plan(recipe: Recipe, topology: str | None, choice: Choice, compiler: Compiler) -> Plan:
    """`measure` in the compiler's process; its crash is a plan that does not compile."""
    try:
        return compiler(measure, recipe, topology, choice)
    except CannotCompile as error:
        return Plan(topology or "here", 0, choice, {}, compile_error=str(error))


def _order(plan: Plan) -> tuple[bool, float]:
    return not plan.fits, plan.seconds if plan.seconds is not None else float("inf")


def pareto(plans: Sequence[Plan]) -> list[Plan]:
    """Those of which no other is both faster and leaner, fastest first."""
    front: list[Plan] = []
    for plan in sorted((plan for plan in plans if plan.fits), key=_order):
        assert plan.train is not None
        if all(other.train is None or plan.train.peak_memory_gib < other.train.peak_memory_gib for other in front):
            front.append(plan)
    return front


def why_not(plan: Plan, best: Plan) -> str:
    """Why a plan is not the best, in a few words."""
    if plan.compile_error:
        return plan.compile_error
    assert plan.train is not None
    if not plan.fits:
        return f"needs {plan.train.peak_memory_gib:.1f} GiB of {plan.memory_limit_gib:.1f}"
    if plan.seconds is None or best.seconds is None or best.train is None:
        return ""
    leaner = best.train.peak_memory_gib - plan.train.peak_memory_gib
    saved = f", {leaner:.1f} GiB leaner" if leaner > 0.05 else ""
    return f"{plan.seconds / best.seconds - 1:.0%} slower ({plan.bound}){saved}"
