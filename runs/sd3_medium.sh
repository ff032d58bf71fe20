#!/usr/bin/env bash
# SD3-Medium (or your fine-tune of it), from prompts to a 4-bit model that draws and a page that says how well. Resumable as a whole.
#
#   runs/sd3_medium.sh --plan                what it will take on this machine; needs no model, writes nothing
#   runs/sd3_medium.sh [folder]              run it; call it again after an interruption (default: calibration_data/sd3_medium)
#
#   EFFORT=fast|good|best   images and iterations (default: good)
#   MEMORY=24               GB to plan for (default: what this machine has, a GPU's own where it has one)
#   IMAGES= ITERS= STEPS= CACHE= T5=--no-t5       instead of what follows from effort and memory; CACHE in GB
#   GROUP_SIZE=32           groups that GGUF files need (default: 64)
#   PASS_SECONDS=0.7        a plain pass at 512 px with guidance (default: one random block is timed)
#   MODEL=…  CHECKPOINT=my.safetensors  LORA=my_style.safetensors:0.8       another model, a fine-tune, a LoRA
#
# First: accept the licence on the model's page, then `hf auth login`.
set -euo pipefail
PLAN=; [ "${1:-}" = --plan ] && { PLAN=--plan; shift; }
. "$(dirname "$0")/begin.bash"
DIR=${1:-calibration_data/sd3_medium}
exec $PY tools/sd3_medium.py $PLAN "$DIR"
