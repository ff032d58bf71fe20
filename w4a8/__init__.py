"""Quantization of Stable Diffusion 3 and FLUX for MLX: the code of the stages.

Importing this package costs next to nothing.
"""

import os
import sys

from w4a8.backend import blas  # noqa: F401  (before MLX is imported)

__version__ = "0.9.0.dev0"  # the one place: pyproject.toml reads it, and every file of a run notes it

if sys.platform == "linux":
    # On CUDA, memory that a pass no longer needs is freed when a graph of operations ends. At SD3-Medium's size and
    # 1024 px short graphs hold 5.0 GB, long ones 12.7 GB, at the same speed
    # (benchmarks/results/2026-11-26-memory-h100.txt). MLX reads this variable once.
    os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "5")
