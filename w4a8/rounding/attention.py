"""Attention whose backward pass makes the scores of a few heads at a time again, instead of keeping all."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from w4a8.memory import device_memory
from w4a8.model.layers import Block

SCORES_SHARE = 1 / 16  # of the device's memory that attention scores may take before they are made in slices


def sliced_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, slice_bytes: int, **options: Any) -> mx.array:
    """mx.fast.scaled_dot_product_attention of q, k, v (rows, heads, tokens, channels), bit for bit.

    Where the scores take more than slice_bytes in float32, a slice of heads waits for the one before, and its scores are
    computed again in the backward pass (Chen et al. 2016).
    """
    rows, heads, tokens, _ = q.shape
    attention = partial(mx.fast.scaled_dot_product_attention, scale=scale, **options)
    each = max(1, int(slice_bytes // (rows * tokens * k.shape[2] * 4)))
    if each >= heads:
        return attention(q, k, v)
    recomputed, parts = mx.checkpoint(lambda q, k, v: attention(q, k, v)), []
    for start in range(0, heads, each):
        some = [array[:, start : start + each] for array in (q, k, v)]
        parts.append(recomputed(*(mx.depends(some, parts[-1]) if parts else some)))
    return mx.concatenate(parts, axis=1)


@contextmanager
def attention_in_slices(blocks: Iterable[Block], slice_bytes: int | None = None) -> Iterator[None]:
    """Let these blocks compute attention so, until the block ends. slice_bytes: by default a share of the memory."""
    slice_bytes = slice_bytes or int(SCORES_SHARE * device_memory())
    modules: list[nn.Module] = [block.module for block in blocks]
    originals = [module.sdpa for module in modules]
    try:
        for module in modules:
            module.sdpa = partial(sliced_attention, slice_bytes=slice_bytes)
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.sdpa = original
