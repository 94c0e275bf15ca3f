"""How cost grows with the work: on this machine, and from chip to chip of TPUs that need not be there."""

import dataclasses
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.peers import Line
from t5x_like.errors import RunFailed, UserError
from t5x_like.planning.choice import Choice
from t5x_like.planning.plan import Compiler, Plan, measure
from t5x_like.recipe import Recipe
from t5x_like.sharding import MESH_AXES


@dataclasses.dataclass(frozen=True)
class Growth:
    """A job in several sizes, of which one thing differs.

    Attributes:
      along: what differs.
      files: of `configs`.
      sizes: of it.
      bindings: those of a size.
    """

    along: str
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    bindings: Callable[[int], tuple[str, ...]]

    def recipe(self, size: int, dtype: str) -> Recipe:
        """The job of a size; layers are scanned, so that all sizes compile alike."""
        return Recipe(self.files, (f"DTYPE={dtype}", "SCAN_LAYERS=True", "REMAT=None", *self.bindings(size)))


T5_SMALL = ("models/t5_1_1_small.gin", "runs/pretrain.gin")
T5_BASE = ("models/t5_1_1_base.gin", "runs/pretrain.gin")
SWITCH_TINY = ("models/switch_tiny.gin", "runs/pretrain.gin")
SWITCH_BASE = ("models/switch_base_64.gin", "runs/pretrain.gin")


def _lengths(inputs: int) -> str:
    return f"TASK_FEATURE_LENGTHS={{'inputs': {inputs}, 'targets': {inputs // 4}}}"


LENGTH = Growth("length", T5_SMALL, (128, 256, 512, 1024, 2048), lambda n: (_lengths(n), "BATCH_SIZE=4"))
BATCH = Growth("batch", T5_SMALL, (1, 2, 4, 8, 16), lambda n: (_lengths(512), f"BATCH_SIZE={n}"))
LAYERS = Growth(
    "layers",
    T5_SMALL,
    (2, 4, 8, 16, 32),
    lambda n: (_lengths(512), "BATCH_SIZE=4", f"NUM_ENCODER_LAYERS={n}", f"NUM_DECODER_LAYERS={n}"),
)
EXPERTS = Growth(
    "experts",
    SWITCH_TINY,
    (1, 4, 16, 64, 128),
    lambda n: (_lengths(512), "BATCH_SIZE=8", "EMBED_DIM=256", "MLP_DIM=1024", f"NUM_EXPERTS={n}"),
)


def here(growth: Growth, dtype: str, steps: int) -> Line:
    """Tokens per second and memory of training steps on the devices that are here."""
    points = []
    compiler = Compiler(on_cpu=False)
    try:
        for size in growth.sizes:
            plan = _compiled(compiler(measure, growth.recipe(size, dtype), None, Choice(), steps))
            assert plan.train is not None and plan.measured_seconds is not None
            points.append(
                {
                    growth.along: size,
                    "tokens_per_second": round(plan.tokens / plan.measured_seconds, 1),
                    "gflop_per_token": round(plan.model_flops / plan.tokens / 1e9, 4),
                    "share_of_peak": round(plan.model_flops / plan.measured_seconds / plan.peak_flops, 3),
                    "memory_gib": round(plan.train.peak_memory_gib, 3),
                    "state_gib": round(_state_gib(plan), 3),
                }
            )
    finally:
        compiler.close()
    return {"along": growth.along, "points": points}


