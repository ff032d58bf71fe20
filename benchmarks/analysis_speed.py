"""Measure time, memory and file size of stages 3A and 3A' on statistics of SD3-Medium's size, each in a process of its own.

python benchmarks/analysis_speed.py                       # makes the statistics in a temporary folder (250 MB)
python benchmarks/analysis_speed.py --keep /tmp/medium    # and keeps them, --calib-dir of the analyzers
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.figures import record
from calibration_store.files import write_json
from calibration_store.histograms import histogram_edges, histogram_grid
from calibration_store.layout import ActivationPaths
from calibration_store.names import input_owner, is_post_gelu
from calibration_store.statistics import STATISTICS_FORMAT, write_step
from w4a8.analysis.clipping_ranges import absolute_histogram, histogram_percentile
from w4a8.cli import format_bytes, stage_command

ROOT = Path(__file__).resolve().parent.parent
BLOCKS, HIDDEN, STEPS = 24, 1536, 25
LINEARS = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.fc1", "mlp.fc2")


@stage_command
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Keep the statistics in this folder.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, help="Runs of each; the median is printed.")
@click.option("--blocks", type=click.IntRange(min=1), default=BLOCKS, help="Blocks of the model.")
@click.option("--steps", type=click.IntRange(min=1), default=STEPS, help="Steps of the statistics.")
def main(keep: Path | None, repeats: int, blocks: int, steps: int) -> None:
    """Measure stages 3A and 3A' on statistics of SD3-Medium's size."""
    with contextlib.ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        size = write_medium_statistics(folder, blocks, steps)
        click.echo(f"statistics: {len(layer_names(blocks))} layers × {steps} steps, {format_bytes(size)}")
        paths = ActivationPaths(folder)
        for arguments, output, bounds in (
            (["analyze_activations.py"], paths.quant_config, (3, 400, 90)),
            (["analyze_activations.py", "--use-hist-p999"], paths.quant_config, (3, 400, 90)),
            (["analyze_activations_multitier.py"], paths.multitier_config, (2, 400, None)),
            (["analyze_activations_multitier.py", "--policy", "sqnr", "--average-bits", "6"], paths.multitier_config, (2, 400, None)),
        ):  # fmt: skip
            runs = sorted(measure([*arguments, "--calib-dir", str(folder)]) for _ in range(repeats))
            seconds, peak = runs[len(runs) // 2]
            name, written = " ".join(arguments), output.stat().st_size
            record(f"{name}: time", seconds, bounds[0], "s")
            record(f"{name}: peak memory", peak / 1e6, bounds[1], "MB")
            record(f"{name}: JSON", written / 1e6, bounds[2], "MB")
            click.echo(f"{name:65} {seconds:5.2f} s  {format_bytes(peak)} peak  {format_bytes(written)} of JSON")


def measure(arguments: list[str]) -> tuple[float, int]:
    """Run a stage, and return the seconds and the peak resident bytes of its process. Raises CalledProcessError."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def layer_names(blocks: int) -> list[str]:
    """Return the hooked layers of a model, 285 for SD3-Medium; the last text block has only q, k and v."""
    names = [f"mm{i}.{stream}.{linear}" for i in range(blocks) for stream in ("img", "txt") for linear in LINEARS]
    missing = {f"mm{blocks - 1}.txt.{linear}" for linear in LINEARS[3:]}
    return [name for name in names if name not in missing]


def layer_arrays(random: np.random.Generator, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return random statistics of one layer: normal activations, a few wide channels; GELU's tail for fc2."""
    post_gelu = is_post_gelu(name)
    width = random.lognormal(0, 0.4, HIDDEN * (4 if post_gelu else 1))
    width[random.integers(width.size, size=3)] *= random.uniform(3, 9)
    high = (4 * width).astype(np.float32)
    low = np.full_like(high, -0.17) if post_gelu else -high * random.uniform(0.8, 1.2, high.size).astype(np.float32)
    values = random.choice(width, 40000) * random.normal(size=40000)
    values = np.clip(np.maximum(values, -0.17) if post_gelu else values, low.min(), high.max())
    edges = histogram_edges(*histogram_grid(float(low.min()), float(high.max())))
    counts = np.histogram(values, edges)[0] * 80
    fields: dict[str, np.ndarray] = {
        "avg_min": low,
        "avg_max": high,
        "min": low,
        "max": high,
        "mean": np.zeros_like(high) if not post_gelu else (width * 0.3).astype(np.float32),
        "mean_square": np.square(width).astype(np.float32),
        "hist_counts": counts.astype(np.int64),
        "hist_edges": edges,
    }
    entry: dict[str, Any] = {"n_batches": 5, "tensor_absmax": float(max(high.max(), -low.min()))}
    entry |= {"tensor_min": float(low.min()), "tensor_max": float(high.max()), "has_hist": True, "has_shift": post_gelu}
    entry["hist_p999"] = histogram_percentile(*absolute_histogram(counts, edges), 0.999)
    if post_gelu:
        shift = fields["shift"] = (low + high) / 2
        entry |= {"shift_absmax": float(np.abs(shift).max()), "shifted_absmax": float((high - shift).max())}
    return fields, entry


def write_medium_statistics(calib_dir: Path, blocks: int = BLOCKS, steps: int = STEPS) -> int:
    """Write random statistics of every layer at every step; return their bytes."""
    paths, random = ActivationPaths(calib_dir), np.random.default_rng(0)
    keys = [str(step) for step in range(0, 2 * steps, 2)]
    for key in keys:
        layers: dict[str, tuple[dict[str, np.ndarray], dict[str, Any]]] = {}
        for name in layer_names(blocks):  # q, k and v have one input
            layers[name] = layers.get(input_owner(name)) or layer_arrays(random, name)
        write_step(paths, int(key), layers)
    sigmas = {key: 1 - int(key) / (2 * steps) for key in keys}
    statistics = {"format": STATISTICS_FORMAT, "hist_bins": 256, "timestep_dir": "timestep_stats", "step_keys": keys}
    write_json(paths.statistics, statistics | {"sigma_map": sigmas, "metadata": {"num_images": 5}})
    return sum(path.stat().st_size for path in paths.owned_files())


if __name__ == "__main__":
    main()
