#!/bin/sh
# Find a Python that fits, and let it fill .venv (tools/set_up.py). `make setup` runs this.
#
#   [PYTHON=/path/to/python] tools/set_up.sh cpu|cuda12|cuda13
NEEDED="Python 3.10 to 3.14 is needed"
fits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2> /dev/null; }
version() { "$1" -c 'import platform; print(platform.python_version())' 2> /dev/null || echo "not found"; }

cd "$(dirname "$0")/.." || exit 1
if [ -n "$PYTHON" ]; then
  fits "$PYTHON" || { echo "Error: $NEEDED, and $PYTHON is $(version "$PYTHON")" >&2; exit 2; }
  exec "$PYTHON" tools/set_up.py "$@"
fi
for name in python3 python3.13 python3.12 python3.11 python3.10 python3.14 python \
  /opt/homebrew/bin/python3.1[0-4] /usr/local/bin/python3.1[0-4] \
  "$HOME"/.pyenv/versions/3.1[0-4]*/bin/python3 "$HOME"/.local/share/uv/python/cpython-3.1[0-4]*/bin/python3; do
  if fits "$name"; then
    [ "$name" = python3 ] || echo "python3 is $(version python3), which does not fit: taking $name"
    exec "$name" tools/set_up.py "$@"
  fi
done
echo "Error: $NEEDED, and python3 is $(version python3): install one (apt install python3.11 python3.11-venv," \
  "brew install python@3.13, uv python install 3.13), or name it: make setup PYTHON=/path/to/python" >&2
exit 2
