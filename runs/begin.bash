# Sourced by the recipes: --help, words that are no folder, the interpreter.
case "${1:-}" in
  -h | --help) sed -n '2,/^set /{/^set /!{s/^# \{0,1\}//;p;};}' "$0"; exit 0 ;;
  -*) echo "Error: $1: not known; $0 --help says what is" >&2; exit 2 ;;
esac
[ $# -le 1 ] || { echo "Error: one folder at most, not $*" >&2; exit 2; }
case "$0" in
  *sd3_medium.sh) ;;
  *) for name in MODEL CHECKPOINT LORA; do
       [ -z "${!name:-}" ] || { echo "Error: $name=${!name}: this recipe takes the bundled model; runs/sd3_medium.sh takes others" >&2; exit 2; }
     done ;;
esac
case "$0" in
  *emoji_gpu.sh) for name in EFFORT GROUP_SIZE; do
       [ -z "${!name:-}" ] || { echo "Error: $name=${!name}: this recipe has its own; runs/emoji.sh takes it" >&2; exit 2; }
     done ;;
esac
cd "$(dirname "$0")/.."
PY=${PYTHON:-.venv/bin/python}
command -v ${PY%% *} > /dev/null || { echo "Error: $PY: not found; run \`make setup\` first, or give PYTHON=…" >&2; exit 2; }
