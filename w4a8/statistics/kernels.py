"""Compute the statistics of the inputs of one pass: by a GPU kernel, by MLX operations, or by NumPy.

The three ways agree: limits and histograms are equal, moments differ by rounding. Every way returns three arrays:
limits (2, channels) float32, each channel's minimum and maximum; histograms (inputs, 259) int32, 256 counts on the grid
of `calibration_store.histograms.histogram_grid`, the grid's exponent, its first bin, and the number of values that are
not finite; moments (2, channels) float32, each channel's E[x] and E[x²]. `channels` are those of all inputs, one after
the other.
"""

import functools
import warnings
from collections.abc import Callable

import mlx.core as mx
import numpy as np
from PIL import Image

from calibration_store.histograms import histogram_grid
from w4a8.backend.parallel import announce_compilation
from w4a8.statistics.kernel_source import (
    KERNEL_FUNCTIONS,
    KERNEL_HEADER,
    MERGE_KERNEL,
    TILE_KERNEL,
    TILE_ROWS,
    TILE_THREADS,
)

# The number of distinct inputs of one SD3 block: one launch takes them all, since launches cost more than the work.
INPUTS_PER_KERNEL = 8


@functools.cache
def _gpu_kernels(backend: str, inputs: int) -> tuple[Callable, Callable]:
    """Return the tile kernel for this number of inputs, and the merge kernel."""
    build = mx.fast.metal_kernel if backend == "metal" else mx.fast.cuda_kernel
    sizes = f"#define TILE_ROWS {TILE_ROWS}\n#define TILE_THREADS {TILE_THREADS}\n"
    header = KERNEL_HEADER[backend] + sizes + KERNEL_FUNCTIONS
    names = [f"x{i}" for i in range(inputs)]
    choose = "const DEVICE T* x = x0;\nint input = 0;\n" + "".join(
        f"if (GROUP >= plan[{i} * 5]) {{ x = x{i}; input = {i}; }}\n" for i in range(1, inputs)
    )
    tiles = ["tile_limits", "tile_histograms"]
    return (  # type: ignore[return-value]  # MLX's stubs say object, and callables come
        build(f"activation_tiles_{inputs}", [*names, "plan"], tiles, choose + TILE_KERNEL, header),
        build("activation_merge", [*tiles, "plan"], ["limits", "histograms", "moments"], MERGE_KERNEL, header),
    )


