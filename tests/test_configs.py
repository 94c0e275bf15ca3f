"""Every shipped gin file: builds abstractly, and has the size that its paper or release says."""

from pathlib import Path

import jax
import pytest

from t5x_like import gin_config
from t5x_like.models.encoder_decoder import EncoderDecoderModel
from t5x_like.training.train_state import count_parameters

CONFIGS = Path(__file__).parent.parent / "configs"
MODELS = sorted(path.stem for path in (CONFIGS / "models").glob("*.gin"))
EXPERIMENTS = sorted(path.name for path in (CONFIGS / "experiments").glob("*.gin"))

# Millions, to the digits published: T5 1.0 and 1.1 as the released checkpoints count, mT5 and ByT5 as in table 1 of the
# ByT5 paper (Xue et al. 2022).
RELEASED = {
    "t5_1_0_small": 60.5, "t5_1_0_base": 223, "t5_1_0_large": 738, "t5_1_0_3b": 2850, "t5_1_0_11b": 11300,
    "t5_1_1_small": 77.0, "t5_1_1_base": 248, "t5_1_1_large": 783, "t5_1_1_xl": 2850, "t5_1_1_xxl": 11100,
    "mt5_small": 300, "mt5_base": 582, "mt5_large": 1230, "mt5_xl": 3740, "mt5_xxl": 12900,
    "byt5_small": 300, "byt5_base": 582, "byt5_large": 1230, "byt5_xl": 3740, "byt5_xxl": 12900,
}  # fmt: skip

# Likewise: Switch-Base as the released checkpoints count (the paper rounds 128 experts to 7 billion), the others as in
# table 9 of Fedus et al. 2021 and table 1 of Zoph et al. 2022. Switch-XXL has the 128 experts of its release.
SPARSE = {
    "switch_base_8": 619.3, "switch_base": 7415, "switch_base_128": 7415, "switch_large": 26_000, "switch_xxl": 395_000,
    "switch_c": 1_571_000, "st_moe_32b": 269_000,
}  # fmt: skip
UNPUBLISHED = {
    "switch_base_16", "switch_base_32", "switch_base_64", "switch_base_256", "switch_small", "st_moe_base"
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_builds_abstractly_at_its_size(name: str) -> None:
    config = gin_config.load(EncoderDecoderModel, [f"models/{name}.gin"], ["DROPOUT_RATE=0.1"])
    model = gin_config.run(config)
    batch = model.converter.convert([[]], {"inputs": 8, "targets": 8}, packed=False)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))
    logits = jax.eval_shape(lambda params: model.logits(params, batch), params)
    assert logits.dtype == "float32"
    axes = jax.tree.leaves(model.logical_axes(batch), is_leaf=lambda x: isinstance(x, tuple))
    assert [len(names) for names in axes] == [len(leaf.shape) for leaf in jax.tree.leaves(params)]
    if name in RELEASED:
        assert count_parameters(params) / 1e6 == pytest.approx(RELEASED[name], rel=4e-3)
    elif name in SPARSE:
        assert count_parameters(params) / 1e6 == pytest.approx(SPARSE[name], rel=2e-2)
    else:
        assert name.endswith("_tiny") or name.startswith("umt5_") or name in UNPUBLISHED


@pytest.mark.parametrize("experts", [16, 32, 64, 256])
def test_switch_base_grows_by_its_experts_alone(experts: int) -> None:
    """Twelve sparse layers of experts with 2 x 768 x 3,072 weights, and a router column for each."""
    sizes = []
    for count in (8, experts):
        config = gin_config.load(EncoderDecoderModel, [f"models/switch_base_{count}.gin"], ["DROPOUT_RATE=0.1"])
        model = gin_config.run(config)
        batch = model.converter.convert([[]], {"inputs": 8, "targets": 8}, packed=False)
        sizes.append(count_parameters(jax.eval_shape(lambda m=model, b=batch: m.init(jax.random.key(0), b))))
    assert sizes[1] - sizes[0] == (experts - 8) * 12 * (2 * 768 * 3072 + 768)


def test_every_family_has_every_size() -> None:
    sizes = {family: ["small", "base", "large", "xl", "xxl"] for family in ("t5_1_1", "mt5", "byt5", "umt5")}
    sizes["t5_1_0"] = ["small", "base", "large", "3b", "11b"]
    sizes["switch"] = ["small", "base", *(f"base_{2**n}" for n in range(3, 9)), "large", "xxl", "c"]
    sizes["st_moe"] = ["base", "32b"]
    expected = {f"{family}_{size}" for family, others in sizes.items() for size in ["tiny", *others]}
    assert set(MODELS) == expected


@pytest.mark.parametrize("run", ["pretrain", "finetune", "evaluate", "infer"])
@pytest.mark.parametrize(
    "model", ["t5_1_0_tiny", "t5_1_1_xxl", "mt5_tiny", "byt5_tiny", "umt5_tiny", "switch_c", "st_moe_tiny"]
)
def test_a_model_file_and_a_run_file_are_a_complete_experiment(model: str, run: str) -> None:
    """Every binding is used, every macro defined; the largest is planned whole, on eight devices."""
    verb = {"pretrain": "train", "finetune": "train"}.get(run, run)
    files = [f"configs/models/{model}.gin", f"configs/runs/{run}.gin"]
    config = gin_config.load(f"t5x_like.commands.{verb}.{verb}", files, ["MODEL_DIR=runs/x"])
    assert "MODEL_DIR = 'runs/x'" in config.operative_config()
    if verb == "train" and model in ("t5_1_1_xxl", "switch_c"):
        gin_config.run(config, dry_run=True)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_short_and_its_header_says_what_matters(name: str, capsys: pytest.CaptureFixture) -> None:
    text = (CONFIGS / "experiments" / name).read_text()
    header = text.partition("from __gin__")[0]
    for word in ("t5x_like train --gin_file=", "minutes", "Measured"):
        assert word in header, word
    assert len([line for line in text.splitlines() if " = " in line and not line.startswith("#")]) <= 25
    config = gin_config.load("t5x_like.commands.train.train", [f"experiments/{name}"], ["MODEL_DIR=runs/x"])
    gin_config.run(config, dry_run=True)
    assert "GiB per device" in capsys.readouterr().out
