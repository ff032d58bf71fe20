"""Stage 2A: statistics of the input of every linear layer in the blocks, per denoising step.

Reads   manifest.json and samples/ of stage 1 (--calib-dir); the model and its precision come from the manifest.
Writes  activations/layer_statistics.json and activations/timestep_stats/step_{key}.npz, step_{key}_index.json;
        activations/partial/ keeps the results per image and step, which is what --resume goes on from.

    python collect_layer_activations.py --calib-dir calibration_data
"""

import functools
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli_options import (
    Interrupted,
    calib_dir_option,
    format_bytes,
    format_seconds,
    progress_bar,
    resume_command,
    resume_options,
    stage_command,
)

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np

SHIFT_MOMENTUM = 0.95
POST_GELU_SUFFIX = ".mlp.fc2"
PARTIAL_MADE_BY = "collect_layer_activations.py"


# --- statistics of one input --------------------------------------------------------------------------------
#
# One input x (rows, channels) gives two arrays: limits (2, channels) float32, the minimum and the maximum of each
# channel, and histogram (259,) int32: 256 counts over quantizers.histogram_grid, then the grid's exponent, its
# first bin, and the number of values that are not finite. Three implementations, the same results: a GPU kernel
# (Metal or CUDA), NumPy and torch (CPU), and plain MLX operations. Where a GPU flushes subnormal numbers they count
# as 0.

