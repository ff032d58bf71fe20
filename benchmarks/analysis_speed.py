"""Time, memory and file size of stages 3A and 3A' on statistics of SD3-Medium's size, each in a process of its own.

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

import click
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.figures import record
from calibration_store import STATISTICS_FORMAT, ActivationPaths, write_json, write_npz
from cli_options import format_bytes, stage_command
from quantizers import absolute_histogram, histogram_edges, histogram_grid, histogram_percentile

BLOCKS, HIDDEN, STEPS = 24, 1536, 25
LINEARS = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.fc1", "mlp.fc2")


def layer_names() -> list[str]:
    """The 285 hooked layers of SD3-Medium; the last text block has only q, k and v."""
    names = [f"mm{i}.{stream}.{linear}" for i in range(BLOCKS) for stream in ("img", "txt") for linear in LINEARS]
    missing = {f"mm{BLOCKS - 1}.txt.{linear}" for linear in LINEARS[3:]}
    return [name for name in names if name not in missing]


def layer_arrays(random: np.random.Generator, name: str) -> tuple[dict[str, np.ndarray], dict]:
    """Random statistics of one layer: normal activations, a few wide channels; GELU's tail for fc2."""
    post_gelu = name.endswith(".mlp.fc2")
    width = random.lognormal(0, 0.4, HIDDEN * (4 if post_gelu else 1))
    width[random.integers(width.size, size=3)] *= random.uniform(3, 9)
    high = (4 * width).astype(np.float32)
    low = np.full_like(high, -0.17) if post_gelu else -high * random.uniform(0.8, 1.2, high.size).astype(np.float32)
    values = random.choice(width, 40000) * random.normal(size=40000)
    values = np.clip(np.maximum(values, -0.17) if post_gelu else values, low.min(), high.max())
    grid = histogram_grid(float(low.min()), float(high.max()))
    edges = histogram_edges(*grid)
    counts = np.histogram(values, edges)[0] * 80
    fields = {
        "avg_min": low,
        "avg_max": high,
        "min": low,
        "max": high,
        "mean": np.zeros_like(high) if not post_gelu else (width * 0.3).astype(np.float32),
        "mean_square": np.square(width).astype(np.float32),
        "hist_counts": counts.astype(np.int64),
        "hist_edges": edges,
    }
    entry = {"n_batches": 5, "tensor_absmax": float(max(high.max(), -low.min()))}
    entry |= {"tensor_min": float(low.min()), "tensor_max": float(high.max()), "has_hist": True, "has_shift": post_gelu}
    entry["hist_p999"] = histogram_percentile(*absolute_histogram(counts, edges), 0.999)
    if post_gelu:
        fields["shift"] = (low + high) / 2
        entry["shift_absmax"] = float(np.abs(fields["shift"]).max())
        entry["shifted_absmax"] = float((high - fields["shift"]).max())
    return fields, entry


def write_medium_statistics(calib_dir: Path, seed: int = 0) -> int:
    """Write statistics of 25 steps × 285 layers; returns their bytes."""
    paths = ActivationPaths(calib_dir)
    random = np.random.default_rng(seed)
    keys = [str(step) for step in range(0, 2 * STEPS, 2)]
    for key in keys:
        arrays, index = {}, {}
        for name in layer_names():
            if not name.endswith((".k_proj", ".v_proj")):  # q, k and v have one input
                fields, entry = layer_arrays(random, name)
            index[name] = entry
            arrays |= {f"{name.replace('.', '_')}__{field}": array for field, array in fields.items()}
        write_npz(paths.step_arrays(key), arrays)
        write_json(paths.step_index(key), index)
    sigmas = {key: 1 - int(key) / (2 * STEPS) for key in keys}
    statistics = {"format": STATISTICS_FORMAT, "hist_bins": 256, "timestep_dir": "timestep_stats", "step_keys": keys}
    write_json(paths.statistics, statistics | {"sigma_map": sigmas, "metadata": {"num_images": 5}})
    return sum(path.stat().st_size for path in paths.owned_files())


def measure(arguments: list[str]) -> tuple[float, int]:
    """(seconds, peak resident bytes) of a stage's process; raises CalledProcessError when it fails."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@stage_command
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Keep the statistics in this folder.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, help="Runs of each; the median is printed.")
def main(keep: Path | None, repeats: int) -> None:
    """Stages 3A and 3A' on statistics of SD3-Medium's size."""
    with contextlib.ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        size = write_medium_statistics(folder)
        click.echo(f"statistics: {len(layer_names())} layers × {STEPS} steps, {format_bytes(size)}")
        paths = ActivationPaths(folder)
        for arguments, output in (
            (["analyze_activations.py"], paths.quant_config),
            (["analyze_activations.py", "--use-hist-p999"], paths.quant_config),
            (["analyze_activations_multitier.py"], paths.multitier_config),
            (["analyze_activations_multitier.py", "--policy", "sqnr", "--average-bits", "6"], paths.multitier_config),
        ):
            runs = sorted(measure([*arguments, "--calib-dir", str(folder)]) for _ in range(repeats))
            seconds, peak = runs[len(runs) // 2]
            written = format_bytes(output.stat().st_size)
            name, bounds = (
                " ".join(arguments),
                (3, 400, 90) if arguments[0] == "analyze_activations.py" else (2, 400, None),
            )
            record(f"{name}: time", seconds, bounds[0], "s")
            record(f"{name}: peak memory", peak / 1e6, bounds[1], "MB")
            record(f"{name}: JSON", output.stat().st_size / 1e6, bounds[2], "MB")
            click.echo(f"{' '.join(arguments):65} {seconds:5.2f} s  {format_bytes(peak)} peak  {written} of JSON")


if __name__ == "__main__":
    main()
