"""One self-contained HTML page about a run, made from its folder alone: curves, metrics, samples, config, versions.

The page opens from disk with no network and no script; a point of a curve tells its value when pointed at.
"""

import json
import math
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import islice
from pathlib import Path
from statistics import median
from string import Template

import numpy as np

from t5x_like.errors import UserError
from t5x_like.training.heatmap import LEVELS, History, encode_png, levels, ratios_to_mean
from t5x_like.training.run_log import read_jsonl, read_rows, replace_text

Points = Sequence[tuple[int, float | None]]
"""`(step, value)` in order of step; None where the value was not finite."""

MAIN_CURVES = ("loss", "accuracy", "learning_rate", "gradient_norm", "tokens_per_second", "share_of_matmul_peak")
ROUTER_CURVES = ("router/dropped", "router/entropy", "router/confidence", "router/balance_loss", "router/z_loss")
SAMPLES_PER_TASK = 5
POINTS_PER_CURVE = 300
CELLS_PER_HEATMAP = 256 * 300


def write_report(model_dir: str | Path) -> Path:
    """Writes `report.html` into a run's folder; what the folder does not hold is left out.

    Args:
        model_dir: the run's folder; of it are read `metrics/*.jsonl`, `eval/TASK/STEP.jsonl` (rows with `inputs`,
            `targets`, `predictions`, `score`), `config.gin` and `run.json`.

    Returns:
        The path of the page.

    Raises:
        UserError: the folder holds nothing that a run leaves.
    """
    folder = Path(model_dir).resolve()
    curves = _curves(folder / "metrics" / "metrics.jsonl")
    evaluations = _curves(folder / "metrics" / "evaluations.jsonl")
    run = _read_json(folder / "run.json")
    samples = sorted((folder / "eval").glob("*/*.jsonl"))
    if not (curves or evaluations or run or samples):
        raise UserError(f"{folder} is no run's folder: it has no metrics, no eval and no run.json")
    first = {name: curves.pop(name) for name in MAIN_CURVES if name in curves}
    router = {name: curves.pop(name) for name in ROUTER_CURVES if name in curves}
    sections = (
        _summary(first, run),
        _section("Training", _figures(first) + _folded("Everything else that was logged", _figures(curves))),
        _section("Experts", _figures(router) + _heatmaps(_histories(folder / "metrics" / "metrics.jsonl"))),
        _section("Evaluation", _metric_table(evaluations) + _figures(evaluations)),
        _section("Predictions", "".join(_sample_table(path) for path in _latest_of_each_task(samples))),
        _section("Config", _file_text(folder / "config.gin")),
        _section("Versions", _versions(run)),
    )
    page = PAGE.substitute(title=escape(folder.name), body="\n".join(sections))
    path = folder / "report.html"
    replace_text(path, page)
    return path


def _curves(path: Path) -> dict[str, Points]:
    """Every scalar of a metrics file by name; the last value wins where a step was reported twice."""
    curves: dict[str, dict[int, float | None]] = {}
    for step, scalars in read_jsonl(path) if path.exists() else ():
        for name, value in scalars.items():
            curves.setdefault(name, {})[step] = value
    return {name: sorted(values.items(), key=lambda point: point[0]) for name, values in curves.items()}


