"""A run's folder: what stands in it, and whether a command may go on in it."""

import re
from pathlib import Path

import jax

from t5x_like.errors import UserError

MAY_CHANGE = (
    r"train\.train\.(?!model$|dataset$|trainer$|restore$)\w+",  # where, when and how often; not what
    r"(.*/)?trainer\.Trainer\.(train_steps|log_period|max_skipped_updates)",
    r"(.*/)?manager\.CheckpointPolicy\.\w+",
    r"(.*/)?evaluation\.\w+\.\w+",
    r"eval/.*",
    r"(.*/)?sharding\.\w+\.\w+",
    r"(.*/)?(greedy|sampling|beam)\.\w+\.\w+",
)
"""Settings that may differ when a run goes on: the steps still to come are computed as they would have been."""


def check_config(model_dir: str | Path, config: str) -> None:
    """Refuses to go on in a folder whose run was configured otherwise, or where there can be no folder.

    Args:
      model_dir: the run's folder.
      config: this command's operative gin configuration.

    Raises:
      UserError: names every setting that differs, its old and its new value; or the address of a bucket.
    """
    if "://" in str(model_dir):
        raise UserError(
            f"MODEL_DIR={model_dir}: a run is written to a folder; mount the bucket (Cloud Storage FUSE, for instance) "
            "and name the folder where it appears"
        )
    path = Path(model_dir) / "config.gin"
    if not path.exists():
        return
    old, new = _settings(path.read_text()), _settings(config)
    changed = [
        f"{name}: {old.get(name, 'not set')} -> {new.get(name, 'not set')}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name) and not any(re.fullmatch(pattern, name) for pattern in MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"{path}: this run was configured otherwise; set these back, or choose another MODEL_DIR:\n  "
            + "\n  ".join(changed)
        )


def write_config(model_dir: str | Path, config: str) -> None:
    """Writes `config.gin`, runnable as it is."""
    path = Path(model_dir) / "config.gin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config)


def matmul_devices() -> int:
    """How many devices' peaks add up: virtual CPU devices share one processor."""
    return 1 if jax.default_backend() == "cpu" else jax.device_count()


def _settings(config: str) -> dict[str, str]:
    """`name -> value` of a gin text as gin prints it, with macros put in place and continued lines joined."""
    text = re.sub(r"\\\n\s*", "", config)
    lines = re.findall(r"^([\w./]+) =((?:.|\n(?=[ \t]))*)", text, re.MULTILINE)
    settings = {name: " ".join(value.split()) for name, value in lines}
    macros = {name: value for name, value in settings.items() if "." not in name}
    for _ in macros:  # macros may use macros
        settings = {
            name: re.sub(r"%(\w+)", lambda match: macros.get(match[1], match[0]), value)
            for name, value in settings.items()
        }
    return {name: value for name, value in settings.items() if name not in macros}
