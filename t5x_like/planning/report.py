"""A plan for readers: JSON, tables, one HTML page, and the gin file that runs it."""

import dataclasses
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from t5x_like.planning.compiled import Cost
from t5x_like.planning.plan import Plan
from t5x_like.planning.search import Search, pareto, why_not
from t5x_like.recipe import Recipe

PREDICTION = (
    "Seconds are a prediction: a roofline of the compiled program at the chip's published peaks, never reached."
)
ON_CPU = (
    "Seconds are a prediction: a roofline at what was measured of this processor. What stays in its caches counts as "
    "memory traffic, too: a step may take less."
)


def as_json(plan: Plan, price: float | None = None) -> dict[str, object]:
    """A plan as JSON; sizes in GiB and of one chip, `null` where the compiler made no program.

    Args:
      plan: what was measured.
      price: of a chip for an hour.
    """
    train, seconds = plan.train, plan.seconds
    hours = None if seconds is None else seconds * plan.train_steps / 3600
    chip_hours = None if hours is None else hours * plan.devices
    return {
        "topology": plan.topology,
        "devices": plan.devices,
        "mesh": plan.mesh,
        "batch_size": plan.batch_size,
        "remat": plan.choice.remat,
        "microbatches": plan.choice.microbatches,
        "fsdp": plan.choice.fsdp,
        "fits": plan.fits,
        "memory_limit_gib": plan.memory_limit_gib,
        "peak_memory_gib": train and train.peak_memory_gib,
        "spare_memory_gib": train and plan.memory_limit_gib - train.peak_memory_gib,
        "argument_gib": train and train.argument_gib,
        "parameters_gib": plan.parameters_gib,
        "optimizer_gib": plan.optimizer_gib,
        "activations_gib": train and min(plan.activations_gib, train.temporary_gib),
        "temporaries_gib": train and max(train.temporary_gib - plan.activations_gib, 0.0),
        "host_gib": train and train.host_gib,
        "flops_per_chip": train and train.flops_per_chip,
        "model_flops": plan.model_flops,
        "memory_bytes_per_chip": train and train.memory_bytes,
        "collectives": train and [dataclasses.asdict(each) for each in train.traffic],
        "compute_seconds": train and train.compute_seconds,
        "memory_seconds": train and train.memory_seconds,
        "ici_seconds": train and train.network_seconds("ICI"),
        "dcn_seconds": train and train.network_seconds("DCN"),
        "predicted_seconds_per_step": seconds,
        "bound": plan.bound,
        "mfu_bound": plan.utilisation,
        "tokens_per_second": None if seconds is None else plan.tokens / seconds,
        "train_steps": plan.train_steps,
        "hours": hours,
        "chip_hours": chip_hours,
        "price": None if price is None or chip_hours is None else price * chip_hours,
        "measured_seconds_per_step": plan.measured_seconds,
        "prediction_error": _error(plan),
        "decode": plan.decode and _decode(plan.decode, plan.memory_limit_gib),
        "decode_error": plan.decode_error,
        "compile_seconds": train and train.compile_seconds,
        "compile_error": plan.compile_error,
    }


def _decode(cost: Cost, limit: float) -> dict[str, object]:
    return {
        "fits": cost.fits,
        "peak_memory_gib": cost.peak_memory_gib,
        "spare_memory_gib": limit - cost.peak_memory_gib,
        "flops_per_chip": cost.flops_per_chip,
        "predicted_seconds": cost.seconds or None,
    }


def _error(plan: Plan) -> float | None:
    """How much longer a step takes than predicted, as a share of the prediction."""
    if plan.measured_seconds is None or plan.seconds is None:
        return None
    return plan.measured_seconds / plan.seconds - 1


def show(console: Console, found: Sequence[Search], price: float | None) -> None:
    """Prints, for every target, the plans that were compiled and, of the best, all that is known."""
    for search in found:
        best = search.plans[0]
        console.print(f"\n[bold]{best.topology}[/bold]: {best.devices} devices, batch {best.batch_size}")
        console.print(_table(search))
        if best.fits:
            console.print(_details(best, price))
        for plan in search.plans:
            if plan.compile_error:
                console.print(f"{plan.choice}: {plan.compile_error}", soft_wrap=True)
            if plan.decode_error:
                console.print(f"greedy decoding: {plan.decode_error}", soft_wrap=True)
        for way in search.others[:3]:
            estimate = way.estimate
            console.print(
                f"not compiled: {way.choice}: by arithmetic {estimate.seconds:.3g} s, {estimate.memory_gib:.1f} GiB",
                style="dim",
            )
    console.print(f"\n{_prediction(found)}", style="dim")


