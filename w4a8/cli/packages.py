"""The first import of every script: it ends the script with one line where packages are missing."""

import importlib.util
import sys

# Every script needs these; the analyzers need no MLX.
NEEDED = ("click", "filelock", "msgspec", "numpy", "orjson", "tqdm")
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    sys.exit(
        f"Error: {sys.executable} has no {', '.join(missing)}: run `make setup` once, "
        "then `source .venv/bin/activate`, and `python` has everything (Issue 36)"
    )
