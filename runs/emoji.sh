#!/usr/bin/env bash
# The whole road on the bundled model, in ten minutes on two cores; `make demo` runs it. Resumable as a whole.
#
#   runs/emoji.sh [folder]
set -euo pipefail
. "$(dirname "$0")/begin.bash"
DIR=${1:-calibration_data/demo}
echo "The whole road on the bundled model: 6 to 10 minutes on two cores, into $DIR. Ctrl-C and the same command again go on."

step generate_calibration_data.py --model sd3-emoji --num-images 24 --batch-size 12 --seed 3 --calib-dir "$DIR" --resume
step tools/contact_sheet.py --calib-dir "$DIR" --columns 8 --size 128
step cache_adaround_data.py --calib-dir "$DIR" --num-images 24 --stride 8 --resume
step collect_layer_activations.py --calib-dir "$DIR" --num-images 8 --resume
step analyze_activations.py --calib-dir "$DIR" --plot
step analyze_activations_multitier.py --calib-dir "$DIR" --plot
step optimize_adaround.py --calib-dir "$DIR" --iters 80 --resume
step export_quantized_model.py --calib-dir "$DIR" --force
step evaluate_quantization.py --calib-dir "$DIR" --num-steps 20 --variants w4-rtn,w4-adaround,native,a8,a8-token,native+a8-token --resume
step draw_images.py "red heart" "police car" "mango" --model "$DIR/quantized_model" --compare sd3-emoji --num-steps 20 --output "$DIR/drawn"
step report_calibration.py --calib-dir "$DIR"
echo
echo "Done. Open $DIR/report/index.html: what was measured, every image beside its original, and how to go on."
echo "The quantized model is $DIR/quantized_model; draw with it: $PY draw_images.py --model $DIR/quantized_model \"red heart\""
echo "$DIR/drawn/compare.png has images of it beside the original's; calibration_data/README.md explains every file."
