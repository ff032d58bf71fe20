"""Other people's ways to 4 bits beside stage 3W's, on the same cached samples: PSNR of the same unseen captions and seeds.

    python benchmarks/peers.py --calib-dir calibration_data/demo --iters 400

Reads stages 1 and 2W (--boundaries ends or all); writes nothing. Each learned way gets the same iterations of the same batches.
Small models (the whole of them is trained at once). Biases and what is not a block's linear layer stay as they are, but for DWQ and ours.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from w4a8.cli import calib_dir_option, format_seconds, progress_bar, stage_command

BITS, SEARCHED = 4, 20  # AWQ tries so many exponents
GRAM_SAMPLES = 256


@stage_command
@calib_dir_option
@click.option("--iters", type=click.IntRange(min=10), default=400, help="Iterations of the ways that learn.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, help="Samples per iteration.")
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), default="64", help="Inputs that share a scale.")
@click.option("--num-images", type=click.IntRange(min=1), default=64, help="Unseen captions to draw.")
def main(calib_dir: Path, iters: int, batch_size: int, group_size: str, num_images: int) -> None:
    """Nearest, mx.quantize, AWQ, GPTQ, DWQ and stage 3W on the same data."""
    from w4a8.rounding.settings import Settings

    settings = Settings(iters, batch_size, BITS, 0, int(group_size), "ste", 0.0, 4e-3, 5e-3, 0.01, 0, batch_size)
    compare(calib_dir, settings, num_images)


def compare(calib_dir: Path, settings, num_images: int) -> None:
    """Quantize in every way, draw with each, print the table."""
    import mlx.core as mx

    from calibration_store.block_cache import read_cache_metadata
    from calibration_store.layout import WeightPaths
    from calibration_store.manifest import read_manifest
    from w4a8.model.layers import model_blocks
    from w4a8.model.runs import run_schedule, run_transformer
    from w4a8.rounding.run import Rounding
    from w4a8.rounding.settings import spread_over

    manifest, cache = read_manifest(calib_dir), read_cache_metadata(calib_dir)
    opened, (schedule, _) = run_transformer(manifest), run_schedule(manifest)
    mmdit = opened()
    rounding = Rounding(
        opened, mmdit, WeightPaths(calib_dir), cache, schedule, settings, "model", list(model_blocks(mmdit))
    )
    samples = rounding.whole_samples()
    unit = rounding.unit_class(mmdit, rounding.jobs[0], rounding.jobs[0].parts[0], samples, settings)
    grams: dict[str, mx.array] = {}
    chosen = spread_over(samples.training, GRAM_SAMPLES)
    for seen in unit.watch(list(dict.fromkeys(unit.input_of.values())), chosen):
        grams = {name: grams.get(name, 0) + x.T @ x for name, x in seen.items()}
        mx.eval(grams)
    ways, seconds = {}, {}
    for name, make in {
        "nearest": nearest, "mx.quantize": mlx_quantize, "AWQ, scaling": awq, "GPTQ": gptq, "DWQ, scales only": scales_only, "3W": ours,
    }.items():  # fmt: skip
        start = time.perf_counter()
        ways[name] = make(unit, grams)
        mx.eval([array for pair in ways[name].values() for array in pair if array is not None])
        seconds[name] = time.perf_counter() - start
        click.echo(f"{name}: {format_seconds(seconds[name])}")
    figures = drawn(manifest, ways, num_images)
    click.echo(f"{'':18} {'seconds':>8} {'PSNR':>8} {'worst':>7} {'FLIP':>7}")
    for name, row in figures.items():
        flip = row["flip"]["mean"]
        shown = "–" if flip is None else f"{flip:.4f}"
        click.echo(
            f"{name:18} {seconds[name]:8.1f} {row['psnr']['mean']:6.1f}dB {row['psnr']['worst']:7.1f} {shown:>7}"
        )


# --- ways: a unit and XXᵀ of every input -> {layer: (dense weight, bias or None)} ----------------------------


def nearest(unit, grams):
    """Round to nearest on a min-max grid."""
    return {name: (layer.as_mlx().weight, unit.biases.get(name)) for name, layer in unit.nearest.items()}


def mlx_quantize(unit, grams):
    """MLX's own."""
    import mlx.core as mx

    group = unit.settings.group_size

    def dense(weight):
        codes, scales, biases = mx.quantize(weight.astype(mx.float16), group, BITS)
        return mx.dequantize(codes, scales, biases, group, BITS).astype(mx.float32)

    return {name: (dense(weight), unit.biases.get(name)) for name, weight in unit.weights.items()}


