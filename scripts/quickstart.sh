#!/usr/bin/env bash
# The main job on real text, from a bare machine: sets up its own virtual environment, trains a small T5, evaluates it and
# shows what it predicts. Arguments go to the trainer: scripts/quickstart.sh --gin.TRAIN_STEPS=200
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_environment.sh

make_environment "${T5X_LIKE_VENV:-.venv}" ""
t5x_like train --gin_file=configs/experiments/quickstart.gin --gin.MODEL_DIR=runs/quickstart "$@"

cat <<'END'

Next:
  source .venv/bin/activate
  t5x_like evaluate --gin_file=runs/quickstart/config.gin      the test splits
  t5x_like train --help                                        your own experiment
Open runs/quickstart/report.html for the curves, the samples and the config.
END
