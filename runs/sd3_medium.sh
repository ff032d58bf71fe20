#!/usr/bin/env bash
# SD3-Medium (or your fine-tune of it), from prompts to a 4-bit model that draws and a page that says how well. Resumable as a whole.
#
#   runs/sd3_medium.sh --plan                what it will take on this machine; needs no model, writes nothing
#   runs/sd3_medium.sh [folder]              run it; call it again after an interruption
#
#   MEMORY=16|32|64         GB to plan for (default: what this machine has)
#   IMAGES= CACHE= ITERS= STATISTICS= JUDGED= STEPS= T5=--no-t5       instead of what follows from the memory
#   PASS_SECONDS=0.7        a plain pass at 512 px with guidance on your machine; stage 1's --dry-run says it, times follow from it
#   MODEL=…  CHECKPOINT=my.safetensors  LORA=my_style.safetensors:0.8       another model, a fine-tune, a LoRA
#
# First: accept the licence on the model's page, then `hf auth login`.
set -euo pipefail
PLAN=; [ "${1:-}" = --plan ] && { PLAN=1; PYTHON=true; shift; }
. "$(dirname "$0")/begin.bash"
MODEL=${MODEL:-argmaxinc/mlx-stable-diffusion-3-medium}
PASS_SECONDS=${PASS_SECONDS:-0.7}
if [ -z "${MEMORY:-}" ]; then
  bytes=$(sysctl -n hw.memsize 2>/dev/null || awk '/MemTotal/ {print $2 * 1024}' /proc/meminfo)
  MEMORY=$(awk -v b="$bytes" 'BEGIN {g = b / 1e9; print (g >= 60 ? 64 : g >= 30 ? 32 : 16)}')
fi
defaults() { : "${IMAGES:=$1}" "${CACHE:=$2}" "${ITERS:=$3}" "${STATISTICS:=$4}" "${JUDGED:=$5}" "${T5:=$6}" "${STEPS:=28}"; }
case $MEMORY in  # images to sample, GB of cache, iterations a block, images for statistics and for the comparison, text encoder
  16) defaults 48 1 200 8 8 --no-t5 ;;
  32) defaults 128 4 300 16 16 --t5 ;;
  64) defaults 512 16 400 32 32 --t5 ;;
  *) echo "Error: MEMORY=$MEMORY: 16, 32 or 64" >&2; exit 2 ;;
esac
DIR=${1:-calibration_data/sd3_medium}

# Bytes: measured at SD3-Medium's size, 512 px, guidance (README). Times: passes x PASS_SECONDS x the measured ratio of each stage to plain
# passes; 3W: 104 s for a block's 400 iterations and 4.4 s for one of the last phase, where a plain pass takes 0.045 s (an H100, float32
# against float16; on a Mac, whose float32 is nearer to its float16, it should be less).
awk -v images="$IMAGES" -v steps="$STEPS" -v cache="$CACHE" -v iters="$ITERS" -v statistics="$STATISTICS" -v judged="$JUDGED" -v pass="$PASS_SECONDS" \
    -v memory="$MEMORY" -v t5="$T5" '
function hours(s) { return s < 5400 ? sprintf("%.0f min", s / 60) : sprintf("%.1f h", s / 3600) }
BEGIN {
  printf "Plan for %d GB of memory; times are derived, for %.2f s a pass\n", memory, pass
  printf "  download                  %5.1f GB  (%s; kept by the Hugging Face hub)\n", t5 == "--t5" ? 15.5 : 6.0, t5 == "--t5" ? "with T5, 9.5 GB" : "without T5"
  printf "  1   %4d images           %5.1f GB  %8s  (5.4 GB of memory, with T5 10.8)\n", images, images * (steps / 3 + 1) * 0.131e-3 + images * 0.0006, hours(images * steps * pass)
  samples = cache * 1000 / 7.5
  printf "  2W  %4d samples          %5.1f GB  %8s\n", samples, cache, hours(samples * pass * 1.15)
  printf "  2A  %4d passes           %5.1f GB  %8s\n", statistics * 5, statistics * 5 * 0.0084 + 5 * 0.018, hours(statistics * 5 * pass * 1.26)
  printf "  3W  24 blocks, %d each   %5.1f GB  %8s  (a night on a laptop; 5 - 17 GB of memory, by --micro-batch)\n", iters, 2.2, hours((24 * iters * 0.26 + iters / 2 * 4.4) / 0.045 * pass)
  printf "  5   the 4-bit model       %5.1f GB\n", 2.3
  printf "  4   %4d images x 4       %5.1f GB  %8s\n", judged, judged * 4 * (steps + 1) * 0.262e-3, hours(judged * 4 * steps * pass)
}'
[ -n "$PLAN" ] && exit 0

$PY tools/road.py sd3_medium "$DIR" model="$MODEL" checkpoint="${CHECKPOINT:-}" lora="${LORA:-}" images="$IMAGES" steps="$STEPS" t5="$T5" \
  cache="$CACHE" statistics="$STATISTICS" iters="$ITERS" judged="$JUDGED"
echo
echo "Done. Open $DIR/report/index.html. Draw: $PY draw_images.py --model $DIR/quantized_model \"your prompt\""
