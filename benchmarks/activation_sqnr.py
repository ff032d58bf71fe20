"""What the configs of stages 3A and 3A' are worth on real activations of images that the calibration never saw.

python benchmarks/activation_sqnr.py --calib-dir calibration_data/demo

Per layer, over held-out images and the calibrated steps: SQNR of A8 as quant_config.json says, beside dynamic A8
(the absolute maximum of each tensor itself); fc2 with and without shift; and the SQNR that the histograms predict.
"""

import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import orjson

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cli_options import calib_dir_option, draw_builtin_prompts, progress_bar, stage_command
from quantizers import expected_sqnrs, unmigrated_clipping_ranges

TIERS = (4, 6, 8)


def quantized(x: np.ndarray, scale, bits: int = 8, shift=0.0, multipliers=1) -> np.ndarray:
    """x̂ (tokens, channels) from clipping range, shift and multipliers, as the README rebuilds it."""
    step = scale / (2 ** (bits - 1) - 1)
    levels = np.clip(np.rint((x - shift) / multipliers / step), -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1)
    return multipliers * step * levels + shift


def held_out_images(manifest: dict, count: int) -> list[dict]:
    """Entries like the manifest's for captions that the calibration did not use, with the finished latents' seeds."""
    import diffusion

    used = {image["prompt"] for image in manifest["images"]}
    captions = draw_builtin_prompts(diffusion.describe_model(manifest["model_version"]).captions, 1)
    unused = [caption for caption in captions if caption not in used]
    picked = np.random.default_rng(1).choice(len(unused), count, replace=False)
    template = manifest["images"][0]
    return [template | {"prompt": unused[index], "seed": 10_000 + i} for i, index in enumerate(picked)]


def activations(pipeline, manifest: dict, image: dict, steps: list[int]):
    """Yield (step, {layer: (tokens, channels) float64}) of one freshly sampled image."""
    import contextlib

    import diffusion
    from hooks import hooked_layers

    text = diffusion.encode_prompts(pipeline, [image["prompt"]], image["cfg_weight"], image["negative_prompt"])
    noise = diffusion.initial_noise(image["seed"], manifest["latent_size"])
    samples = {}
    with contextlib.closing(
        diffusion.euler_steps(
            pipeline, text, noise.astype(pipeline.activation_dtype), manifest["num_steps"], image["cfg_weight"]
        )
    ) as states:
        for state in states:
            if state.step_index in steps:
                samples[state.step_index] = (np.array(state.x), np.array(state.timestep))
    with diffusion.replaying(pipeline, image, [timestep for _, timestep in samples.values()]) as replay:
        for step, (x, timestep) in samples.items():
            caught = {}
            with hooked_layers(pipeline.mmdit, caught.__setitem__):
                diffusion.mx.eval(replay.forward(x, timestep), caught)
            yield step, {name: np.array(a, np.float64).reshape(-1, a.shape[-1]) for name, a in caught.items()}


@stage_command
@calib_dir_option
@click.option("--num-images", type=click.IntRange(min=1), default=4, help="Held-out images.")
def main(calib_dir: Path, num_images: int) -> None:
    """SQNR of the configs on held-out activations."""
    import diffusion
    from calibration_store import ActivationPaths, read_manifest, read_statistics

    paths, manifest = ActivationPaths(calib_dir), read_manifest(calib_dir)
    config = orjson.loads(paths.quant_config.read_bytes())
    statistics = read_statistics(paths.statistics)
    layers = {key: statistics.read_step(key) for key in statistics.step_keys}
    pipeline = diffusion.load_run_pipeline(manifest)
    power, noise = defaultdict(float), defaultdict(float)
    bar = progress_bar(num_images, "images", "image")
    for image in held_out_images(manifest, num_images):
        for step, tensors in activations(pipeline, manifest, image, [int(key) for key in config["per_timestep"]]):
            for name, x in tensors.items():
                entry = config["per_timestep"][str(step)][name]
                shift = np.array(entry.get("shift", 0.0))
                multipliers = np.array(config["outlier_config"].get(name, {}).get("multiplier_vector", 1))
                layer = layers[str(step)][name]
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
                power[name] += (x * x).sum()
                for way, rebuilt in ways.items():
                    noise[way, name] += ((x - rebuilt) ** 2).sum()
        bar.update()
    bar.close()
    report(power, noise, layers, config)


def ranges_of(layer) -> np.ndarray:
    """Clipping ranges at every tier, as stage 3A' chooses them."""
    return unmigrated_clipping_ranges(layer.histogram, layer.shift, layer.full_reach(), layer.centred_power(), TIERS)


def report(power: dict, noise: dict, layers: dict, config: dict) -> None:
    """Print the table."""
    names = list(power)
    sqnr = {
        way: np.array([10 * np.log10(power[name] / noise[way, name]) for name in names])
        for way in dict.fromkeys(way for way, _ in noise)
    }
    fc2 = np.array([name.endswith(".mlp.fc2") for name in names])
    migrated = np.array([name in config["outlier_config"] for name in names])
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


def expected(layers: dict, names: list[str], bits: int) -> np.ndarray:
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


if __name__ == "__main__":
    main()