def _histories(path: Path) -> dict[str, History]:
    """Every vector of a metrics file by name; layers in order of their numbers."""
    histories: dict[str, History] = {}
    for row in read_rows(path) if path.exists() else ():
        for name, values in row.vectors.items():
            if name not in histories:
                columns = min(POINTS_PER_CURVE, CELLS_PER_HEATMAP // len(values) // 2 * 2)
                histories[name] = History(len(values), columns)
            histories[name].add(row.step, values)
    return dict(sorted(histories.items(), key=lambda item: [part.zfill(9) for part in re.split(r"(\d+)", item[0])]))


def _read_json(path: Path) -> dict[str, object]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _latest_of_each_task(paths: Iterable[Path]) -> list[Path]:
    by_step = sorted((path for path in paths if path.stem.isdigit()), key=lambda path: int(path.stem))
    return sorted({path.parent.name: path for path in by_step}.values())


def _summary(curves: dict[str, Points], run: dict[str, object]) -> str:
    """The run in a few large figures."""
    facts: dict[str, str] = {}
    if "loss" in curves:
        facts["steps"] = f"{curves['loss'][-1][0]:,}"
        facts["final loss"] = _number(curves["loss"][-1][1])
    speeds = [value for _, value in curves.get("tokens_per_second", ()) if value is not None]
    if speeds:
        facts["tokens/s (median)"] = _number(median(speeds))
    if isinstance(parameters := run.get("parameters"), int):
        facts["parameters"] = f"{parameters:,}"
    if isinstance(devices := run.get("devices"), dict):
        facts["devices"] = f"{devices['count']} {devices['kind']}"
    tiles = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f"<dl>{''.join(tiles)}</dl>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if content else ""


def _file_text(path: Path) -> str:
    return f"<pre>{escape(path.read_text(encoding='utf-8'))}</pre>" if path.exists() else ""


def _figures(curves: dict[str, Points]) -> str:
    """The curves that have a line to show, side by side."""
    figures = []
    for name, points in curves.items():
        finite = [(step, value) for step, value in points if value is not None]
        if len(finite) < 2:
            continue
        gaps = f" (not finite: {len(points) - len(finite)})" if len(finite) < len(points) else ""
        label = escape(name.removeprefix("eval/"))
        caption = f"<span>{label}{gaps}</span><b>{_number(finite[-1][1])}</b>"
        figures.append(f"<figure><figcaption>{caption}</figcaption>{_curve_svg(label, finite)}</figure>")
    return f'<div class="figures">{"".join(figures)}</div>' if figures else ""


def _curve_svg(label: str, points: Sequence[tuple[int, float]]) -> str:
    """A line over steps, with a spot to point at on each of its points."""
    width, height, left, right, top, bottom = 480, 210, 52, 20, 12, 26
    values = [value for _, value in points]
    x_low, x_high = float(points[0][0]), float(points[-1][0])
    y_ticks = _ticks(min(values), max(values), 4)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def x(step: float) -> str:
        return f"{left + (width - left - right) * (step - x_low) / (x_high - x_low):.1f}"

    def y(value: float) -> float:
        return round(height - bottom - (height - top - bottom) * (value - y_low) / (y_high - y_low), 1)

    grid = [
        f'<path d="M{left} {y(tick)}H{width - right}"/><text x="{left - 8}" y="{y(tick) + 4}">{_number(tick)}</text>'
        for tick in y_ticks
    ]
    grid += [
        f'<text class="x" x="{x(tick)}" y="{height - 8}">{_number(tick)}</text>'
        for tick in _ticks(x_low, x_high, 6)
        if x_low <= tick <= x_high
    ]
    shown = [(float(step), value) for step, value in _thinned(points)]
    line = "L".join(f"{x(step)} {y(value)}" for step, value in shown)
    spots = [
        f'<circle cx="{x(step)}" cy="{y(value)}" r="5"><title>step {step:,.0f}: {_number(value)}</title></circle>'
        for step, value in shown
    ]
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(grid)}'
        f'<path class="line" d="M{line}"/>{"".join(spots)}</svg>'
    )


def _heatmaps(histories: Mapping[str, History]) -> str:
    """The vectors that have more than one step to show, side by side under the scale of their colours."""
    figures = []
    for name, history in histories.items():
        if history.first_step == history.last_step:
            continue
        label = escape(name.removeprefix("router/").removesuffix("/load"))
        means = history.means()
        last = ratios_to_mean(means[:, -1:])
        finite = [float(ratio) for ratio in last[:, 0] if math.isfinite(ratio)]
        span = f"last {_number(min(finite))}x to {_number(max(finite))}x" if finite else "not finite"
        caption = f"<span>{label}</span><b>{span}</b>"
        figures.append(f"<figure><figcaption>{caption}</figcaption>{_heatmap_svg(label, history)}</figure>")
    return f'{HEATMAP_SCALE}<div class="figures">{"".join(figures)}</div>' if figures else ""


