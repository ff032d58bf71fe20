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
# One input x (rows, channels) gives: min and max per channel (channels,) float32, counts (256,) over the grid of
# quantizers.histogram_grid, and info (3,) int32 = (exponent, first bin, number of values that are not finite).
# Three implementations, the same results: a GPU kernel (Metal or CUDA), NumPy (CPU), and plain MLX operations.
# Subnormal numbers count as 0 where a GPU flushes them.

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

# One group takes 256 channels × TILE_ROWS rows: reads them for min and max, then again, from the cache, for the
# histogram over the tile's own grid. x is read from memory once.
TILE_ROWS = 256
TILE_KERNEL = """
    const int rows = x_shape[0], channels = x_shape[1];
    const int channel = GROUP_X * 256 + THREAD;
    const int first_row = GROUP_Y * TILE_ROWS;
    const int last_row = first_row + TILE_ROWS < rows ? first_row + TILE_ROWS : rows;
    const int tile = GROUP_Y * ((channels + 255) / 256) + GROUP_X;
    SHARED COUNTER histogram[4 * 256];
    SHARED float lows[256];
    SHARED float highs[256];
    SHARED int bad[256];
    for (int copy = 0; copy < 4; copy++) SET(histogram[copy * 256 + THREAD], 0);
    float low = 3.4e38f, high = -3.4e38f;
    int not_finite = 0;
    if (channel < channels) {
        for (int row = first_row; row < last_row; row++) {
            const float value = (float)x[(size_t)row * channels + channel];
            if (is_finite(value)) {
                low = value < low ? value : low;
                high = value > high ? value : high;
            } else {
                not_finite++;
            }
        }
        tile_min[(size_t)GROUP_Y * channels + channel] = low;
        tile_max[(size_t)GROUP_Y * channels + channel] = high;
    }
    lows[THREAD] = low < 0.0f ? low : 0.0f;
    highs[THREAD] = high > 0.0f ? high : 0.0f;
    bad[THREAD] = not_finite;
    BARRIER;
    for (int half_size = 128; half_size > 0; half_size /= 2) {
        if (THREAD < half_size) {
            lows[THREAD] = lows[THREAD + half_size] < lows[THREAD] ? lows[THREAD + half_size] : lows[THREAD];
            highs[THREAD] = highs[THREAD + half_size] > highs[THREAD] ? highs[THREAD + half_size] : highs[THREAD];
            bad[THREAD] += bad[THREAD + half_size];
        }
        BARRIER;
    }
    const int exponent = grid_exponent(lows[0], highs[0]);
    const float inverse_width = power_of_two(-exponent);
    const int first_bin = (int)floor(lows[0] * inverse_width);
    const int copy_start = (THREAD / 32 % 4) * 256;
    if (channel < channels) {
        for (int row = first_row; row < last_row; row++) {
            const float value = (float)x[(size_t)row * channels + channel];
            if (is_finite(value)) ADD(histogram[copy_start + (int)floor(value * inverse_width) - first_bin], 1);
        }
    }
    BARRIER;
    tile_counts[(size_t)tile * 256 + THREAD] =
        GET(histogram[THREAD]) + GET(histogram[256 + THREAD]) + GET(histogram[512 + THREAD]) + GET(histogram[768 + THREAD]);
    if (THREAD == 0) {
        tile_range[tile * 2] = lows[0];
        tile_range[tile * 2 + 1] = highs[0];
        tile_bad[tile] = bad[0];
    }
"""

