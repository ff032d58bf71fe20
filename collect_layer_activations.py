"""Stage 2A: statistics of the input of every linear layer in the blocks, per denoising step.

Reads   manifest.json and samples/ of stage 1 (--calib-dir); the model and its precision come from the manifest.
Writes  activations/layer_statistics.json and activations/timestep_stats/step_{key}.npz, step_{key}_index.json;
        activations/partial/ keeps the results per image and step, which is what --resume goes on from.

    python collect_layer_activations.py --calib-dir calibration_data
"""

import functools
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli_options import (
    Interrupted,
    calib_dir_option,
    few,
    format_bytes,
    format_seconds,
    model_place_options,
    progress_bar,
    resume_command,
    resume_options,
    stage_command,
)

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np

    from calibration_store import ActivationPaths

SHIFT_MOMENTUM = 0.95
STEP_FILE_SIZES = 4  # of a partial result, that a step's files take: an array a layer, where partials have one an input
POST_GELU_SUFFIX = ".mlp.fc2"


# --- statistics of one input --------------------------------------------------------------------------------
#
# Inputs x (rows, channels) give three arrays: limits (2, channels of all) float32, the minimum and the maximum of each
# channel; histograms (inputs, 259) int32: 256 counts over quantizers.histogram_grid, then the grid's exponent,
# its first bin, and the number of values that are not finite; moments (2, channels of all) float32, mean and mean square
# of each channel. Three implementations, the same results (moments: up to float noise): a GPU kernel (Metal or CUDA),
# NumPy and torch (CPU), and plain MLX operations. Where a GPU flushes subnormal numbers they count as 0.

INPUTS_PER_KERNEL = 8  # the distinct inputs of one SD3 block: launches cost more than the work
TILE_ROWS = 128

KERNEL_HEADER = {
    "cuda": """
#define FUNCTION __device__ inline
#define DEVICE
#define SHARED __shared__
#define COUNTER unsigned int
#define ADD(counter, value) atomicAdd(&(counter), (unsigned int)(value))
#define SET(counter, value) (counter) = (value)
#define GET(counter) (counter)
#define BARRIER __syncthreads()
#define THREAD ((int)threadIdx.x)
#define GROUP ((int)blockIdx.x)
#define AS_FLOAT(bits) __int_as_float(bits)
#define AS_INT(value) __float_as_int(value)
""",
    "metal": """
#define FUNCTION inline
#define DEVICE device
#define SHARED threadgroup
#define COUNTER atomic_uint
#define ADD(counter, value) atomic_fetch_add_explicit(&(counter), (uint)(value), memory_order_relaxed)
#define SET(counter, value) atomic_store_explicit(&(counter), (uint)(value), memory_order_relaxed)
#define GET(counter) atomic_load_explicit(&(counter), memory_order_relaxed)
#define BARRIER threadgroup_barrier(mem_flags::mem_threadgroup)
#define THREAD ((int)thread_position_in_threadgroup.x)
#define GROUP ((int)threadgroup_position_in_grid.x)
#define AS_FLOAT(bits) as_type<float>(bits)
#define AS_INT(value) as_type<int>(value)
""",
}

KERNEL_FUNCTIONS = """
FUNCTION float power_of_two(int exponent) { return AS_FLOAT((exponent + 127) << 23); }

// quantizers.histogram_grid: the finest power-of-two width at which [low, high] touches at most 256 bins
FUNCTION int grid_exponent(float low, float high) {
    int exponent = ((AS_INT(high - low) >> 23) & 255) - 127 - 9;
    if (exponent < -24) exponent = -24;
    while (floor(high * power_of_two(-exponent)) - floor(low * power_of_two(-exponent)) > 255.0f) exponent++;
    return exponent;
}

FUNCTION bool is_finite(float value) { return (AS_INT(value) & 0x7f800000) != 0x7f800000; }
"""

