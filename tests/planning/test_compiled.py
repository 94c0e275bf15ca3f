"""What a compiled training step costs, against arithmetic by hand."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import SWITCH_CONFIG, TRAIN_CONFIG

from t5x_like.planning import hardware
from t5x_like.planning.choice import Choice
from t5x_like.planning.compiled import Job, cost
from t5x_like.recipe import Recipe

ROWS, INPUTS, TARGETS, EMBED, HEADS, MLP, VOCAB = 8, 48, 32, 16, 2 * 8, 32, 8192
REPEATS = 3
"""Of tests/tiny.py's configs, with three layers on either side, or three pairs of a dense and a sparse one."""


def attention(queries: int, keys: int) -> int:
    """Multiplications: four projections, logits, and values mixed."""
    return EMBED * HEADS * 2 * (queries + keys) + 2 * queries * keys * HEADS


def t5() -> int:
    """A gated MLP has three matrices; T5 1.1's output matrix is its own."""
    mlp = 3 * EMBED * MLP
    encoder = attention(INPUTS, INPUTS) + INPUTS * mlp
    decoder = attention(TARGETS, TARGETS) + attention(TARGETS, INPUTS) + TARGETS * mlp
    return REPEATS * (encoder + decoder) + TARGETS * EMBED * VOCAB


def switch() -> int:
    """Two matrices; four experts, each with room for 1.25 of its share of a sequence (Fedus et al. 2021, eq. 3)."""
    mlp, router = 2 * EMBED * MLP, 4 * EMBED

    def sparse(length: int) -> int:
        return 4 * math.ceil(1.25 * length / 4) * mlp + length * router

    encoder = 2 * attention(INPUTS, INPUTS) + INPUTS * mlp + sparse(INPUTS)
    decoder = 2 * (attention(TARGETS, TARGETS) + attention(TARGETS, INPUTS)) + TARGETS * mlp + sparse(TARGETS)
    return REPEATS * (encoder + decoder) + TARGETS * EMBED * VOCAB


@pytest.mark.parametrize(
    ("config", "layers", "multiplications"), [(TRAIN_CONFIG, "LAYERS", t5), (SWITCH_CONFIG, "BLOCKS", switch)]
)
def test_the_products_of_a_step_are_those_of_the_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, layers: str, multiplications: Callable[[], int]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "run.gin").write_text(config)
    sizes = [f"NUM_{side}_{layers}={REPEATS}" for side in ("ENCODER", "DECODER")]
    recipe = Recipe([str(tmp_path / "run.gin")], ["SCAN_LAYERS=True", *sizes])
    target = hardware.present()
    job = Job.of(recipe, target, Choice((1, 8, 1, 1), "none", 1))
    found = cost(job.train_step, target, job.partitioner)
    wanted = 3 * 2 * ROWS * multiplications()  # a product forward is two backward
    assert found.flops_per_chip * 8 == pytest.approx(wanted, rel=0.03)
    assert job.model_flops() == pytest.approx(wanted, rel=0.03)
    assert found.peak_memory_gib >= found.argument_gib + found.temporary_gib > found.argument_gib > 0
    assert found.fits
    assert found.on_chip_seconds >= max(found.compute_seconds, found.memory_seconds)