KERNEL_HEADER = {
    "cuda": """
#define FUNCTION __device__ inline
#define SHARED __shared__
#define COUNTER unsigned int
#define ADD(counter, value) atomicAdd(&(counter), (unsigned int)(value))
#define SET(counter, value) (counter) = (value)
#define GET(counter) (counter)
#define BARRIER __syncthreads()
#define THREAD ((int)threadIdx.x)
#define GROUP_X ((int)blockIdx.x)
#define GROUP_Y ((int)blockIdx.y)
#define AS_FLOAT(bits) __int_as_float(bits)
#define AS_INT(value) __float_as_int(value)
""",
    "metal": """
#define FUNCTION inline
#define SHARED threadgroup
#define COUNTER atomic_uint
#define ADD(counter, value) atomic_fetch_add_explicit(&(counter), (uint)(value), memory_order_relaxed)
#define SET(counter, value) atomic_store_explicit(&(counter), (uint)(value), memory_order_relaxed)
#define GET(counter) atomic_load_explicit(&(counter), memory_order_relaxed)
#define BARRIER threadgroup_barrier(mem_flags::mem_threadgroup)
#define THREAD ((int)thread_position_in_threadgroup.x)
#define GROUP_X ((int)threadgroup_position_in_grid.x)
#define GROUP_Y ((int)threadgroup_position_in_grid.y)
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

# One group of 1024 threads takes 256 channels × TILE_ROWS rows, four rows at a time: reads them for the limits, then
# again, from the cache, for the histogram over the tile's own grid. x is read from memory once.
TILE_ROWS = 128
TILE_KERNEL = """
    const int rows = x_shape[0], channels = x_shape[1];
    const int channel = GROUP_X * 256 + THREAD % 256;
    const int first_row = GROUP_Y * TILE_ROWS + THREAD / 256;
    const int end_row = (GROUP_Y + 1) * TILE_ROWS < rows ? (GROUP_Y + 1) * TILE_ROWS : rows;
    const int tile = GROUP_Y * ((channels + 255) / 256) + GROUP_X;
    SHARED COUNTER histogram[8 * 256];
    SHARED COUNTER not_finite;
    SHARED float lows[1024];
    SHARED float highs[1024];
    SET(histogram[THREAD], 0);
    SET(histogram[THREAD + 1024], 0);
    if (THREAD == 0) SET(not_finite, 0);
    BARRIER;
    float low = 3.4e38f, high = -3.4e38f;
    int bad = 0;
    if (channel < channels) {
        for (int row = first_row; row < end_row; row += 4) {
            const float value = (float)x[(size_t)row * channels + channel];
            const bool good = is_finite(value);
            low = good && value < low ? value : low;
            high = good && value > high ? value : high;
            bad += good ? 0 : 1;
        }
    }
    if (bad > 0) ADD(not_finite, bad);
    lows[THREAD] = low;
    highs[THREAD] = high;
    BARRIER;
    for (int size = 512; size > 0; size /= 2) {
        if (THREAD < size) {
            lows[THREAD] = lows[THREAD + size] < lows[THREAD] ? lows[THREAD + size] : lows[THREAD];
            highs[THREAD] = highs[THREAD + size] > highs[THREAD] ? highs[THREAD + size] : highs[THREAD];
            if (size == 256 && channel < channels) {  // here index and channel agree
                tile_limits[((size_t)GROUP_Y * 2) * channels + channel] = lows[THREAD];
                tile_limits[((size_t)GROUP_Y * 2 + 1) * channels + channel] = highs[THREAD];
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
        tile_histogram[(size_t)tile * 259 + THREAD] = count;
    }
    if (THREAD == 0) {
        tile_histogram[(size_t)tile * 259 + 256] = exponent;
        tile_histogram[(size_t)tile * 259 + 257] = first_bin;
        tile_histogram[(size_t)tile * 259 + 258] = (int)GET(not_finite);
    }
"""

# Reduces the tiles: a group of 1024 threads as many channels; group 0 also merges the histograms, whose grids nest.
MERGE_KERNEL = """
    const int tile_rows = tile_limits_shape[0], channels = tile_limits_shape[2], tiles = tile_histogram_shape[0];
    SHARED COUNTER merged[256];
    SHARED COUNTER not_finite;
    SHARED float lows[1024];
    SHARED float highs[1024];
    float group_low = 3.4e38f, group_high = -3.4e38f;
    for (int channel = THREAD; channel < channels; channel += 1024) {
        if (GROUP_X != 0 && channel / 1024 != GROUP_X) continue;  // group 0 needs the limits of all channels
        float low = 3.4e38f, high = -3.4e38f;
        for (int row = 0; row < tile_rows; row++) {
            const float other_low = tile_limits[((size_t)row * 2) * channels + channel];
            const float other_high = tile_limits[((size_t)row * 2 + 1) * channels + channel];
            low = other_low < low ? other_low : low;
            high = other_high > high ? other_high : high;
        }
        group_low = low < group_low ? low : group_low;
        group_high = high > group_high ? high : group_high;
        if (channel / 1024 == GROUP_X) {
            limits[channel] = low;
            limits[channels + channel] = high;
        }
    }
    if (GROUP_X != 0) return;
    if (THREAD < 256) SET(merged[THREAD], 0);
    if (THREAD == 0) SET(not_finite, 0);
    lows[THREAD] = group_low < 0.0f ? group_low : 0.0f;
    highs[THREAD] = group_high > 0.0f ? group_high : 0.0f;
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
    for (int tile = THREAD / 256; tile < tiles; tile += 4) {
        const size_t start = (size_t)tile * 259;
        const int bin = THREAD % 256, count = tile_histogram[start + bin];
        const int shift = exponent - tile_histogram[start + 256];
        if (count > 0) ADD(merged[((tile_histogram[start + 257] + bin) >> shift) - first_bin], count);
        if (bin == 0 && tile_histogram[start + 258] > 0) ADD(not_finite, tile_histogram[start + 258]);
    }
    BARRIER;
    if (THREAD < 256) histogram[THREAD] = (int)GET(merged[THREAD]);
    if (THREAD == 0) {
        histogram[256] = exponent;
        histogram[257] = first_bin;
        histogram[258] = (int)GET(not_finite);
    }
"""


@functools.cache
def _gpu_kernels(backend: str) -> tuple[Callable, Callable]:
    import mlx.core as mx

    build = mx.fast.metal_kernel if backend == "metal" else mx.fast.cuda_kernel
    header = KERNEL_HEADER[backend] + f"#define TILE_ROWS {TILE_ROWS}\n" + KERNEL_FUNCTIONS
    tiles, merged = ["tile_limits", "tile_histogram"], ["limits", "histogram"]
    return (
        build(name="activation_tiles", input_names=["x"], output_names=tiles, source=TILE_KERNEL, header=header),
        build(name="activation_merge", input_names=tiles, output_names=merged, source=MERGE_KERNEL, header=header),
    )


def gpu_statistics(x: "mx.array", backend: str) -> list["mx.array"]:
    """[limits, histogram] of x (rows, channels), unevaluated, by the kernel of `backend` (metal or cuda)."""
    import mlx.core as mx

    tile_kernel, merge_kernel = _gpu_kernels(backend)
    rows, channels = x.shape
    columns, tile_rows = -(-channels // 256), -(-rows // TILE_ROWS)
    dtypes = [mx.float32, mx.int32]
    tiles = tile_kernel(
        inputs=[x],
        grid=(columns * 1024, tile_rows, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(tile_rows, 2, channels), (columns * tile_rows, 259)],
        output_dtypes=dtypes,
    )
    return merge_kernel(
        inputs=tiles,
        grid=(-(-channels // 1024) * 1024, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(2, channels), (259,)],
        output_dtypes=dtypes,
    )


def mlx_statistics(x: "mx.array") -> list["mx.array"]:
    """The plain twin: [limits, histogram] of x (rows, channels) from MLX operations alone, unevaluated."""
    import mlx.core as mx

    x = x.astype(mx.float32)
    finite = mx.isfinite(x)
    limits = mx.stack([mx.where(finite, x, 3.4e38).min(axis=0), mx.where(finite, x, -3.4e38).max(axis=0)])
    low, high = mx.minimum(limits[0].min(), 0.0), mx.maximum(limits[1].max(), 0.0)

    def power_of_two(exponent):
        return mx.view((exponent + 127) << 23, mx.float32)

    exponent = mx.maximum(((mx.view(high - low, mx.int32) >> 23) & 255) - 127 - 9, -24)
    for _ in range(4):  # the start is at most three too small
        bins = mx.floor(high * power_of_two(-exponent)) - mx.floor(low * power_of_two(-exponent))
        exponent = exponent + (bins > 255).astype(mx.int32)
    first_bin = mx.floor(low * power_of_two(-exponent)).astype(mx.int32)
    index = mx.floor(mx.where(finite, x, 0.0) * power_of_two(-exponent)).astype(mx.int32) - first_bin
    counts = mx.zeros((256,), dtype=mx.int32).at[index.reshape(-1)].add(finite.reshape(-1).astype(mx.int32))
    return [limits, mx.concatenate([counts, mx.stack([exponent, first_bin, (~finite).sum().astype(mx.int32)])])]


def cpu_statistics(x: "np.ndarray") -> list["np.ndarray"]:
    """[limits, histogram] of x (rows, channels) at C speed on a CPU: NumPy, and torch's faster bincount."""
    import numpy as np
    import torch

    from quantizers import histogram_grid

    x = x.astype(np.float32, copy=False)
    limits = np.stack([x.min(axis=0), x.max(axis=0)])
    histogram = np.zeros(259, np.int32)
    low, high = float(limits[0].min()), float(limits[1].max())  # NaN comes through
    if not (np.isfinite(low) and np.isfinite(high)):
        histogram[258] = np.count_nonzero(~np.isfinite(x))
        return [limits, histogram]
    exponent, first_bin = histogram_grid(low, high)
    bins = x * np.float32(2.0**-exponent)  # a power of two: exact
    np.floor(bins, out=bins)
    bins -= np.float32(first_bin)
    histogram[:256] = torch.bincount(torch.from_numpy(bins.astype(np.uint8).ravel()), minlength=256).numpy()
    histogram[256:258] = exponent, first_bin
    return [limits, histogram]


def choose_statistics() -> str:
    """Which implementation runs here: cpu, metal, cuda, or mlx when the GPU's kernel fails its self-check."""
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    backend = "metal" if mx.metal.is_available() else "cuda"
    failure = kernel_self_check(backend)
    if failure is None:
        return backend
    warnings.warn(f"the {backend} kernel failed its self-check ({failure}): using the slower MLX operations", stacklevel=2)
    return "mlx"


def kernel_self_check(backend: str) -> str | None:
    """Compare the GPU kernel with its twin on inputs with odd sizes; returns what went wrong, or None."""
    import mlx.core as mx

    try:
        for rows, channels, dtype in ((300, 259, mx.float32), (513, 512, mx.float16)):
            x = (mx.random.normal((rows, channels), key=mx.random.key(rows)) * 3).astype(dtype)
            for kernel, twin in zip(gpu_statistics(x, backend), mlx_statistics(x), strict=True):
                if not mx.array_equal(kernel, twin).item():
                    return "its results differ"
    except (RuntimeError, ValueError) as error:
        return " ".join(str(error).split())[:200]
    return None


# --- one forward pass ---------------------------------------------------------------------------------------


class LazyRecorder:
    """Adds the statistics to the graph of the pass; one `mx.eval` takes everything pending.

    Every EVERY inputs the GPU is set to work on what there is (`mx.async_eval` does not wait), so that it
    computes while Python builds the rest of the graph. Statistics come before the model's output, so each input
    is used up, and freed, soon after it is made, instead of living to the end of the pass.
    """

    EVERY = 8  # the distinct inputs of one block

    def __init__(self, implementation: str):
        self._compute = mlx_statistics if implementation == "mlx" else functools.partial(gpu_statistics, backend=implementation)
        self._layers: dict[str, int] = {}
        self._pending: list[list] = []
        self._last = None

    def record(self, name: str, x: "mx.array") -> None:
        import mlx.core as mx

        if x is not self._last:  # q, k and v get the same array
            self._pending.append(self._compute(x.reshape(-1, x.shape[-1])))
            self._last = x
            if len(self._pending) % self.EVERY == 0:
                mx.async_eval(self._pending[-self.EVERY :])
        self._layers[name] = len(self._pending) - 1

    def finish(self, output: "mx.array") -> tuple[dict[str, int], list[list]]:
        """Evaluate the pass; returns layer -> index of its input, and [limits, histogram] of every distinct input."""
        import mlx.core as mx

        self._last = None
        mx.eval(self._pending, output)
        return self._layers, self._pending


class StreamingRecorder:
    """For the CPU: hands each input to NumPy and torch while MLX's own thread computes the next ones.

    At most LOOKAHEAD inputs wait at a time, about those of one block. `mx.async_eval` only starts the work; the
    one blocking `mx.eval` of the pass is that of its output.
    """

    LOOKAHEAD = 6

    def __init__(self):
        self._layers: dict[str, int] = {}
        self._results: list[list] = []
        self._waiting: deque = deque()
        self._last = None

    def record(self, name: str, x: "mx.array") -> None:
        import mlx.core as mx

        if x is not self._last:
            mx.async_eval(x)
            self._waiting.append(x)
            self._last = x
            if len(self._waiting) > self.LOOKAHEAD:
                self._take_oldest()
        self._layers[name] = len(self._results) + len(self._waiting) - 1

    def _take_oldest(self) -> None:
        import numpy as np

        x = self._waiting.popleft()
        self._results.append(cpu_statistics(np.array(x, copy=False).reshape(-1, x.shape[-1])))

    def finish(self, output: "mx.array") -> tuple[dict[str, int], list[list["np.ndarray"]]]:
        """As LazyRecorder.finish."""
        import mlx.core as mx

        self._last = None
        while self._waiting:
            self._take_oldest()
        mx.eval(output)
        return self._layers, self._results


def new_recorder(implementation: str) -> LazyRecorder | StreamingRecorder:
    """A recorder for one pass."""
    return StreamingRecorder() if implementation == "cpu" else LazyRecorder(implementation)


def partial_arrays(layers: dict[str, int], results: list[list], where: str) -> dict[str, "np.ndarray"]:
    """One pass's statistics as the arrays of a partial file. Raises StoreError when an activation is not finite."""
    import numpy as np

    from calibration_store import StoreError

    limits = [np.asarray(result[0]) for result in results]
    histograms = np.stack([np.asarray(result[1]) for result in results])
    for name, index in layers.items():
        if histograms[index, 258]:
            raise StoreError(f"{name}: {histograms[index, 258]} activations are not finite at {where}; try --dtype float32 in stage 1")
    return {
        "layers": np.array(list(layers)),
        "inputs": np.array(list(layers.values()), np.int32),
        "channels": np.array([array.shape[1] for array in limits], np.int32),
        "limits": np.concatenate(limits, axis=1),
        "histograms": histograms,
    }


def write_partial(path: Path, layers: dict[str, int], results: list[list], where: str) -> None:
    """Write one pass's partial file; runs on the writer's thread while the next pass computes."""
    from calibration_store import write_npz

    write_npz(path, partial_arrays(layers, results, where))


# --- merging ------------------------------------------------------------------------------------------------


def merge_partials(partials: list[dict[str, "np.ndarray"]]) -> tuple[dict[str, "np.ndarray"], dict[str, dict]]:
    """Merge one step's partial results, in ascending image_id, into the arrays and the index of a step file.

    avg_min and avg_max are plain means over images; shift is the moving average of TaQ-DiT's per-channel centre
    (momentum 0.95, first image sets it); histograms add up on the finest grid that holds them all.
    """
    import numpy as np

    first = partials[0]
    starts = np.concatenate([[0], np.cumsum(first["channels"])])
    post_gelu = {int(i) for name, i in zip(first["layers"], first["inputs"], strict=True) if name.endswith(POST_GELU_SUFFIX)}
    total_min, total_max = (np.zeros(starts[-1], np.float64) for _ in range(2))
    shift = None
    for partial in partials:
        low, high = partial["limits"].astype(np.float64)
        total_min += low
        total_max += high
        centre = (low + high) / 2
        shift = centre if shift is None else SHIFT_MOMENTUM * shift + (1 - SHIFT_MOMENTUM) * centre
    avg_min, avg_max = (total / len(partials) for total in (total_min, total_max))
    inputs = []
    for index in range(len(first["channels"])):
        part = slice(starts[index], starts[index + 1])
        histogram = _merge_histograms(partials, index, part)
        inputs.append(_describe_input(avg_min[part], avg_max[part], shift[part] if index in post_gelu else None, *histogram))
    arrays, entries = {}, {}
    for name, index in zip(first["layers"], first["inputs"], strict=True):
        fields, entry = inputs[index]
        arrays |= {f"{name.replace('.', '_')}__{field}": array for field, array in fields.items()}
        entries[str(name)] = {"n_batches": len(partials), **entry}
    return arrays, entries


def _merge_histograms(partials, index: int, part: slice) -> tuple["np.ndarray", "np.ndarray"]:
    """Counts (256,) int64 and edges (257,) float64 of one input over all images."""
    from quantizers import histogram_edges, histogram_grid, regrid_histogram

    low = min(float(partial["limits"][0, part].min()) for partial in partials)
    high = max(float(partial["limits"][1, part].max()) for partial in partials)
    grid = histogram_grid(low, high)
    histograms = [partial["histograms"][index] for partial in partials]
    counts = sum(regrid_histogram(histogram[:256], histogram[256:258].tolist(), grid) for histogram in histograms)
    return counts, histogram_edges(*grid)


def _describe_input(avg_min, avg_max, shift, counts, edges) -> tuple[dict[str, "np.ndarray"], dict[str, Any]]:
    """The step file's arrays and index entry of one input."""
    import numpy as np

    from quantizers import absolute_histogram, histogram_percentile

    fields = {"avg_min": avg_min.astype(np.float32), "avg_max": avg_max.astype(np.float32)}
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


def plan_collection(root: Path, num_images: int, stride: int) -> tuple[dict[str, Any], dict[str, Any], list[dict]]:
    """The manifest, what this collection is (partial/collection.json), and the images that it uses."""
    from calibration_store import PARTIAL_FORMAT, read_manifest, run_identity, select_images, select_steps

    manifest = read_manifest(root)
    images = select_images(manifest, num_images)
    plan = {
        "format": PARTIAL_FORMAT,
        "calibration_run": run_identity(manifest),
        "num_images": num_images,
        "stride": stride,
        "selected_image_ids": [image["image_id"] for image in images],
        "key_timesteps": select_steps(manifest, stride),
    }
    return manifest, plan, images


def collect(pipeline, paths, manifest: dict, plan: dict, images: list[dict], implementation: str) -> None:
    """Run the model at every selected sample that has no partial result yet, and write that result."""
    from calibration_store import BackgroundWriter, is_partial_complete

    todo = {
        image["image_id"]: [step for step in plan["key_timesteps"] if not is_partial_complete(paths, image["image_id"], step)]
        for image in images
    }
    total = len(images) * len(plan["key_timesteps"])
    bar = progress_bar(total, "passes", "pass", initial=total - sum(map(len, todo.values())))
    with bar, BackgroundWriter(pending=1) as writer:
        for image in images:
            if todo[image["image_id"]]:
                collect_image(pipeline, paths, manifest, image, todo[image["image_id"]], implementation, writer, bar)


def collect_image(pipeline, paths, manifest, image, steps, implementation, writer, bar) -> None:
    """The passes of one image: replay its stored latents under hooks."""
    from calibration_store import CalibrationPaths, read_run_sample
    from diffusion import replaying, sigma_schedule
    from hooks import hooked_layers

    schedule = sigma_schedule(pipeline, manifest["num_steps"])[1].tolist()
    calibration = CalibrationPaths(paths.calib_dir)
    samples = [read_run_sample(calibration, manifest, image["image_id"], step, schedule) for step in steps]
    with replaying(pipeline, image, [sample["timestep"] for sample in samples]) as replay:
        for step, sample in zip(steps, samples, strict=True):
            recorder = new_recorder(implementation)
            with hooked_layers(pipeline.mmdit, recorder.record):
                layers, results = recorder.finish(replay.forward(sample["x"], sample["timestep"]))
            where = f"step {step} of image {image['image_id']}"
            writer.submit(write_partial, paths.partial(image["image_id"], step), layers, results, where)
            bar.update()


def write_statistics(paths, manifest: dict, plan: dict, sigmas: list[float]) -> None:
    """Merge the partial results of every step and write the stage's files, layer_statistics.json last."""
    from calibration_store import STATISTICS_FORMAT, read_partial, write_json, write_npz
    from quantizers import HISTOGRAM_BINS

    steps, image_ids = plan["key_timesteps"], plan["selected_image_ids"]
    for step in steps:
        arrays, entries = merge_partials([read_partial(paths, image_id, step) for image_id in image_ids])
        write_npz(paths.step_arrays(str(step)), arrays)
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
        },
    }
    write_json(paths.statistics, statistics)


def probe_pass(pipeline, manifest: dict, image: dict, paths, step: int, implementation: str) -> tuple[float, int]:
    """Seconds of one pass with collection (the second of two) and the bytes of its partial result."""
    import time

    from calibration_store import CalibrationPaths, npz_bytes, read_sample
    from diffusion import replaying
    from hooks import hooked_layers

    sample = read_sample(CalibrationPaths(paths.calib_dir), manifest, image["image_id"], step)
    with replaying(pipeline, image, [sample["timestep"]]) as replay:
        for _ in range(2):
            start = time.perf_counter()
            recorder = new_recorder(implementation)
            with hooked_layers(pipeline.mmdit, recorder.record):
                layers, results = recorder.finish(replay.forward(sample["x"], sample["timestep"]))
            seconds = time.perf_counter() - start
    return seconds, npz_bytes(partial_arrays(layers, results, f"step {step}"))


@stage_command
@calib_dir_option
@click.option("--num-images", type=click.IntRange(min=1), default=5, help="Images to use, evenly over the whole calibration run.")
@click.option("--stride", type=click.IntRange(min=1), default=2, help="Use every Nth saved step.")
@resume_options
def main(calib_dir: Path, num_images: int, stride: int, resume: bool, force: bool, dry_run: bool) -> None:
    """Stage 2A: statistics of the input of every linear layer, per denoising step."""
    from calibration_store import ActivationPaths, locked_folder, open_stage, require_space

    manifest, plan, images = plan_collection(calib_dir, num_images, stride)
    paths = ActivationPaths(calib_dir)
    passes = len(images) * len(plan["key_timesteps"])
    click.echo(
        f"{manifest['model_version']}: images {plan['selected_image_ids']}, {len(plan['key_timesteps'])} steps each, "
        f"{passes} passes, {manifest['activation_dtype']}"
    )
    options = {"num_images": "--num-images", "stride": "--stride"}
    if dry_run:
        open_stage(paths, paths.collection, plan, options, resume, force, write=False)
        pipeline, implementation = load_model(manifest)
        seconds, size = probe_pass(pipeline, manifest, images[0], paths, plan["key_timesteps"][0], implementation)
        total = size * (passes + 2 * len(plan["key_timesteps"]))
        click.echo(f"about {format_seconds(seconds * passes)} on this machine, at most {format_bytes(total)} in {paths.root}")
        require_space(paths.root, total)
        return
    with locked_folder(paths.root):
        open_stage(paths, paths.collection, plan, options, resume, force)
        pipeline, implementation = load_model(manifest)
        try:
            collect(pipeline, paths, manifest, plan, images, implementation)
            from diffusion import sigma_schedule

            write_statistics(paths, manifest, plan, sigma_schedule(pipeline, manifest["num_steps"])[0].tolist())
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted: finished passes are kept in {paths.partials}; go on with: {resume_command()}") from None
    click.echo(f"wrote {paths.statistics} and {paths.timestep_stats}/")


def load_model(manifest: dict) -> tuple[Any, str]:
    """The run's pipeline, and which implementation of the statistics runs here."""
    from diffusion import load_run_pipeline

    pipeline = load_run_pipeline(manifest)
    return pipeline, choose_statistics()


if __name__ == "__main__":
    main()
