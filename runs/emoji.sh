#!/usr/bin/env bash
# The whole road on the bundled model, in 8 to 11 minutes on two idle cores; `make demo` runs it. Resumable as a whole.
#
#   runs/emoji.sh [folder]                               the folder of the run (default: calibration_data/demo)
#   EFFORT=good runs/emoji.sh calibration_data/good      20 to 30 minutes, and better images; EFFORT=best takes hours
#   GROUP_SIZE=32 runs/emoji.sh calibration_data/gguf    groups that GGUF files need
set -euo pipefail
. "$(dirname "$0")/begin.bash"
DIR=${1:-calibration_data/demo}
echo "The whole road on the bundled model, effort ${EFFORT:-fast} (on two idle cores fast takes 8 to 11 minutes, good 20 to 30), into $DIR. Ctrl-C and the same command again go on."
exec $PY tools/road.py demo "$DIR" ${EFFORT:+effort="$EFFORT"} ${GROUP_SIZE:+group="$GROUP_SIZE"}