def _prediction(found: Sequence[Search]) -> str:
    return ON_CPU if all(search.plans[0].topology == "cpu" for search in found) else PREDICTION


def _table(search: Search) -> Table:
    table = Table("", "way", "fits", "peak GiB", "seconds/step", "bound", "MFU at most", "", box=None)
    best, front = search.plans[0], pareto(search.plans)
    for plan in search.plans:
        mark = "best" if plan is best and plan.fits else "Pareto" if plan in front else ""
        why = "" if plan is best and plan.fits else "see below" if plan.compile_error else why_not(plan, best)
        cost = plan.train
        peak = f"{cost.peak_memory_gib:.2f}" if cost else "-"
        seconds = f"{plan.seconds:.3f}" if plan.seconds else "-"
        share = f"{plan.utilisation:.0%}" if plan.utilisation else "-"
        table.add_row(
            mark, str(plan.choice), "yes" if plan.fits else "no", peak, seconds, plan.bound or "-", share, why
        )
    return table


def _details(plan: Plan, price: float | None) -> Table:
    values = as_json(plan, price)
    table = Table("of each chip", "", box=None, show_header=False)
    table.add_row("memory", " + ".join(f"{name} {values[f'{name}_gib']:.2f}" for name in _MEMORY) + " GiB")
    table.add_row("spare", f"{values['spare_memory_gib']:.2f} of {plan.memory_limit_gib:.2f} GiB")
    table.add_row("time", ", ".join(f"{name} {values[f'{name}_seconds']:.3g}" for name in _TIME) + " s")
    table.add_row("FLOPs", f"{values['flops_per_chip']:.4g} a step, of which the model needs {_needed(plan):.0%}")
    for each in plan.train.traffic[:4] if plan.train else ():
        axes = " x ".join(each.axes)
        table.add_row(f"{each.kind}", f"{each.gib:.2f} GiB over {axes} ({each.network}), {each.seconds:.3g} s")
    table.add_row("tokens/s", f"{values['tokens_per_second']:,.0f} on all chips")
    cost = f", {values['price']:,.0f} at {price} a chip-hour" if price is not None else ""
    table.add_row(
        f"{plan.train_steps:,} steps", f"{values['hours']:,.1f} h, {values['chip_hours']:,.0f} chip-hours{cost}"
    )
    if plan.decode:
        seconds = f", {plan.decode.seconds:.3g} s a batch" if plan.decode.seconds else ""
        fits = "fits" if plan.decode.fits else "does not fit"
        table.add_row("greedy decoding", f"{fits}: {plan.decode.peak_memory_gib:.2f} GiB{seconds}")
    if plan.measured_seconds is not None:
        table.add_row("measured here", f"{plan.measured_seconds:.3f} s a step, {_error(plan):+.0%} of the prediction")
    return table


_MEMORY = ("parameters", "optimizer", "activations", "temporaries")
_TIME = ("compute", "memory", "ici", "dcn")


def _needed(plan: Plan) -> float:
    work = plan.train.flops_per_chip * plan.devices if plan.train else math.nan
    return plan.model_flops / work if work else math.nan