# Reduces the tiles: every group its 256 channels; group 0 also merges the histograms, which nest (quantizers).
MERGE_KERNEL = """
    const int tile_rows = tile_min_shape[0], channels = tile_min_shape[1], tiles = tile_bad_shape[0];
    const int channel = GROUP_X * 256 + THREAD;
    if (channel < channels) {
        float low = tile_min[channel], high = tile_max[channel];
        for (int row = 1; row < tile_rows; row++) {
            const float other_low = tile_min[(size_t)row * channels + channel];
            const float other_high = tile_max[(size_t)row * channels + channel];
            low = other_low < low ? other_low : low;
            high = other_high > high ? other_high : high;
        }
        channel_min[channel] = low;
        channel_max[channel] = high;
    }
    if (GROUP_X == 0) {
        SHARED COUNTER histogram[256];
        SHARED float lows[256];
        SHARED float highs[256];
        SHARED int bad[256];
        SET(histogram[THREAD], 0);
        float low = 0.0f, high = 0.0f;
        int not_finite = 0;
        for (int tile = THREAD; tile < tiles; tile += 256) {
            low = tile_range[tile * 2] < low ? tile_range[tile * 2] : low;
            high = tile_range[tile * 2 + 1] > high ? tile_range[tile * 2 + 1] : high;
            not_finite += tile_bad[tile];
        }
        lows[THREAD] = low;
        highs[THREAD] = high;
        bad[THREAD] = not_finite;
        BARRIER;
        for (int half_size = 128; half_size > 0; half_size /= 2) {
            if (THREAD < half_size) {
                lows[THREAD] = lows[THREAD + half_size] < lows[THREAD] ? lows[THREAD + half_size] : lows[THREAD];
                highs[THREAD] = highs[THREAD + half_size] > highs[THREAD] ? highs[THREAD + half_size] : highs[THREAD];
                bad[THREAD] += bad[THREAD + half_size];
            }
            BARRIER;
        }
        const int exponent = grid_exponent(lows[0], highs[0]);
        const int first_bin = (int)floor(lows[0] * power_of_two(-exponent));
        for (int tile = 0; tile < tiles; tile++) {
            const unsigned int count = tile_counts[(size_t)tile * 256 + THREAD];
            if (count > 0) {
                const int tile_exponent = grid_exponent(tile_range[tile * 2], tile_range[tile * 2 + 1]);
                const int tile_first = (int)floor(tile_range[tile * 2] * power_of_two(-tile_exponent));
                ADD(histogram[((tile_first + THREAD) >> (exponent - tile_exponent)) - first_bin], count);
            }
        }
        BARRIER;
        counts[THREAD] = GET(histogram[THREAD]);
        if (THREAD == 0) {
            info[0] = exponent;
            info[1] = first_bin;
            info[2] = bad[0];
        }
    }
"""


@functools.cache
def _gpu_kernels(backend: str) -> tuple[Callable, Callable]:
    import mlx.core as mx

    build = mx.fast.metal_kernel if backend == "metal" else mx.fast.cuda_kernel
    header = KERNEL_HEADER[backend] + f"#define TILE_ROWS {TILE_ROWS}\n" + KERNEL_FUNCTIONS
    tiles = ["tile_min", "tile_max", "tile_counts", "tile_range", "tile_bad"]
    return (
        build(name="activation_tiles", input_names=["x"], output_names=tiles, source=TILE_KERNEL, header=header),
        build(
            name="activation_merge",
            input_names=tiles,
            output_names=["channel_min", "channel_max", "counts", "info"],
            source=MERGE_KERNEL,
            header=header,
        ),
    )


