#!/usr/bin/env bash
# The main job on real text, from a bare machine: sets up its own virtual environment, trains a small T5, evaluates it and
# shows what it predicts. Arguments go to the trainer: scripts/quickstart.sh --gin.TRAIN_STEPS=100
# The same command again goes on where it stopped; remove runs/quickstart to start anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_environment.sh

run=runs/quickstart
make_environment "${T5X_LIKE_VENV:-.venv}" ""
t5x_like train --gin_file=configs/experiments/quickstart.gin --gin.MODEL_DIR=$run "$@"

cat <<END

The run is in $run: report.html (curves, samples, config), metrics/, eval/ (predictions), checkpoints/, config.gin.

Next:
  source ${T5X_LIKE_VENV:-.venv}/bin/activate
  t5x_like evaluate --gin.MODEL_DIR=$run --gin.EVAL_EXAMPLES=None                       every validation example
  echo "supersense: oak: a tree of the genus Quercus" > inputs.txt
  t5x_like infer --gin.MODEL_DIR=$run --gin.infer.infer.source=inputs.txt               your own inputs
  t5x_like train --gin.MODEL_DIR=$run --gin.TRAIN_STEPS=2000                            train on from here
  t5x_like train --help                                                                 your own experiment
END