@functools.cache
def _gpu_plan(shapes: tuple[tuple[int, int], ...]) -> tuple[mx.array, int, int, int]:
    """Return the kernels' plan for inputs of these shapes (rows, channels), and three totals over all inputs.

    The plan is (inputs, 5) int32, described in kernel_source.py. The totals are the number of groups, the number of
    elements of tile_limits, and the number of channels.
    """
    plan, groups, tile_limits, channels = [], 0, 0, 0
    for rows, width in shapes:
        plan.append([groups, rows, width, tile_limits, channels])
        tile_rows = -(-rows // TILE_ROWS)
        groups += tile_rows * -(-width // 256)
        tile_limits += tile_rows * 4 * width
        channels += width
    return mx.array(plan, dtype=mx.int32), groups, tile_limits, channels


def gpu_statistics(inputs: list[mx.array], backend: str) -> list[mx.array]:
    """Return [limits, histograms, moments] of inputs (rows, channels) of one dtype, unevaluated, by the GPU kernel.

    backend: "metal" or "cuda".
    """
    inputs = [x.astype(mx.float32) if x.dtype == mx.bfloat16 else x for x in inputs]
    plan, groups, tile_limits, channels = _gpu_plan(tuple(x.shape for x in inputs))
    tile_kernel, merge_kernel = _gpu_kernels(backend, len(inputs))
    tiles = tile_kernel(
        inputs=[*inputs, plan],
        template=[("T", inputs[0].dtype)],
        grid=(groups * TILE_THREADS, 1, 1),
        threadgroup=(TILE_THREADS, 1, 1),
        output_shapes=[(tile_limits,), (groups, 259)],
        output_dtypes=[mx.float32, mx.int32],
    )
    return merge_kernel(
        inputs=[*tiles, plan],
        template=[("total_channels", channels)],
        grid=(len(inputs) * 1024, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(2, channels), (len(inputs), 259), (2, channels)],
        output_dtypes=[mx.float32, mx.int32, mx.float32],
    )


def mlx_statistics(inputs: list[mx.array]) -> list[mx.array]:
    """Return [limits, histograms, moments] of inputs (rows, channels), unevaluated, from MLX operations alone.

    The function is the plain twin of `gpu_statistics`, and stands in for a kernel that fails its self-check.
    """

    def power_of_two(exponent: mx.array) -> mx.array:
        return mx.view((exponent + 127) << 23, mx.float32)

    limits, histograms, moments = [], [], []
    for x in inputs:
        x = x.astype(mx.float32)
        finite = mx.isfinite(x)
        values = mx.where(finite, x, 0.0)
        moments.append(mx.stack([values.mean(axis=0), mx.square(values).mean(axis=0)]))
        limits.append(mx.stack([mx.where(finite, x, 3.4e38).min(axis=0), mx.where(finite, x, -3.4e38).max(axis=0)]))
        low, high = mx.minimum(limits[-1][0].min(), 0.0), mx.maximum(limits[-1][1].max(), 0.0)
        exponent = mx.maximum(((mx.view(high - low, mx.int32) >> 23) & 255) - 127 - 9, -24)
        for _ in range(4):  # the first exponent is at most three too small
            bins = mx.floor(high * power_of_two(-exponent)) - mx.floor(low * power_of_two(-exponent))
            exponent = exponent + (bins > 255).astype(mx.int32)
        first_bin = mx.floor(low * power_of_two(-exponent)).astype(mx.int32)
        index = mx.floor(values * power_of_two(-exponent)).astype(mx.int32) - first_bin
        counts = mx.zeros((256,), dtype=mx.int32).at[index.reshape(-1)].add(finite.reshape(-1).astype(mx.int32))
        grid = mx.stack([exponent, first_bin, (~finite).sum().astype(mx.int32)])
        histograms.append(mx.concatenate([counts, grid]))
    return [mx.concatenate(limits, axis=1), mx.stack(histograms), mx.concatenate(moments, axis=1)]


def cpu_statistics(x: np.ndarray) -> list[np.ndarray]:
    """Return [limits, histograms, moments] of one input x (rows, channels), by NumPy and Pillow's histogram."""
    x = x.astype(np.float32, copy=False)
    limits = np.stack([x.min(axis=0), x.max(axis=0)])
    moments = np.stack([x.mean(axis=0), np.einsum("rc,rc->c", x, x) / np.float32(len(x))])
    histograms = np.zeros((1, 259), np.int32)
    histogram = histograms[0]
    low, high = float(limits[0].min()), float(limits[1].max())  # NaN where x has one
    if not (np.isfinite(low) and np.isfinite(high)):
        histogram[258] = np.count_nonzero(~np.isfinite(x))
        return [limits, histograms, moments]
    exponent, first_bin = histogram_grid(low, high)
    bins = x * np.float32(2.0**-exponent)  # exact, since the factor is a power of two
    np.floor(bins, out=bins)
    bins -= np.float32(first_bin)
    histogram[:256] = Image.fromarray(bins.astype(np.uint8)).histogram()
    histogram[256:258] = exponent, first_bin
    return [limits, histograms, moments]


def choose_statistics() -> str:
    """Return the name of the implementation that runs here: "cpu", "metal", "cuda" or "mlx".

    "mlx" stands in for a GPU's kernel that fails its self-check, and a warning says so.
    """
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    backend = "metal" if mx.metal.is_available() else "cuda"
    announce_compilation("the kernels of the statistics")
    failure = kernel_self_check(backend)
    if failure is None:
        return backend
    warnings.warn(
        f"the {backend} kernel failed its self-check ({failure}): using the slower MLX operations", stacklevel=2
    )
    return "mlx"


def kernel_self_check(backend: str) -> str | None:
    """Compare the GPU kernel with `mlx_statistics` on inputs of odd sizes; return the fault in words, or None."""
    try:
        for dtype in (mx.float32, mx.float16):
            shapes = ((300, 259), (1, 5), (513, 512))
            inputs = [(mx.random.normal(shape, key=mx.random.key(shape[0])) * 3).astype(dtype) for shape in shapes]
            found, expected = gpu_statistics(inputs, backend), mlx_statistics(inputs)
            exact = all(mx.array_equal(a, b).item() for a, b in zip(found[:2], expected[:2], strict=True))
            if not exact or not mx.allclose(found[2], expected[2], rtol=1e-4, atol=1e-4).item():
                return "its results differ"
    except (RuntimeError, ValueError) as error:
        return " ".join(str(error).split())[:200]
    return None
