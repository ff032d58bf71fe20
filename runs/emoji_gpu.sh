#!/usr/bin/env bash
# From prompts to a measured W4A8 model of sd3-emoji on one GPU, in 5 minutes 30 s on an H100. Resumable as a whole.
#
#   make setup MLX=cuda13 && runs/emoji_gpu.sh [folder]
set -euo pipefail
. "$(dirname "$0")/begin.bash"
DIR=${1:-calibration_data/emoji_gpu}
ITERS=${ITERS:-1500}

step generate_calibration_data.py --model sd3-emoji --num-images 3200 --num-steps 20 --stride 2 --batch-size 100 --no-images --calib-dir "$DIR" --resume
step cache_adaround_data.py --num-images 3200 --steps 8,12,14,16,18 --calib-dir "$DIR" --resume
step optimize_adaround.py --iters "$ITERS" --batch-size 64 --no-alpha --calib-dir "$DIR" --resume
step evaluate_quantization.py --num-images 64 --num-steps 20 --batch-size 64 --variants w4-rtn,w4-adaround,a8-token,w4-adaround+a8-token --calib-dir "$DIR" --resume
