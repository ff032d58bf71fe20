"""What activation_sqnr.py measures: activations of images that the calibration never saw, and ways to quantize them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import click
import mlx.core as mx
import numpy as np

from calibration_store.names import is_post_gelu
from calibration_store.statistics import LayerStatistics
from w4a8.analysis.clipping_ranges import expected_sqnrs, unmigrated_clipping_ranges
from w4a8.model.catalog import describe_model
from w4a8.model.hooks import hooked_layers
from w4a8.model.parts import Pipeline
from w4a8.model.prompt_encoder import encode_prompts
from w4a8.model.prompts import draw_builtin_prompts
from w4a8.model.replay import replaying
from w4a8.model.sampling import euler_steps, initial_noise

TIERS = (4, 6, 8)


def held_out_images(manifest: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Entries like the manifest's for captions that the calibration did not use, with the finished latents' seeds."""
    used = {image["prompt"] for image in manifest["images"]}
    captions = draw_builtin_prompts(describe_model(manifest["model_version"]).captions, 1)
    unused = [caption for caption in captions if caption not in used]
    picked = np.random.default_rng(1).choice(len(unused), count, replace=False)
    template = manifest["images"][0]
    return [template | {"prompt": unused[index], "seed": 10_000 + i} for i, index in enumerate(picked)]


def activations(
    pipeline: Pipeline, manifest: Mapping[str, Any], image: dict[str, Any], steps: Sequence[int]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yield (step, {layer: (tokens, channels) float64}) of one freshly sampled image."""
    text = encode_prompts(pipeline, [image["prompt"]], image["cfg_weight"], image["negative_prompt"])
    noise = initial_noise(image["seed"], manifest["latent_size"]).astype(pipeline.activation_dtype)
    samples = {}
    with closing(euler_steps(pipeline, text, noise, manifest["num_steps"], image["cfg_weight"])) as states:
        for state in states:
            if state.step_index in steps:
                samples[state.step_index] = (np.array(state.x), np.array(state.timestep))
    with replaying(pipeline, image, [timestep for _, timestep in samples.values()]) as replay:
        for step, (x, timestep) in samples.items():
            caught: dict[str, mx.array] = {}
            with hooked_layers(pipeline.mmdit, caught.__setitem__):
                mx.eval(replay.forward(x, timestep), caught)
            yield step, {name: np.array(a, np.float64).reshape(-1, a.shape[-1]) for name, a in caught.items()}


def quantized(
    x: np.ndarray, scale: float, bits: int = 8, shift: np.ndarray | float = 0.0, multipliers: np.ndarray | int = 1
) -> np.ndarray:
    """x̂ (tokens, channels) from clipping range, shift and multipliers, as the README rebuilds it."""
    step = scale / (2 ** (bits - 1) - 1)
    levels = np.clip(np.rint((x - shift) / multipliers / step), -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1)
    return multipliers * step * levels + shift


def every_way(
    x: np.ndarray, entry: Mapping[str, Any], migration: Mapping[str, Any] | None, layer: LayerStatistics
) -> dict[str, np.ndarray]:
    """x̂ by each of the ways that are compared. entry, migration: what the config says of the layer."""
    multipliers = 1 if migration is None else np.array(migration["multiplier_vector"])
    shift = np.array(entry.get("shift", 0.0))
    shifted, plain = ranges_of(layer), ranges_of(replace(layer, shift=None))
    unmigrated = entry.get("unmigrated_clipping_range", entry["clipping_range"])
    ways = {
        "config": quantized(x, entry["clipping_range"], 8, shift, multipliers),
        "full range": quantized(x, layer.full_reach().max(), 8, shift),
        "scale": quantized(x, entry.get("shifted_scale", entry["scale"]), 8, shift),
        "no migration": quantized(x, unmigrated, 8, shift),
        "dynamic": quantized(x, np.abs(x - shift).max(), 8, shift),
        "dynamic, no shift": quantized(x, np.abs(x).max()),
    }
    for position, bits in enumerate(TIERS):
        ways[f"A{bits}"] = quantized(x, shifted[position], bits, shift)
        ways[f"A{bits}, no shift"] = quantized(x, plain[position], bits)
    return ways


def ranges_of(layer: LayerStatistics) -> np.ndarray:
    """Clipping ranges at every tier, as stage 3A' chooses them."""
    return unmigrated_clipping_ranges(layer.histogram, layer.shift, layer.full_reach(), layer.centred_power(), TIERS)


def report(
    power: Mapping[str, float], noise: Mapping[tuple[str, str], float], layers: Mapping[str, Mapping[str, LayerStatistics]],
    migrations: Mapping[str, Any],
) -> None:  # fmt: skip
    """Print the table. power by layer, noise by way and layer, layers by step and name."""
    names = list(power)
    sqnr = {
        way: np.array([10 * np.log10(power[name] / noise[way, name]) for name in names])
        for way in dict.fromkeys(way for way, _ in noise)
    }
    fc2 = np.array([is_post_gelu(name) for name in names])
    migrated = np.array([name in migrations for name in names])
    rows = (
        ("config − dynamic absmax, all layers", sqnr["config"] - sqnr["dynamic"]),
        ("config − full range, all layers", sqnr["config"] - sqnr["full range"]),
        ("`scale` as the range − dynamic absmax", sqnr["scale"] - sqnr["dynamic"]),
        ("config − no migration, migrated layers", (sqnr["config"] - sqnr["no migration"])[migrated]),
        *((f"fc2: shift − no shift, A{b}", (sqnr[f"A{b}"] - sqnr[f"A{b}, no shift"])[fc2]) for b in TIERS),
        ("fc2: shift − no shift, dynamic", (sqnr["dynamic"] - sqnr["dynamic, no shift"])[fc2]),
        *((f"expected − measured, A{bits}", expected(layers, names, bits) - sqnr[f"A{bits}"]) for bits in TIERS),
    )
    click.echo(f"SQNR in dB over {len(names)} layers{'':14} {'least':>8} {'median':>8} {'most':>8}")
    for title, values in (("config, all layers", sqnr["config"]), *rows):
        if values.size:
            click.echo(f"{title:45} {values.min():8.2f} {np.median(values):8.2f} {values.max():8.2f}")


def expected(layers: Mapping[str, Mapping[str, LayerStatistics]], names: Sequence[str], bits: int) -> np.ndarray:
    """Per layer, the SQNR that the calibration's histograms predict over all steps."""
    values = []
    for name in names:
        signal = error = 0.0
        for step in layers.values():
            layer = step[name]
            ranges = ranges_of(layer)[[TIERS.index(bits)]]
            ratio = 10 ** (expected_sqnrs(layer.counts, layer.edges, ranges, (bits,), layer.shift)[0] / 10)
            low, high = layer.edges[:-1], layer.edges[1:]
            mean_square = layer.counts @ (low * low + low * high + high * high) / 3 / layer.counts.sum()
            signal, error = signal + mean_square, error + mean_square / ratio
        values.append(10 * np.log10(signal / error))
    return np.array(values)