def _heatmap_svg(label: str, history: History) -> str:
    """Steps from left to right, as in a curve; a row per expert that tells its share when pointed at."""
    means = history.means()
    experts, columns = means.shape
    width, left, right, top, bottom = 480, 52, 20, 12, 40
    plot_width, plot_height = width - left - right, min(max(160, 3 * experts), 320)
    row, baseline = plot_height / experts, top + plot_height
    end = history.first_step + columns * history.stretch
    texts = [
        f'<text x="{left - 8}" y="{top + (tick + 0.5) * row + 4:.1f}">{tick:.0f}</text>'
        for tick in _ticks(0.0, float(experts - 1), 4)
        if tick < experts and tick.is_integer()
    ]
    texts += [
        f'<text class="x" x="{left + plot_width * (tick - history.first_step) / (end - history.first_step):.1f}" '
        f'y="{baseline + 18}">{_number(tick)}</text>'
        for tick in _ticks(history.first_step, history.last_step, 6)
        if history.first_step <= tick <= history.last_step
    ]
    texts.append(f'<text class="x" x="{left + plot_width / 2}" y="{baseline + 34}">step</text>')
    texts.append(f'<text class="x" transform="translate(14 {top + plot_height / 2}) rotate(-90)">expert</text>')
    ratios = ratios_to_mean(means)
    tips = [
        f'<rect x="{left}" y="{top + expert * row:.2f}" width="{plot_width}" height="{row:.2f}"><title>'
        f"expert {expert}: {_ratio(ratios[expert, 0])} at first, {_ratio(ratios[expert, -1])} at last "
        f"({_share(means[expert, -1])})"
        "</title></rect>"
        for expert in range(experts if experts <= plot_height else 0)
    ]
    return (
        f'<svg viewBox="0 0 {width} {baseline + bottom}" role="img" aria-label="{label}: load of each expert">'
        f"{_image(levels(ratios), left, top, plot_width, plot_height)}{''.join(texts + tips)}</svg>"
    )


def _image(cells: np.ndarray, x: int, y: int, width: int, height: int) -> str:
    """Cells as a picture in an SVG, stretched to fill a rectangle."""
    data = b64encode(encode_png(cells)).decode()
    look = "pixelated" if len(cells) <= height else "auto"  # more rows than the page has are blended
    place = f'x="{x}" y="{y}" width="{width}" height="{height}" preserveAspectRatio="none" image-rendering="{look}"'
    return f'<image {place} href="data:image/png;base64,{data}"/>'


def _ratio(value: float) -> str:
    return f"{value:.2f}x" if math.isfinite(value) else "not finite"


def _share(value: float) -> str:
    return f"{value:.2%} of the tokens" if math.isfinite(value) else "not finite"


def _heatmap_scale() -> str:
    """What the colours of heatmaps mean."""
    width, left, top, height = 480, 40, 24, 14
    marks = ("0", "½", "1x", "2x", "≥ 4x")
    meanings = {0: "no tokens", 2: "even share", 4: "overloaded"}
    texts = [
        f'<text class="x" x="{left + (width - 2 * left) * i / 4}" y="{top + height + 16}">{mark}</text>'
        for i, mark in enumerate(marks)
    ]
    texts += [
        f'<text class="x" x="{left + (width - 2 * left) * i / 4}" y="{top - 8}">{meaning}</text>'
        for i, meaning in meanings.items()
    ]
    cells = _image(np.arange(LEVELS)[None], left, top, width - 2 * left, height)
    return (
        '<figure class="scale"><figcaption>Load of each expert: its share of the tokens over the mean share of all '
        f'experts at that step</figcaption><svg viewBox="0 0 {width} 60" role="img" aria-label="colour scale">'
        f"{cells}{''.join(texts)}</svg></figure>"
    )