# plan (inputs, 5) int32, per input: its first group, rows, channels, where its tile limits and its limits begin.
#
# One group of 1024 threads takes 256 channels × TILE_ROWS rows of one input, four rows at a time: reads them for the
# limits, then again, from the cache, for the histogram over the tile's own grid. x is read from memory once.
TILE_KERNEL = """
    const int rows = plan[input * 5 + 1], channels = plan[input * 5 + 2];
    const int columns = (channels + 255) / 256, tile = GROUP - plan[input * 5];
    const int tile_row = tile / columns, channel = tile % columns * 256 + THREAD % 256;
    const int first_row = tile_row * TILE_ROWS + THREAD / 256;
    const int end_row = (tile_row + 1) * TILE_ROWS < rows ? (tile_row + 1) * TILE_ROWS : rows;
    SHARED COUNTER histogram[8 * 256];
    SHARED COUNTER not_finite;
    SHARED float lows[1024];
    SHARED float highs[1024];
    SHARED float sums[1024];
    SHARED float squares[1024];
    SET(histogram[THREAD], 0);
    SET(histogram[THREAD + 1024], 0);
    if (THREAD == 0) SET(not_finite, 0);
    BARRIER;
    float low = 3.4e38f, high = -3.4e38f, sum = 0.0f, square = 0.0f;
    int bad = 0;
    if (channel < channels) {
        for (int row = first_row; row < end_row; row += 4) {
            const float value = (float)x[(size_t)row * channels + channel];
            const bool good = is_finite(value);
            low = good && value < low ? value : low;
            high = good && value > high ? value : high;
            sum += good ? value : 0.0f;
            square += good ? value * value : 0.0f;
            bad += good ? 0 : 1;
        }
    }
    if (bad > 0) ADD(not_finite, bad);
    lows[THREAD] = low;
    highs[THREAD] = high;
    sums[THREAD] = sum;
    squares[THREAD] = square;
    BARRIER;
    for (int size = 512; size > 0; size /= 2) {
        if (THREAD < size) {
            lows[THREAD] = lows[THREAD + size] < lows[THREAD] ? lows[THREAD + size] : lows[THREAD];
            highs[THREAD] = highs[THREAD + size] > highs[THREAD] ? highs[THREAD + size] : highs[THREAD];
            sums[THREAD] += sums[THREAD + size];
            squares[THREAD] += squares[THREAD + size];
            if (size == 256 && channel < channels) {  // here index and channel agree
                const int start = plan[input * 5 + 3] + tile_row * 4 * channels + channel;
                tile_limits[start] = lows[THREAD];
                tile_limits[start + channels] = highs[THREAD];
                tile_limits[start + 2 * channels] = sums[THREAD];
                tile_limits[start + 3 * channels] = squares[THREAD];
            }
        }
        BARRIER;
    }
    const float tile_low = lows[0] < 0.0f ? lows[0] : 0.0f, tile_high = highs[0] > 0.0f ? highs[0] : 0.0f;
    const int exponent = grid_exponent(tile_low, tile_high);
    const float inverse_width = power_of_two(-exponent);
    const int first_bin = (int)floor(tile_low * inverse_width);
    const int copy = (THREAD / 32 % 8) * 256 - first_bin;
    if (channel < channels) {
        for (int row = first_row; row < end_row; row += 4) {
            const float value = (float)x[(size_t)row * channels + channel];
            if (is_finite(value)) ADD(histogram[copy + (int)floor(value * inverse_width)], 1);
        }
    }
    BARRIER;
    if (THREAD < 256) {
        int count = 0;
        for (int other = THREAD; other < 8 * 256; other += 256) count += (int)GET(histogram[other]);
        tile_histograms[GROUP * 259 + THREAD] = count;
    }
    if (THREAD == 0) {
        tile_histograms[GROUP * 259 + 256] = exponent;
        tile_histograms[GROUP * 259 + 257] = first_bin;
        tile_histograms[GROUP * 259 + 258] = (int)GET(not_finite);
    }
"""