def awq(unit, grams):
    """Activation-aware scaling (Lin et al. 2024): W·s to nearest, then / s; s from the root mean square of each channel, to the
    power that gives the layer the least output error."""
    import mlx.core as mx
    import numpy as np

    from w4a8.quantized.layer import QuantizedLayer

    found = {}
    for name, weight in unit.weights.items():
        gram, best = grams[unit.input_of[name]], None
        reach = mx.sqrt(mx.maximum(mx.diag(gram), 1e-12))
        for power in range(SEARCHED):
            scaling = mx.power(reach, power / SEARCHED)
            scaling = scaling / mx.sqrt(scaling.max() * scaling.min())
            layer = QuantizedLayer.nearest(np.array(weight * scaling), BITS, unit.settings.group_size).as_mlx()
            dense = layer.weight / scaling
            error = dense - weight
            cost = (error * (error @ gram)).sum().item()
            if best is None or cost < best[0]:
                best = cost, dense
        found[name] = best[1], unit.biases.get(name)
    return found


def gptq(unit, grams):
    """Frantar et al. 2022."""
    from benchmarks.error_feedback import gptq_layer

    group = unit.settings.group_size
    return {
        name: (gptq_layer(weight, grams[unit.input_of[name]], BITS, group).as_mlx().weight, unit.biases.get(name))
        for name, weight in unit.weights.items()
    }


def scales_only(unit, grams):
    """Codes to nearest; scales, zero points and biases distilled against the model's output, as mlx-lm's DWQ does."""
    from w4a8.rounding.training import Training

    class ScalesOnly(Training):
        @property
        def rounding_iters(self) -> int:
            return 0

    return trained(unit, ScalesOnly(unit))


def ours(unit, grams):
    """Stage 3W: codes, then scales, zero points and biases."""
    from w4a8.rounding.training import Training

    return trained(unit, Training(unit))


def trained(unit, training):
    """The dense weights and biases that a training ends with."""
    with progress_bar(training.iters, type(training).__name__, "it", leave=False) as bar:
        while training.iteration < training.iters:
            training.step()
            bar.update()
    final = unit.quantized(training.state, unit.codes(training.state, hard=True), with_ranges=False)
    return {name: (layer.weight, layer.deployed_bias) for name, layer in final.layers.items()}


# --- pictures -----------------------------------------------------------------------------------------------


@dataclass
class Dense:
    """Stands for a variant of stage 4: dense weights put in place."""

    name: str
    layers: dict = field(default_factory=dict)
    weights = rule = None

    @contextmanager
    def in_place(self, pipeline) -> Iterator[None]:
        from w4a8.model.layers import model_layers
        from w4a8.model.parts import TRANSFORMER

        for name, (weight, bias) in self.layers.items():
            module = model_layers(pipeline.mmdit)[name].module
            module["weight"] = weight.astype(module["weight"].dtype)
            if bias is not None:
                module["bias"] = bias.astype(module["weight"].dtype)
        try:
            yield
        finally:
            pipeline.drop(TRANSFORMER)


def drawn(manifest, ways, num_images: int) -> dict[str, dict]:
    """Each way's metrics against the original."""
    from w4a8.evaluation.metrics import describe_variant
    from w4a8.evaluation.sampling import choose_prompts, load_evaluated, plan_run, sample
    from w4a8.model.text import Texts

    pipeline, info, fingerprint = load_evaluated(manifest, None, None)
    prompts, _ = choose_prompts(manifest, info.captions, None, num_images, 10_000)
    run = plan_run(manifest, info, fingerprint, pipeline.use_t5, prompts, 20, None, 10_000, min(num_images, 64))
    texts = Texts(pipeline, prompts, run.cfg_weight, run.negative_prompt, None)
    found = {}
    with progress_bar(0, "sampling", "step", leave=False) as bar:
        original = sample(pipeline, texts, run, Dense("original"), bar)
        for name, layers in ways.items():
            found[name] = describe_variant(
                prompts, run.seed, original, sample(pipeline, texts, run, Dense(name, layers), bar)
            )
    return found


if __name__ == "__main__":
    main()
