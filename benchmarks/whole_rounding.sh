#!/usr/bin/env bash
# Stage 3W whole, at SD3-Medium's size: random weights with planted outliers, 512 px, 512 images x 4 steps. Half an hour on an H200.
#
#   benchmarks/whole_rounding.sh FOLDER [options of optimize_adaround.py, such as --max-memory 17GB]
#
# FOLDER takes 30 GB. The last line has seconds and peaks. Called again, 3W begins anew on the data that are there.
# IMAGES=512 and DEPTH=24 may be smaller (from DEPTH=4 on blocks are trained one by one), PYTHON=... is another interpreter.
set -euo pipefail
FOLDER=$(realpath -m "${1:?give a folder}"); shift
cd "$(dirname "$0")/.."
PY=${PYTHON:-.venv/bin/python}
export HF_HOME=$FOLDER/hub HF_HUB_OFFLINE=1
STAGE="$PY benchmarks/run_stage.py ${DEPTH:+--depth $DEPTH}"
RUN=$FOLDER/run
[ -d "$HF_HOME" ] || $PY benchmarks/random_model.py --hf-home "$HF_HOME" --outliers ${DEPTH:+--depth $DEPTH}
[ -f "$RUN/manifest.json" ] || $STAGE generate_calibration_data.py --calib-dir "$RUN" --model argmaxinc/mlx-stable-diffusion-3-medium \
  --no-t5 --num-images "${IMAGES:-512}" --num-steps 4 --batch-size 8 --no-images
[ -f "$RUN/adaround_cache/metadata.json" ] || $STAGE cache_adaround_data.py --calib-dir "$RUN" --effort good --num-images "${IMAGES:-512}"
$STAGE optimize_adaround.py --calib-dir "$RUN" --effort good --no-alpha --force "$@"