# Reduces the tiles, one group of 1024 threads an input: limits, and histograms, whose grids nest.
MERGE_KERNEL = """
    const int input = GROUP, rows = plan[input * 5 + 1], channels = plan[input * 5 + 2];
    const int tile_rows = (rows + TILE_ROWS - 1) / TILE_ROWS, columns = (channels + 255) / 256;
    const int first_tile = plan[input * 5], end_tile = first_tile + tile_rows * columns;
    SHARED COUNTER merged[256];
    SHARED COUNTER not_finite;
    SHARED float lows[1024];
    SHARED float highs[1024];
    if (THREAD < 256) SET(merged[THREAD], 0);
    if (THREAD == 0) SET(not_finite, 0);
    float input_low = 0.0f, input_high = 0.0f;
    for (int channel = THREAD; channel < channels; channel += 1024) {
        float low = 3.4e38f, high = -3.4e38f, sum = 0.0f, square = 0.0f;
        for (int row = 0; row < tile_rows; row++) {
            const int start = plan[input * 5 + 3] + row * 4 * channels + channel;
            low = tile_limits[start] < low ? tile_limits[start] : low;
            high = tile_limits[start + channels] > high ? tile_limits[start + channels] : high;
            sum += tile_limits[start + 2 * channels];
            square += tile_limits[start + 3 * channels];
        }
        input_low = low < input_low ? low : input_low;
        input_high = high > input_high ? high : input_high;
        limits[plan[input * 5 + 4] + channel] = low;
        limits[total_channels + plan[input * 5 + 4] + channel] = high;
        moments[plan[input * 5 + 4] + channel] = sum / (float)rows;
        moments[total_channels + plan[input * 5 + 4] + channel] = square / (float)rows;
    }
    lows[THREAD] = input_low;
    highs[THREAD] = input_high;
    BARRIER;
    for (int size = 512; size > 0; size /= 2) {
        if (THREAD < size) {
            lows[THREAD] = lows[THREAD + size] < lows[THREAD] ? lows[THREAD + size] : lows[THREAD];
            highs[THREAD] = highs[THREAD + size] > highs[THREAD] ? highs[THREAD + size] : highs[THREAD];
        }
        BARRIER;
    }
    const int exponent = grid_exponent(lows[0], highs[0]);
    const int first_bin = (int)floor(lows[0] * power_of_two(-exponent));
    for (int tile = first_tile + THREAD / 256; tile < end_tile; tile += 4) {
        const int bin = THREAD % 256, count = tile_histograms[tile * 259 + bin];
        const int coarser = exponent - tile_histograms[tile * 259 + 256], shift = coarser < 31 ? coarser : 31;
        if (count > 0) ADD(merged[((tile_histograms[tile * 259 + 257] + bin) >> shift) - first_bin], count);
        if (bin == 0 && tile_histograms[tile * 259 + 258] > 0) ADD(not_finite, tile_histograms[tile * 259 + 258]);
    }
    BARRIER;
    if (THREAD < 256) histograms[input * 259 + THREAD] = (int)GET(merged[THREAD]);
    if (THREAD == 0) {
        histograms[input * 259 + 256] = exponent;
        histograms[input * 259 + 257] = first_bin;
        histograms[input * 259 + 258] = (int)GET(not_finite);
    }
"""


@functools.cache
def _gpu_kernels(backend: str, inputs: int) -> tuple[Callable, Callable]:
    """The tile kernel for `inputs` inputs, and the merge kernel."""
    import mlx.core as mx

    build = mx.fast.metal_kernel if backend == "metal" else mx.fast.cuda_kernel
    header = KERNEL_HEADER[backend] + f"#define TILE_ROWS {TILE_ROWS}\n" + KERNEL_FUNCTIONS
    names = [f"x{i}" for i in range(inputs)]
    choose = "const DEVICE T* x = x0;\nint input = 0;\n" + "".join(
        f"if (GROUP >= plan[{i} * 5]) {{ x = x{i}; input = {i}; }}\n" for i in range(1, inputs)
    )
    tiles = ["tile_limits", "tile_histograms"]
    return (
        build(f"activation_tiles_{inputs}", [*names, "plan"], tiles, choose + TILE_KERNEL, header),
        build("activation_merge", [*tiles, "plan"], ["limits", "histograms", "moments"], MERGE_KERNEL, header),
    )


