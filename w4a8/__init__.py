"""What the stages compute with. Importing it costs next to nothing; its modules import what they use."""

import importlib.util
import os
import sys

NEEDED = ("click", "filelock", "msgspec", "numpy", "orjson", "tqdm")  # by every script; MLX is not by the analyzers
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    sys.exit(
        f"Error: {sys.executable} has no {', '.join(missing)}: run `make setup` once, then `source .venv/bin/activate`, "
        "and `python` has everything (Issue 36)"
    )

from w4a8 import blas  # noqa: E402, F401  (before MLX)

if sys.platform == "linux":
    # CUDA frees what a pass no longer needs when a graph of operations ends. Short graphs hold 5.0 GB instead of 12.7 at
    # SD3-Medium's size and 1024 px, at the same speed (benchmarks/results/2026-11-26-memory-h100.txt). Read by MLX once.
    os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "5")