HEATMAP_SCALE = _heatmap_scale()


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """About `POINTS_PER_CURVE` points at most: the lowest and highest of every stretch, so that no spike is lost."""
    if len(points) <= POINTS_PER_CURVE:
        return list(points)
    stretch = 2 * math.ceil(len(points) / POINTS_PER_CURVE)
    kept = {points[0], points[-1]}
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept |= {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
    return sorted(kept)


def _ticks(low: float | int, high: float | int, count: int) -> list[float]:
    """At most `count + 2` round numbers, evenly spaced, the first <= low and the last >= high."""
    if low == high:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(m * power for m in (1, 2, 5, 10) if (high - low) / (m * power) <= count)
    return [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _number(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _metric_table(evaluations: dict[str, Points]) -> str:
    """The last value of every metric of every task."""
    rows = []
    for name, points in evaluations.items():
        task, metric = name.removeprefix("eval/").split("/", 1)
        step, value = points[-1]
        rows.append((task, metric, _number(value), f"{step:,}"))
    return _table(("task", "metric", "value", "at step"), rows, numeric=2) if rows else ""


def _sample_table(path: Path) -> str:
    """The first predictions of one task at one step."""
    with path.open(encoding="utf-8") as lines:
        samples = [json.loads(line) for line in islice(lines, SAMPLES_PER_TASK)]
    columns = ("inputs", "targets", "predictions", "score")
    rows = [tuple(_text(sample.get(name)) for name in columns) for sample in samples]
    return f"<h3>{escape(path.parent.name)}, step {int(path.stem):,}</h3>{_table(columns, rows, numeric=3)}"


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return _number(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _versions(run: dict[str, object]) -> str:
    facts = {name: value for name, value in run.items() if name not in ("versions", "sessions")}
    versions = run.get("versions")
    rows = [(name.replace("_", " "), _text(value)) for name, value in facts.items()]
    if isinstance(sessions := run.get("sessions"), list):
        rows.append(("sessions", str(len(sessions))))
    if isinstance(versions, dict):
        rows.extend((name, str(version)) for name, version in versions.items())
    return _table(("", ""), rows) if rows else ""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: int | None = None) -> str:
    """A table of plain text; columns from `numeric` on are set flush right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        right = len(row) if numeric is None else numeric
        return "".join(
            f"<{tag}{' class=number' if i >= right else ''} dir=auto>{escape(cell)}</{tag}>"
            for i, cell in enumerate(row)
        )

    head = f"<thead><tr>{cells('th', columns)}</tr></thead>" if any(columns) else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --text: #1c2430; --faint: #667085; --rule: #e4e7ec; --line: #2563c9; }
@media (prefers-color-scheme: dark) {
  :root { --page: #12151a; --card: #1a1f27; --text: #e6e9ee; --faint: #97a1b0; --rule: #2c343f; --line: #6ea8ff; }
}
body { margin: 0 auto; max-width: 1080px; padding: 32px 24px 64px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 26px; margin: 0 0 16px; }
h2 { font-size: 19px; margin: 40px 0 12px; }
h3 { font-size: 15px; margin: 20px 0 8px; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 0; }
dl div, figure, .scroll, pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
dl div { padding: 12px 16px; }
dt, figcaption, th { color: var(--faint); font-size: 13px; font-weight: 500; }
dd { margin: 0; font-size: 21px; font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)); gap: 12px;
  margin: 12px 0; }
figure { margin: 0; padding: 12px 14px 6px; }
figcaption { display: flex; justify-content: space-between; }
figcaption b { color: var(--text); font-weight: 600; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; }
svg path { fill: none; stroke: var(--rule); }
svg .line { stroke: var(--line); stroke-width: 1.5; stroke-linejoin: round; }
svg text { fill: var(--faint); font-size: 11px; text-anchor: end; }
svg .x { text-anchor: middle; }
rect { fill: transparent; }
rect:hover { stroke: var(--text); }
.scale { margin: 24px 0 12px; }
.scale svg { max-width: 480px; }
circle { fill: transparent; }
circle:hover { fill: var(--line); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 8px 14px; text-align: start; vertical-align: top; overflow-wrap: break-word;
  border-top: 1px solid var(--rule); }
thead th, tbody:first-child tr:first-child td { border-top: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { padding: 14px 16px; margin: 0; max-height: 480px; overflow: auto;
  font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; }

summary { cursor: pointer; margin: 12px 0; color: var(--faint); }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")
