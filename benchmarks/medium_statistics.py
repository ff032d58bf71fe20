"""Random activation statistics of SD3-Medium's size: what analysis_speed.py gives to stages 3A and 3A'."""

from pathlib import Path

import numpy as np

from calibration_store.files import write_json
from calibration_store.histograms import histogram_edges, histogram_grid
from calibration_store.layout import ActivationPaths
from calibration_store.names import input_owner, is_post_gelu
from calibration_store.statistics import STATISTICS_FORMAT, write_step
from w4a8.analysis.clipping_ranges import absolute_histogram, histogram_percentile

BLOCKS, HIDDEN, STEPS = 24, 1536, 25
LINEARS = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.fc1", "mlp.fc2")


def layer_names() -> list[str]:
    """The 285 hooked layers of SD3-Medium; the last text block has only q, k and v."""
    names = [f"mm{i}.{stream}.{linear}" for i in range(BLOCKS) for stream in ("img", "txt") for linear in LINEARS]
    missing = {f"mm{BLOCKS - 1}.txt.{linear}" for linear in LINEARS[3:]}
    return [name for name in names if name not in missing]


def layer_arrays(random: np.random.Generator, name: str) -> tuple[dict[str, np.ndarray], dict]:
    """Random statistics of one layer: normal activations, a few wide channels; GELU's tail for fc2."""
    post_gelu = is_post_gelu(name)
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
        layers: dict[str, tuple[dict[str, np.ndarray], dict]] = {}
        for name in layer_names():  # q, k and v have one input
            layers[name] = layers.get(input_owner(name)) or layer_arrays(random, name)
        write_step(paths, int(key), layers)
    sigmas = {key: 1 - int(key) / (2 * STEPS) for key in keys}
    statistics = {"format": STATISTICS_FORMAT, "hist_bins": 256, "timestep_dir": "timestep_stats", "step_keys": keys}
    write_json(paths.statistics, statistics | {"sigma_map": sigmas, "metadata": {"num_images": 5}})
    return sum(path.stat().st_size for path in paths.owned_files())