def write_gin(plan: Plan, recipe: Recipe, path: str | Path) -> None:
    """Writes what `t5x_like train --gin_file=PATH --gin.MODEL_DIR=FOLDER` takes to train this way."""
    seconds = f", {plan.seconds:.3f} s a step (predicted)" if plan.seconds else ""
    memory = f", {plan.train.peak_memory_gib:.2f} of {plan.memory_limit_gib:.2f} GiB" if plan.train else ""
    config = plan.choice.of(recipe).load().operative_config()
    config = "".join(line for line in config.splitlines(keepends=True) if not line.startswith("MODEL_DIR ="))
    Path(path).write_text(f"# By `t5x_like plan` for {plan.topology}: {plan.choice}{memory}{seconds}.\n{config}")


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 64em; padding: 0 1em; color: #1c1e21 }
h2 { margin: 1.6em 0 .3em } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .3em .6em; border-bottom: 1px solid #ddd; vertical-align: top }
.num { text-align: right }
.bar { display: flex; height: 1.1em; min-width: 14em; background: #eee; position: relative } .bar div { height: 100% }
.legend span { display: inline-block; margin-right: 1.2em }
.legend i { display: inline-block; width: .8em; height: .8em }
.no { color: #b3261e } .note { color: #666 }
"""
_COLOURS = ("#3b6ea8", "#7fa7d1", "#d99a3c", "#8d8d8d")


def write_html(found: Sequence[Search], path: str | Path) -> None:
    """Writes one page that opens from disk: memory and time of every plan, as bars and numbers."""
    parts = ["<!doctype html><meta charset=utf-8><title>t5x_like plan</title>", f"<style>{_STYLE}</style>"]
    parts.append(f"<h1>Plan</h1><p class=note>{_prediction(found)}</p>")
    for search in found:
        best = search.plans[0]
        parts.append(f"<h2>{html.escape(best.topology)}: {best.devices} devices, batch {best.batch_size}</h2>")
        parts.append(f"<p class=legend>Memory of a chip: {_legend(_MEMORY)} Time of a step: {_legend(_TIME)}</p>")
        parts.append(
            "<table><tr><th>way<th>memory<th class=num>GiB<th>time<th class=num>s/step<th class=num>MFU at most<th>"
        )
        longest = max((seconds for plan in search.plans for seconds in _seconds(plan)), default=0.0)
        parts += [_row(plan, best, longest) for plan in search.plans]
        parts.append("</table>")
    Path(path).write_text("\n".join(parts))


def _legend(names: Sequence[str]) -> str:
    return "".join(f"<span><i style='background:{c}'></i> {n}</span>" for n, c in zip(names, _COLOURS, strict=True))


def _seconds(plan: Plan) -> list[float]:
    cost = plan.train
    if cost is None:
        return []
    return [cost.compute_seconds, cost.memory_seconds, cost.network_seconds("ICI"), cost.network_seconds("DCN")]


def _row(plan: Plan, best: Plan, longest: float) -> str:
    values = as_json(plan)
    why = html.escape("best" if plan is best and plan.fits else why_not(plan, best))
    way = f"<tr class={'yes' if plan.fits else 'no'}><td>{html.escape(str(plan.choice))}"
    if plan.train is None:
        return f"{way}<td><td class=num>-<td><td class=num>-<td class=num>-<td>{why}"
    memory = _bar([values[f"{name}_gib"] for name in _MEMORY], plan.memory_limit_gib)
    time = "".join(_bar([value], longest, i) for i, value in enumerate(_seconds(plan)))
    seconds = f"{plan.seconds:.3f}" if plan.seconds else "-"
    share = f"{plan.utilisation:.0%}" if plan.utilisation else "-"
    return (
        f"{way}<td>{memory}<td class=num>{plan.train.peak_memory_gib:.2f}<td>{time}"
        f"<td class=num>{seconds}<td class=num>{share}<td>{why}"
    )


def _bar(values: Sequence[object], whole: object, colour: int = 0) -> str:
    def width(value: object) -> float:
        return 100 * float(str(value or 0)) / (float(str(whole or 0)) or 1)

    parts = (
        f"<div style='width:{min(width(value), 100):.2f}%;background:{_COLOURS[colour + i]}'></div>"
        for i, value in enumerate(values)
    )
    return f"<div class=bar>{''.join(parts)}</div>"


def write_json(found: Sequence[Search], path: str | Path, price: float | None = None) -> None:
    """Writes a list with the best plan of every target; its `runners_up` are the others, and why they lost."""
    entries = []
    for search in found:
        best, *others = search.plans
        lost = [as_json(plan, price) | {"reason": why_not(plan, best)} for plan in others]
        entries.append(as_json(best, price) | {"runners_up": lost})
    Path(path).write_text(json.dumps(entries, indent=1) + "\n")