@dataclasses.dataclass(frozen=True)
class Way:
    """How a job is spread over more and more chips: as replicas of a few.

    Attributes:
      name: for readers.
      growth: the job; its size is the number of chips.
      replica: mesh axes of one.
    """

    name: str
    growth: Growth
    replica: Mapping[str, int]

    def choice(self, chips: int) -> Choice:
        """On so many chips."""
        sizes = {**self.replica, "replica": chips // math.prod(self.replica.values())}
        return Choice(tuple(sizes.get(axis, 1) for axis in MESH_AXES))


TOPOLOGIES = {8: "v5p:2x2x2", 32: "v5p:2x4x4", 128: "v5p:4x4x8", 512: "v5p:8x8x8", 2048: "v5p:8x16x16"}

FLAT = 1.1
"""What theory says is flat may differ by so much."""

T5_CHIPS = Growth("chips", T5_BASE, tuple(TOPOLOGIES), lambda n: (f"BATCH_SIZE={8 * n}",))
SWITCH_CHIPS = dataclasses.replace(T5_CHIPS, files=SWITCH_BASE)
WAYS = (
    Way("T5 base, replicas of 1 chip", T5_CHIPS, {}),
    Way("T5 base, replicas of 4 chips: FSDP", T5_CHIPS, {"data": 4}),
    Way("T5 base, replicas of 4 chips: FSDP x model 2", T5_CHIPS, {"data": 2, "model": 2}),
    Way("Switch base 64, replicas of 4 chips: experts, FSDP", SWITCH_CHIPS, {"expert": 4}),
)


def chips(dtype: str, steps: int, ways: Sequence[Way] = WAYS, topologies: Mapping[int, str] = TOPOLOGIES) -> Line:
    """FLOPs, memory and traffic of each chip when chips and batch grow together, from programs compiled for TPUs.

    Theory: FLOPs and memory stay. What a chip sends along a mesh axis of size n is (n - 1) / n of what it would send
    along one without end: `endless_gib`, which stays.

    Raises:
      RunFailed: a step does not compile.
    """
    del steps  # nothing runs
    lines = []
    compiler = Compiler(on_cpu=True)
    try:
        for way in ways:
            found = (
                compiler(measure, way.growth.recipe(n, dtype), name, way.choice(n)) for n, name in topologies.items()
            )
            points = [on_chips(_compiled(plan)) for plan in found]
            spread = {
                name: _spread([point[name] for point in points]) for name in ("gflop", "memory_gib", "endless_gib")
            }
            lines.append({"way": way.name, "points": points, "most_over_least": spread})
    finally:
        compiler.close()
    return {"along": "chips", "topologies": [*topologies.values()], "ways": lines}


def on_chips(plan: Plan) -> dict[str, float]:
    """What each chip takes, as `chips` has it."""
    train = plan.train
    assert train is not None
    endless = 0.0
    for each in train.traffic:
        size = math.prod(plan.mesh[axis] for axis in each.axes)
        endless += each.gib * size / (size - 1)
    return {
        "chips": plan.devices,
        "gflop": round(train.flops_per_chip / 1e9, 1),
        "memory_gib": round(train.peak_memory_gib, 3),
        "state_gib": round(_state_gib(plan), 3),
        "sent_gib": round(sum(each.gib for each in train.traffic), 3),
        "endless_gib": round(endless, 3),
        "predicted_seconds": round(train.seconds, 4),
    }


def _state_gib(plan: Plan) -> float:
    return plan.parameters_gib + plan.optimizer_gib


def _compiled(plan: Plan) -> Plan:
    if plan.train is None:
        raise RunFailed(f"{plan.topology}, {plan.choice}: {plan.compile_error}")
    return plan


def _spread(values: Sequence[float]) -> float:
    return round(max(values) / min(values), 3) if min(values) else math.inf


def table(lines: Sequence[Line]) -> str:
    """All points in Markdown, a table for each line or way, and for ways whether they are as flat as theory says."""
    flat = [f"{name}, most over least: {_flatness(spread)}" for name, spread in _spreads(lines)]
    return "\n\n".join([*(_table(name, points) for name, points in _series(lines)), *flat])


def is_flat(lines: Sequence[Line]) -> bool:
    """Whether all ways are as flat as theory says."""
    return all(max(spread.values()) <= FLAT for _, spread in _spreads(lines))


def _spreads(lines: Sequence[Line]) -> Iterator[tuple[str, dict[str, float]]]:
    for line in lines:
        ways = line.get("ways", [])
        assert isinstance(ways, list)
        yield from ((way["way"], way["most_over_least"]) for way in ways)


def _table(name: str, points: Sequence[Mapping[str, float]]) -> str:
    rows = [points[0].keys(), ["---"] * len(points[0]), *([f"{n:,}" for n in point.values()] for point in points)]
    return "\n".join([f"{name}:", "", *("| " + " | ".join(row) + " |" for row in rows)])


def _flatness(spread: Mapping[str, float]) -> str:
    figures = ", ".join(f"{name} {value:.3f}" for name, value in spread.items())
    return f"{figures}: {'flat' if max(spread.values()) <= FLAT else 'NOT FLAT'}"


def _series(lines: Iterable[Line]) -> Iterator[tuple[str, list[dict[str, float]]]]:
    for line in lines:
        ways = line.get("ways") or [{"way": line["along"], "points": line["points"]}]
        assert isinstance(ways, list)
        yield from ((way["way"], way["points"]) for way in ways)


class _Panel(NamedTuple):
    title: str
    sizes: list[float]
    curves: dict[str, list[float]]


def check_plot(path: Path) -> None:
    """Raises `UserError` where `draw` would fail: before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install 't5x_like[notebooks]'")
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"--plot={path}: name a .svg, .png or .pdf file")
    if not path.parent.is_dir():
        raise UserError(f"--plot={path}: there is no folder {path.parent}; make it first")


def draw(lines: Sequence[Line], path: Path) -> None:
    """All points as curves: what grows here, column by column, above what chips do."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = [[*row] for row in (_speeds(lines), _memories(lines), _chips(lines))]
    figure = Figure(figsize=(15, 9), layout="constrained")
    for row, axes_of_row in zip(rows, figure.subplots(3, max(map(len, rows)), squeeze=False), strict=True):
        for panel, axes in itertools.zip_longest(row, axes_of_row):
            if panel is None:
                axes.set_axis_off()
                continue
            for (name, values), style in zip(panel.curves.items(), ("o-", "s--", "^-", "v:"), strict=False):
                axes.plot(panel.sizes, values, style, label=name, markersize=4)
            axes.set_xscale("log", base=2)
            axes.set_xticks(panel.sizes, [f"{size:,}" for size in panel.sizes])
            axes.set_ylim(0, 1.08 * max(map(max, panel.curves.values())))
            axes.set_title(panel.title, fontsize="medium")
            axes.legend(fontsize="x-small")
    with rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(path)


def _columns(points: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {name: [point[name] for point in points] for name in points[0]}


def _speeds(lines: Sequence[Line]) -> Iterator[_Panel]:
    for along, points in _series(line for line in lines if "points" in line):
        column = _columns(points)
        work = column["gflop_per_token"]
        best = max(speed * each for speed, each in zip(column["tokens_per_second"], work, strict=True))
        curves = {"measured": column["tokens_per_second"], "at the best of these FLOP/s": [best / w for w in work]}
        yield _Panel(f"tokens/s here, by {along}", column[along], curves)


def _memories(lines: Sequence[Line]) -> Iterator[_Panel]:
    for along, points in _series(line for line in lines if "points" in line):
        column = _columns(points)
        curves = {"peak of a step": column["memory_gib"], "parameters and optimiser": column["state_gib"]}
        yield _Panel(f"GiB here, by {along}", column[along], curves)


def _chips(lines: Sequence[Line]) -> Iterator[_Panel]:
    ways = {way: _columns(points) for way, points in _series(line for line in lines if "ways" in line)}
    titles = {"gflop": "GFLOP of a chip", "memory_gib": "GiB in a chip", "sent_gib": "GiB that a chip sends"}
    for name, title in titles.items() if ways else ():
        sizes = next(iter(ways.values()))["chips"]
        yield _Panel(f"{title}, by chips", sizes, {way: column[name] for way, column in ways.items()})
