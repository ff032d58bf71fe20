"""A transformer of SD3-Medium's kind with random weights: computes as the real one does, and costs no download."""

import dataclasses
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from benchmarks.hub_cache import SD3_MEDIUM
from w4a8.model.diffusionkit import HUB_MMDIT_CONFIGS, MMDiT


def random_transformer(dtype: mx.Dtype, **sizes: Any) -> MMDiT:
    """SD3-Medium's, or one of other sizes (entries of its config)."""
    mmdit = MMDiT(dataclasses.replace(HUB_MMDIT_CONFIGS[SD3_MEDIUM], low_memory_mode=False, **sizes))
    mmdit.update(tree_map(lambda array: array.astype(dtype), mmdit.parameters()))
    mx.eval(mmdit.parameters())
    return mmdit