def gpu_statistics(x: "mx.array", backend: str) -> list["mx.array"]:
    """[min, max, counts, info] of x (rows, channels), unevaluated, by the kernel of `backend` (metal or cuda)."""
    import mlx.core as mx

    tile_kernel, merge_kernel = _gpu_kernels(backend)
    rows, channels = x.shape
    columns, tile_rows = -(-channels // 256), -(-rows // TILE_ROWS)
    tiles = tile_kernel(
        inputs=[x],
        grid=(columns * 256, tile_rows, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(tile_rows, channels), (tile_rows, channels), (columns * tile_rows, 256), (columns * tile_rows, 2), (columns * tile_rows,)],
        output_dtypes=[mx.float32, mx.float32, mx.uint32, mx.float32, mx.int32],
    )  # fmt: skip
    return merge_kernel(
        inputs=tiles,
        grid=(columns * 256, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(channels,), (channels,), (256,), (3,)],
        output_dtypes=[mx.float32, mx.float32, mx.uint32, mx.int32],
    )


def mlx_statistics(x: "mx.array") -> list["mx.array"]:
    """The plain twin: [min, max, counts, info] of x (rows, channels) from MLX operations alone, unevaluated."""
    import mlx.core as mx

    x = x.astype(mx.float32)
    finite = mx.isfinite(x)
    channel_min = mx.where(finite, x, 3.4e38).min(axis=0)
    channel_max = mx.where(finite, x, -3.4e38).max(axis=0)
    low, high = mx.minimum(channel_min.min(), 0.0), mx.maximum(channel_max.max(), 0.0)

    def power_of_two(exponent):
        return mx.view((exponent + 127) << 23, mx.float32)

    exponent = mx.maximum(((mx.view(high - low, mx.int32) >> 23) & 255) - 127 - 9, -24)
    for _ in range(4):  # the start is at most four too small
        bins = mx.floor(high * power_of_two(-exponent)) - mx.floor(low * power_of_two(-exponent))
        exponent = exponent + (bins > 255).astype(mx.int32)
    first_bin = mx.floor(low * power_of_two(-exponent)).astype(mx.int32)
    index = mx.floor(mx.where(finite, x, 0.0) * power_of_two(-exponent)).astype(mx.int32) - first_bin
    counts = mx.zeros((256,), dtype=mx.uint32).at[index.reshape(-1)].add(finite.reshape(-1).astype(mx.uint32))
    return [channel_min, channel_max, counts, mx.stack([exponent, first_bin, (~finite).sum().astype(mx.int32)])]


def numpy_statistics(x: "np.ndarray") -> list["np.ndarray"]:
    """[min, max, counts, info] of x (rows, channels) at C speed on a CPU."""
    import numpy as np

    from quantizers import histogram_grid

    x = x.astype(np.float32, copy=False)
    channel_min, channel_max = x.min(axis=0), x.max(axis=0)
    low, high = float(channel_min.min()), float(channel_max.max())  # NaN comes through
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = int(np.count_nonzero(~np.isfinite(x)))
        return [channel_min, channel_max, np.zeros(256, np.uint32), np.array([0, 0, bad], np.int32)]
    exponent, first_bin = histogram_grid(low, high)
    bins = x * np.float32(2.0**-exponent)  # a power of two: exact
    np.floor(bins, out=bins)
    bins -= np.float32(first_bin)
    counts = np.bincount(bins.astype(np.uint8).ravel(), minlength=256)
    return [channel_min, channel_max, counts.astype(np.uint32), np.array([exponent, first_bin, 0], np.int32)]


def choose_statistics() -> str:
    """Which implementation runs here: numpy, metal, cuda, or mlx when the GPU's kernel fails its self-check."""
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.cpu):
        return "numpy"
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

    Statistics come before the model's output in that call: each input is then used up, and freed, soon after it
    is made, instead of living to the end of the pass.
    """

    def __init__(self, implementation: str):
        self._compute = mlx_statistics if implementation == "mlx" else functools.partial(gpu_statistics, backend=implementation)
        self._layers: dict[str, int] = {}
        self._pending: list[list] = []
        self._last = None

    def record(self, name: str, x: "mx.array") -> None:
        if x is not self._last:  # q, k and v get the same array
            self._pending.append(self._compute(x.reshape(-1, x.shape[-1])))
            self._last = x
        self._layers[name] = len(self._pending) - 1

    def finish(self, output: "mx.array") -> tuple[dict[str, int], list[list["np.ndarray"]]]:
        """Evaluate the pass; returns layer -> index of its input, and the statistics of every distinct input."""
        import mlx.core as mx
        import numpy as np

        self._last = None
        mx.eval(self._pending, output)
        return self._layers, [[np.array(array) for array in result] for result in self._pending]


class StreamingRecorder:
    """For the CPU: hands each input to NumPy while MLX's own thread computes the next ones.

    At most LOOKAHEAD inputs wait at a time, about those of one block. `mx.async_eval` only starts the work; the
    one blocking `mx.eval` of the pass is that of its output.
    """

    LOOKAHEAD = 6

    def __init__(self, implementation: str = "numpy"):
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
        self._results.append(numpy_statistics(np.array(x, copy=False).reshape(-1, x.shape[-1])))

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
    return StreamingRecorder() if implementation == "numpy" else LazyRecorder(implementation)


def partial_arrays(layers: dict[str, int], results: list[list["np.ndarray"]], where: str) -> dict[str, "np.ndarray"]:
    """One pass's statistics as the arrays of a partial file. Raises StoreError when an activation is not finite."""
    import numpy as np

    from calibration_store import StoreError

    for name, index in layers.items():
        if results[index][3][2]:
            raise StoreError(f"{name}: {results[index][3][2]} activations are not finite at {where}; try --dtype float32 in stage 1")
    mins, maxs, counts, infos = zip(*results, strict=True)
    return {
        "layers": np.array(list(layers)),
        "inputs": np.array(list(layers.values()), np.int32),
        "channels": np.array([len(array) for array in mins], np.int32),
        "min": np.concatenate(mins),
        "max": np.concatenate(maxs),
        "counts": np.stack(counts),
        "grids": np.stack(infos)[:, :2],
    }


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
        total_min += partial["min"]
        total_max += partial["max"]
        centre = (partial["min"].astype(np.float64) + partial["max"]) / 2
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

    low = min(float(partial["min"][part].min()) for partial in partials)
    high = max(float(partial["max"][part].max()) for partial in partials)
    grid = histogram_grid(low, high)
    counts = sum(regrid_histogram(partial["counts"][index], tuple(partial["grids"][index]), grid) for partial in partials)
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
    from calibration_store import CalibrationPaths, read_run_sample, write_npz
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
            arrays = partial_arrays(layers, results, f"step {step} of image {image['image_id']}")
            writer.submit(write_npz, paths.partial(image["image_id"], step), arrays)
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
