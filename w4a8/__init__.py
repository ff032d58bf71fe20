"""Quantization of Stable Diffusion 3 and FLUX for MLX: the code of the stages. Importing this package costs next to nothing."""

import os
import sys

from w4a8.backend import blas  # noqa: F401  (before MLX)

__version__ = "0.9.0.dev0"  # the one place: pyproject.toml reads it, and every file of a run notes it

if sys.platform == "linux":
    # CUDA frees what a pass no longer needs when a graph of operations ends. Short graphs hold 5.0 GB instead of 12.7 at
    # SD3-Medium's size and 1024 px, at the same speed (benchmarks/results/2026-11-26-memory-h100.txt). MLX reads this once.
    os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "5")
