#!/usr/bin/env bash
# From prompts to a measured W4A8 model of sd3-emoji on one GPU, in ten minutes on an H200. Resumable as a whole.
#
#   make setup MLX=cuda13 && runs/emoji_gpu.sh [folder]         (default: calibration_data/emoji_gpu)
set -euo pipefail
. "$(dirname "$0")/begin.bash"
DIR=${1:-calibration_data/emoji_gpu}
exec $PY tools/road.py emoji_gpu "$DIR" ${ITERS:+iters="$ITERS"}
