#!/usr/bin/env python3
"""What the Switch paper claims at scale (Fedus et al. 2021), at laptop size: trains the variants, prints the table.

`scripts/switch_experiments.py` trains what is missing under `runs/switch` (an interrupted run goes on where it stopped)
and prints Markdown; `--no_train` only reads what is there.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Variant(NamedTuple):
    """One row of a table: an experiment with some of its settings changed, and the seeds that it is run with."""

    experiment: str
    settings: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)


VARIANTS = {
    "dense": Variant("switch_dense_baseline"),
    "8 experts": Variant("switch_vs_dense"),
    "32 experts": Variant("switch_vs_dense", ("NUM_EXPERTS=32",)),
    "capacity 1.0": Variant("switch_vs_dense", ("TRAIN_EXPERT_CAPACITY_FACTOR=1.0",), (0,)),
    "capacity 2.0": Variant("switch_vs_dense", ("TRAIN_EXPERT_CAPACITY_FACTOR=2.0",), (0,)),
    "init scale 0.1": Variant("switch_vs_dense", ("SCALE=0.1",)),
    "no balance loss": Variant("switch_vs_dense", ("AUX_LOSS_FACTOR=0.0",), (0,)),
}
LAST_ROWS = 10
"""Loads, drops and speed are averaged over so many of the last logged steps."""


class Result(NamedTuple):
    """What one run came to.

    Attributes:
      losses: (step, held-out loss in nats per token).
      dropped: share of tokens that no expert took; 0 for a dense run.
      load_entropy: of the experts' load, as a share of the largest possible; mean over layers.
      seconds: median of a step.
    """

    losses: list[tuple[int, float]]
    dropped: float
    load_entropy: float
    seconds: float


def folder(runs: Path, name: str, seed: int) -> Path:
    """Where a run is kept."""
    return runs / f"{name.replace(' ', '_')}-seed{seed}"


def train(runs: Path, name: str, variant: Variant, seed: int) -> None:
    """Trains one run, or goes on with it."""
    settings = (f"MODEL_DIR={folder(runs, name, seed)}", f"SEED={seed}", *variant.settings)
    command = [sys.executable, "-m", "t5x_like", "train", f"--gin_file=experiments/{variant.experiment}.gin"]
    subprocess.run([*command, *(f"--gin.{setting}" for setting in settings)], check=True)


def read(path: Path) -> Result | None:
    """The result of a run that has ended; None before."""
    if not (path / "report.html").exists():
        return None
    evaluations, steps = (
        [json.loads(line) for line in (path / "metrics" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("evaluations", "metrics")
    )
    losses = [(row["step"], math.log(row["eval/austen_span_corruption/perplexity"])) for row in evaluations]
    last = steps[-LAST_ROWS:]
    entropies = [load_entropy(row[name]) for row in last for name in row if name.endswith("/load")]
    return Result(
        losses,
        statistics.mean(row.get("router/dropped", 0.0) for row in last),
        statistics.mean(entropies) if entropies else math.nan,
        statistics.median(row["seconds_per_step"] for row in last),
    )


def load_entropy(load: Sequence[float]) -> float:
    """1 where all experts are as busy, 0 where one does everything."""
    shares = [share / sum(load) for share in load if share > 0]
    return -sum(share * math.log(share) for share in shares) / math.log(len(load))


def steps_to_reach(losses: Sequence[tuple[int, float]], target: float) -> float | None:
    """The step at which a curve first falls to `target`, interpolated between evaluations; None if it never does."""
    for (step, loss), (later, lower) in itertools.pairwise(losses):
        if lower <= target:
            return later if loss <= lower else step + (later - step) * (loss - target) / (loss - lower)
    return None


def table(results: Mapping[str, Mapping[int, Result]]) -> str:
    """One Markdown row per variant: means over seeds, with the standard deviation between them.

    What a variant gains is told seed by seed: both runs see the same data in the same order. The speed-up is the steps
    that the dense run took over the steps after which the variant had reached its final loss.
    """
    lines = [
        "| variant | seeds | held-out loss | spread | below dense | speed-up | dropped | load entropy | s/step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    dense = results.get("dense", {})
    for name, by_seed in results.items():
        runs = list(by_seed.values())
        final = [run.losses[-1][1] for run in runs]
        spread = f"{statistics.stdev(final):.3f}" if len(final) > 1 else "-"
        gains, speedups = [], []
        for seed, run in by_seed.items():
            if name != "dense" and seed in dense:
                last, target = dense[seed].losses[-1]
                reached = steps_to_reach(run.losses, target)
                gains.append(f"{target - run.losses[-1][1]:.3f}")
                speedups.append("never" if reached is None else f"{last / reached:.2f}")
        columns = [name, str(len(runs)), f"{statistics.mean(final):.3f}", spread]
        columns += [", ".join(gains) or "-", ", ".join(speedups) or "-"]
        if math.isnan(runs[0].load_entropy):
            columns += ["-", "-"]
        else:
            columns.append(f"{statistics.mean(run.dropped for run in runs):.1%}")
            columns.append(f"{statistics.mean(run.load_entropy for run in runs):.3f}")
        lines.append(f"| {' | '.join([*columns, f'{statistics.median(run.seconds for run in runs):.3f}'])} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is missing and prints the table of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/switch"), help="folder of the runs (runs/switch)")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="these variants")
    parser.add_argument("--no_train", action="store_true", help="only read what is there")
    arguments = parser.parse_args(argv)
    results: dict[str, dict[int, Result]] = {}
    for name in arguments.only:
        for seed in VARIANTS[name].seeds:
            path = folder(arguments.runs, name, seed)
            if not arguments.no_train and read(path) is None:
                train(arguments.runs, name, VARIANTS[name], seed)
            result = read(path)
            if result is not None:
                results.setdefault(name, {})[seed] = result
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