@functools.cache
def _gpu_plan(shapes: tuple[tuple[int, int], ...]) -> tuple["mx.array", int, int, int]:
    """The kernels' plan for inputs of these shapes; and groups, tile limits and channels in all."""
    import mlx.core as mx

    plan, groups, tile_limits, channels = [], 0, 0, 0
    for rows, width in shapes:
        plan.append([groups, rows, width, tile_limits, channels])
        tile_rows = -(-rows // TILE_ROWS)
        groups += tile_rows * -(-width // 256)
        tile_limits += tile_rows * 4 * width
        channels += width
    return mx.array(plan, dtype=mx.int32), groups, tile_limits, channels


def gpu_statistics(inputs: list["mx.array"], backend: str) -> list["mx.array"]:
    """[limits, histograms, moments] of inputs (rows, channels) of one dtype, unevaluated, by the kernel of `backend`."""
    import mlx.core as mx

    plan, groups, tile_limits, channels = _gpu_plan(tuple(x.shape for x in inputs))
    tile_kernel, merge_kernel = _gpu_kernels(backend, len(inputs))
    tiles = tile_kernel(
        inputs=[*inputs, plan],
        template=[("T", inputs[0].dtype)],
        grid=(groups * 1024, 1, 1),
        threadgroup=(1024, 1, 1),
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


def mlx_statistics(inputs: list["mx.array"]) -> list["mx.array"]:
    """The plain twin: [limits, histograms, moments] of inputs (rows, channels) from MLX operations alone, unevaluated."""
    import mlx.core as mx

    def power_of_two(exponent):
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
        for _ in range(4):  # the start is at most three too small
            bins = mx.floor(high * power_of_two(-exponent)) - mx.floor(low * power_of_two(-exponent))
            exponent = exponent + (bins > 255).astype(mx.int32)
        first_bin = mx.floor(low * power_of_two(-exponent)).astype(mx.int32)
        index = mx.floor(values * power_of_two(-exponent)).astype(mx.int32) - first_bin
        counts = mx.zeros((256,), dtype=mx.int32).at[index.reshape(-1)].add(finite.reshape(-1).astype(mx.int32))
        grid = mx.stack([exponent, first_bin, (~finite).sum().astype(mx.int32)])
        histograms.append(mx.concatenate([counts, grid]))
    return [mx.concatenate(limits, axis=1), mx.stack(histograms), mx.concatenate(moments, axis=1)]


def cpu_statistics(x: "np.ndarray") -> list["np.ndarray"]:
    """[limits (2, channels), histograms (1, 259), moments (2, channels)] of one x (rows, channels), at C speed: NumPy and torch's bincount."""
    import numpy as np
    import torch

    from quantizers import histogram_grid

    x = x.astype(np.float32, copy=False)
    limits = np.stack([x.min(axis=0), x.max(axis=0)])
    moments = np.stack([x.mean(axis=0), np.einsum("rc,rc->c", x, x) / np.float32(len(x))])
    histograms = np.zeros((1, 259), np.int32)
    histogram = histograms[0]
    low, high = float(limits[0].min()), float(limits[1].max())  # NaN comes through
    if not (np.isfinite(low) and np.isfinite(high)):
        histogram[258] = np.count_nonzero(~np.isfinite(x))
        return [limits, histograms, moments]
    exponent, first_bin = histogram_grid(low, high)
    bins = x * np.float32(2.0**-exponent)  # a power of two: exact
    np.floor(bins, out=bins)
    bins -= np.float32(first_bin)
    histogram[:256] = torch.bincount(torch.from_numpy(bins.astype(np.uint8).ravel()), minlength=256).numpy()
    histogram[256:258] = exponent, first_bin
    return [limits, histograms, moments]


def choose_statistics() -> str:
    """Which implementation runs here: cpu, metal, cuda, or mlx when the GPU's kernel fails its self-check."""
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    backend = "metal" if mx.metal.is_available() else "cuda"
    failure = kernel_self_check(backend)
    if failure is None:
        return backend
    warnings.warn(
        f"the {backend} kernel failed its self-check ({failure}): using the slower MLX operations", stacklevel=2
    )
    return "mlx"


def kernel_self_check(backend: str) -> str | None:
    """Compare the GPU kernel with its twin on inputs with odd sizes; returns what went wrong, or None."""
    import mlx.core as mx

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


# --- one forward pass ---------------------------------------------------------------------------------------


@dataclass
class PassStatistics:
    """Statistics of one pass: `layers` maps a layer to its distinct input, `channels` are those of each distinct
    input, `results` are [limits, histograms, moments] of one or several distinct inputs, in order."""

    layers: dict[str, int]
    channels: list[int]
    results: list[list]


class LazyRecorder:
    """Adds the statistics to the graph of the pass; one `mx.eval` takes everything pending.

    Left alone, MLX computes statistics last, since nothing in the pass waits for them, and every input lives
    until then. So the last layer of each group of inputs is made to depend on the group's statistics: its inputs
    are used up, and freed, before the pass goes on.
    """

    def __init__(self, compute: Callable[[list["mx.array"]], list["mx.array"]]):
        self._compute = compute
        self._pass = PassStatistics({}, [], [])
        self._waiting: list = []
        self._last = None

    def record(self, name: str, x: "mx.array") -> "mx.array | None":
        import mlx.core as mx

        tied = None
        if x is not self._last:  # q, k and v get the same array
            self._last = x
            self._pass.channels.append(x.shape[-1])
            self._waiting.append(x.reshape(-1, x.shape[-1]))
            if len(self._waiting) == INPUTS_PER_KERNEL:
                self._flush()
                tied = mx.depends([x], self._pass.results[-1])[0]
        self._pass.layers[name] = len(self._pass.channels) - 1
        return tied

    def _flush(self) -> None:
        if self._waiting:
            self._pass.results.append(self._compute(self._waiting))
            self._waiting = []

    def finish(self, output: "mx.array") -> PassStatistics:
        """Evaluate the pass."""
        import mlx.core as mx

        self._last = None
        self._flush()
        mx.eval(self._pass.results, output)
        return self._pass


class StreamingRecorder:
    """For the CPU: hands each input to NumPy and torch while MLX's own thread computes the next ones.

    At most LOOKAHEAD inputs wait at a time, about those of one block. `mx.async_eval` only starts the work; the
    one blocking `mx.eval` of the pass is that of its output.
    """

    LOOKAHEAD = 6

    def __init__(self):
        self._pass = PassStatistics({}, [], [])
        self._waiting: deque = deque()
        self._last = None

    def record(self, name: str, x: "mx.array") -> None:
        import mlx.core as mx

        if x is not self._last:
            self._last = x
            self._pass.channels.append(x.shape[-1])
            mx.async_eval(x)
            self._waiting.append(x)
            if len(self._waiting) > self.LOOKAHEAD:
                self._take_oldest()
        self._pass.layers[name] = len(self._pass.channels) - 1

    def _take_oldest(self) -> None:
        import numpy as np

        x = self._waiting.popleft()
        self._pass.results.append(cpu_statistics(np.array(x, copy=False).reshape(-1, x.shape[-1])))

    def finish(self, output: "mx.array") -> PassStatistics:
        """As LazyRecorder.finish."""
        import mlx.core as mx

        self._last = None
        while self._waiting:
            self._take_oldest()
        mx.eval(output)
        return self._pass


def new_recorder(implementation: str) -> LazyRecorder | StreamingRecorder:
    """A recorder for one pass; implementation is what `choose_statistics` gave."""
    if implementation == "cpu":
        return StreamingRecorder()
    if implementation == "mlx":
        return LazyRecorder(mlx_statistics)
    return LazyRecorder(functools.partial(gpu_statistics, backend=implementation))


def partial_arrays(statistics: PassStatistics, image_id: int, step: int, dtype: str) -> dict[str, "np.ndarray"]:
    """One pass's statistics as the arrays of a partial file. Raises StoreError when an activation is not finite.

    dtype: the run's precision; what to try follows from it.
    """
    import numpy as np

    from calibration_store import StoreError

    limits, histograms, moments = (
        [np.asarray(array) for array in arrays] for arrays in zip(*statistics.results, strict=True)
    )
    histograms = np.concatenate(histograms)
    for name, index in statistics.layers.items():
        if histograms[index, 258]:
            way = "a smaller --cfg-weight or another copy of the model" if dtype == "float32" else "--dtype float32"
            raise StoreError(
                f"{name}: {histograms[index, 258]} activations are not finite at step {step} of image {image_id}; "
                f"run generate_calibration_data.py with {way}"
            )
    return {
        "image_id": np.int32(image_id),
        "step_index": np.int32(step),
        "layers": np.array(list(statistics.layers)),
        "inputs": np.array(list(statistics.layers.values()), np.int32),
        "channels": np.array(statistics.channels, np.int32),
        "limits": np.concatenate(limits, axis=1),
        "moments": np.concatenate(moments, axis=1),
        "histograms": histograms,
    }


def write_partial(paths: "ActivationPaths", statistics: PassStatistics, image_id: int, step: int, dtype: str) -> None:
    """Write one pass's partial file; runs on the writer's thread while the next pass computes."""
    from calibration_store import write_npz

    write_npz(paths.partial(image_id, step), partial_arrays(statistics, image_id, step, dtype))


# --- merging ------------------------------------------------------------------------------------------------


class StepPartials(Sequence):
    """The partial results of one step, in ascending image_id, read from the disk one at a time."""

    def __init__(self, paths: "ActivationPaths", step: int, image_ids: Sequence[int]):
        self._paths, self._step, self._image_ids = paths, step, image_ids

    def __len__(self) -> int:
        return len(self._image_ids)

    def __getitem__(self, index: int) -> dict[str, "np.ndarray"]:
        from calibration_store import read_partial

        return read_partial(self._paths, self._image_ids[index], self._step)


def merge_partials(partials: Sequence[dict[str, "np.ndarray"]]) -> tuple[dict[str, "np.ndarray"], dict[str, dict]]:
    """Merge one step's partial results, in ascending image_id, into the arrays and the index of a step file.

    avg_min and avg_max are plain means over images, min and max the extremes, mean and mean_square those of all values; shift is the moving average of TaQ-DiT's per-channel centre
    (momentum 0.95, first image sets it); histograms add up on the finest grid that holds them all. partials is gone
    through twice, one partial in memory at a time.
    """
    import numpy as np

    from quantizers import histogram_edges, histogram_grid, regrid_histogram

    first = partials[0]
    starts = np.concatenate([[0], np.cumsum(first["channels"])])
    post_gelu = {
        int(i) for name, i in zip(first["layers"], first["inputs"], strict=True) if name.endswith(POST_GELU_SUFFIX)
    }
    total_min, total_max, total, total_square = (np.zeros(starts[-1], np.float64) for _ in range(4))
    shift, lowest, highest = None, np.inf, -np.inf
    for partial in partials:
        low, high = partial["limits"].astype(np.float64)
        lowest, highest = np.minimum(lowest, low), np.maximum(highest, high)
        total_min += low
        total_max += high
        total += partial["moments"][0]
        total_square += partial["moments"][1]
        centre = (low + high) / 2
        shift = centre if shift is None else SHIFT_MOMENTUM * shift + (1 - SHIFT_MOMENTUM) * centre
    avg_min, avg_max, mean, mean_square = (sums / len(partials) for sums in (total_min, total_max, total, total_square))
    parts = [slice(start, end) for start, end in pairwise(starts)]
    grids = [histogram_grid(float(lowest[part].min()), float(highest[part].max())) for part in parts]
    counts = np.zeros((len(parts), 256), np.int64)
    for partial in partials:
        for index, histogram in enumerate(partial["histograms"]):
            counts[index] += regrid_histogram(histogram[:256], histogram[256:258].tolist(), grids[index])
    inputs = [
        _describe_input(
            avg_min[part],
            avg_max[part],
            {"min": lowest[part], "max": highest[part], "mean": mean[part], "mean_square": mean_square[part]},
            shift[part] if index in post_gelu else None,
            counts[index],
            histogram_edges(*grids[index]),
        )
        for index, part in enumerate(parts)
    ]
    arrays, entries = {}, {}
    for name, index in zip(first["layers"], first["inputs"], strict=True):
        fields, entry = inputs[index]
        arrays |= {f"{name.replace('.', '_')}__{field}": array for field, array in fields.items()}
        entries[str(name)] = {"n_batches": len(partials), **entry}
    return arrays, entries


def _describe_input(avg_min, avg_max, others, shift, counts, edges) -> tuple[dict[str, "np.ndarray"], dict[str, Any]]:
    """The step file's arrays and index entry of one input."""
    import numpy as np

    from quantizers import absolute_histogram, histogram_percentile

    fields = {"avg_min": avg_min, "avg_max": avg_max, **others}
    fields = {name: array.astype(np.float32) for name, array in fields.items()}
    magnitudes = absolute_histogram(counts, edges)
    entry = {
        "tensor_absmax": float(np.maximum(np.abs(avg_min), np.abs(avg_max)).max()),
        "tensor_min": float(avg_min.min()),
        "tensor_max": float(avg_max.max()),
        "has_shift": shift is not None,
        "has_hist": True,
        "hist_p999": histogram_percentile(*magnitudes, 0.999),
        "hist_p99": histogram_percentile(*magnitudes, 0.99),
        "hist_p01": histogram_percentile(counts, edges, 0.01),
        "hist_p001": histogram_percentile(counts, edges, 0.001),
    }
    if shift is not None:
        fields["shift"] = shift.astype(np.float32)
        entry["shift_absmax"] = float(np.abs(shift).max())
        entry["shifted_absmax"] = float(np.maximum(np.abs(avg_min - shift), np.abs(avg_max - shift)).max())
    return fields | {"hist_counts": counts, "hist_edges": edges}, entry


# --- the stage ----------------------------------------------------------------------------------------------


def plan_collection(
    manifest: dict[str, Any], num_images: int, stride: int, before: dict[str, Any] | None
) -> tuple[dict[str, Any], list[dict]]:
    """What this collection is (partial/collection.json), and the images that it uses; before: what --resume goes on with."""
    from calibration_store import PARTIAL_FORMAT, run_identity, select_images, select_steps

    images = select_images(manifest, num_images, before and before["selected_image_ids"])
    image_ids = [image["image_id"] for image in images]
    return {
        "format": PARTIAL_FORMAT,
        "calibration_run": run_identity(manifest, image_ids),
        "num_images": num_images,
        "stride": stride,
        "selected_image_ids": image_ids,
        "key_timesteps": select_steps(manifest, stride),
    }, images


def passes_to_do(pipeline, paths, plan: dict, everything: bool) -> dict[int, list[int]]:
    """{image_id: steps} of the passes whose result is not on the disk, valid and of this model's layers."""
    from calibration_store import is_partial_complete
    from hooks import layer_slots

    channels = {name: parent[key].weight.shape[1] for name, (parent, key) in layer_slots(pipeline.mmdit).items()}
    return {
        image_id: [
            step
            for step in plan["key_timesteps"]
            if everything or not is_partial_complete(paths, image_id, step, channels)
        ]
        for image_id in plan["selected_image_ids"]
    }


def collect(
    pipeline, paths, manifest: dict, images: list[dict], todo: dict[int, list[int]], implementation: str, bar
) -> None:
    """Run the model at every sample of todo {image_id: steps}, and write the results."""
    from calibration_store import BackgroundWriter

    with bar, BackgroundWriter(pending=1) as writer:
        for image in images:
            if todo[image["image_id"]]:
                collect_image(pipeline, paths, manifest, image, todo[image["image_id"]], implementation, writer, bar)


def collect_image(pipeline, paths, manifest, image, steps, implementation, writer, bar) -> None:
    """The passes of one image: replay its stored latents under hooks."""
    from calibration_store import CalibrationPaths, read_sample
    from diffusion import replaying, run_schedule
    from hooks import hooked_layers

    calibration, schedule, image_id = CalibrationPaths(paths.calib_dir), run_schedule(manifest), image["image_id"]
    samples = [read_sample(calibration, manifest, image_id, step, schedule) for step in steps]
    with replaying(pipeline, image, [sample["timestep"] for sample in samples]) as replay:
        for step, sample in zip(steps, samples, strict=True):
            recorder = new_recorder(implementation)
            with hooked_layers(pipeline.mmdit, recorder.record):
                statistics = recorder.finish(replay.forward(sample["x"], sample["timestep"]))
            writer.submit(write_partial, paths, statistics, image_id, step, manifest["activation_dtype"])
            bar.update()


def write_statistics(paths, manifest: dict, plan: dict, sigmas: list[float]) -> None:
    """Merge the partial results of every step and write the stage's files, layer_statistics.json last."""
    import numpy as np

    from calibration_store import STATISTICS_FORMAT, write_json, write_npz
    from quantizers import HISTOGRAM_BINS

    steps, image_ids = plan["key_timesteps"], plan["selected_image_ids"]
    for step in steps:
        arrays, entries = merge_partials(StepPartials(paths, step, image_ids))
        write_npz(paths.step_arrays(str(step)), arrays | {"step_index": np.int32(step)})
        write_json(paths.step_index(str(step)), entries)
    statistics = {
        "format": STATISTICS_FORMAT,
        "hist_bins": HISTOGRAM_BINS,
        "timestep_dir": paths.timestep_stats.name,
        "step_keys": [str(step) for step in steps],
        "sigma_map": {str(step): sigmas[step] for step in steps},
        "shift_momentum": SHIFT_MOMENTUM,
        "post_gelu_suffix": POST_GELU_SUFFIX,
        "metadata": {
            "num_images": len(image_ids),
            "num_timesteps": len(steps),
            "total_processed": len(image_ids) * len(steps),
            "key_timesteps": steps,
            "selected_image_ids": image_ids,
            "stride": plan["stride"],
            "num_steps": manifest["num_steps"],
            "cfg_weight": manifest["cfg_scale"],
            "model_version": manifest["model_version"],
            "activation_dtype": manifest["activation_dtype"],
            "calibration_run": plan["calibration_run"],
            "weights_fingerprint": manifest["weights_fingerprint"],
        },
    }
    write_json(paths.statistics, statistics)


def probe_pass(pipeline, manifest: dict, image: dict, paths, step: int, implementation: str) -> tuple[float, int]:
    """Seconds of one pass with collection (the second of two) and the bytes of its partial result."""
    import time

    from calibration_store import CalibrationPaths, npz_bytes, read_sample
    from diffusion import replaying, run_schedule
    from hooks import hooked_layers

    sample = read_sample(CalibrationPaths(paths.calib_dir), manifest, image["image_id"], step, run_schedule(manifest))
    with replaying(pipeline, image, [sample["timestep"]]) as replay:
        for _ in range(2):
            start = time.perf_counter()
            recorder = new_recorder(implementation)
            with hooked_layers(pipeline.mmdit, recorder.record):
                statistics = recorder.finish(replay.forward(sample["x"], sample["timestep"]))
            seconds = time.perf_counter() - start
    return seconds, npz_bytes(partial_arrays(statistics, image["image_id"], step, manifest["activation_dtype"]))


@stage_command
@calib_dir_option
@model_place_options
@click.option(
    "--num-images", type=click.IntRange(min=1), default=5, help="Images to use, evenly over the whole calibration run."
)
@click.option("--stride", type=click.IntRange(min=1), default=2, help="Use every Nth saved step.")
@resume_options
def main(
    calib_dir: Path, model: str | None, local_checkpoint: Path | None, num_images: int, stride: int,
    resume: bool, force: bool, dry_run: bool,
) -> None:  # fmt: skip
    """Stage 2A: statistics of the input of every linear layer, per denoising step."""
    from calibration_store import (
        COLLECTION,
        ActivationPaths,
        check_stage,
        locked_folder,
        open_stage,
        plan_before,
        read_manifest,
        require_space,
    )

    manifest, paths = read_manifest(calib_dir), ActivationPaths(calib_dir)
    before = plan_before(paths.collection, COLLECTION, resume, num_images=num_images)
    plan, images = plan_collection(manifest, num_images, stride, before)
    passes = len(images) * len(plan["key_timesteps"])
    click.echo(
        f"{manifest['model_version']}: images {few(plan['selected_image_ids'])}, {len(plan['key_timesteps'])} steps each, "
        f"{passes} passes, {manifest['activation_dtype']}"
    )
    options = {"num_images": "--num-images", "stride": "--stride"}
    check_stage(paths, paths.collection, COLLECTION, plan, options, resume, force)
    pipeline, implementation = load_model(manifest, model, local_checkpoint)
    todo = passes_to_do(pipeline, paths, plan, everything=force)
    left = sum(map(len, todo.values()))
    seconds, size = probe_pass(pipeline, manifest, images[0], paths, plan["key_timesteps"][0], implementation)
    total = size * (left + STEP_FILE_SIZES * len(plan["key_timesteps"]))
    click.echo(
        f"to do: {left} of {passes} passes, about {format_seconds(seconds * left)} on this machine, "
        f"at most {format_bytes(total)} in {paths.root}"
    )
    require_space(paths.root, total)
    if dry_run:
        return
    with locked_folder(paths.root):
        check_stage(paths, paths.collection, COLLECTION, plan, options, resume, force)
        open_stage(paths, paths.collection, plan, force)
        bar = progress_bar(passes, "passes", "pass", initial=passes - left)
        try:
            collect(pipeline, paths, manifest, images, todo, implementation, bar)
            write_statistics(paths, manifest, plan, run_sigmas(manifest))
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted: finished passes are kept in {paths.partials}; go on with: {resume_command()}"
            ) from None
    click.echo(f"wrote {paths.statistics} and {paths.timestep_stats}/")


def load_model(manifest: dict, model: str | None, local_checkpoint: Path | None) -> tuple[Any, str]:
    """The run's pipeline, and which implementation of the statistics runs here."""
    from diffusion import load_run_pipeline

    pipeline = load_run_pipeline(manifest, None, model, local_checkpoint)
    return pipeline, choose_statistics()


def run_sigmas(manifest: dict) -> list[float]:
    """The noise levels of the run's steps."""
    from diffusion import run_schedule

    return run_schedule(manifest)[0]


if __name__ == "__main__":
    main()
