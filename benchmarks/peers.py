"""Compare other people's ways to 4 bits with stage 3W, on the same cached samples: PSNR of the same unseen captions and seeds.

    python benchmarks/peers.py --calib-dir calibration_data/demo --iters 400

It reads stages 1 and 2W (--boundaries ends or all), and writes nothing. Each learned way gets the same iterations of the same
batches. It is for small models, since the whole model is trained at once. Biases and layers outside the blocks stay as they
are, except the biases of DWQ and stage 3W.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import numpy as np

from calibration_store.block_cache import read_cache_metadata
from calibration_store.manifest import read_manifest
from w4a8.backend.parallel import run_cpu_streams_side_by_side
from w4a8.cli import calib_dir_option, progress_bar, stage_command
from w4a8.evaluation.drawn_images import choose_prompts, load_evaluated, plan_evaluation, sample
from w4a8.evaluation.metrics import describe_variant
from w4a8.evaluation.variants import Variant
from w4a8.model.layers import model_blocks, model_layers
from w4a8.model.parts import TRANSFORMER, Pipeline
from w4a8.model.prompt_encoder import PromptEncoder
from w4a8.model.runs import run_transformer
from w4a8.options import EvaluationOptions
from w4a8.quantized.arithmetic import searched_grid
from w4a8.quantized.layer import QuantizedLayer
from w4a8.rounding.methods import Arrays
from w4a8.rounding.settings import STATIC_RULE, Settings
from w4a8.rounding.training_samples import Samples, spread_over
from w4a8.rounding.unit_training import UnitTraining
from w4a8.rounding.units import MODEL, ModelUnit, Unit, UnitSpec

BITS = 4
POWERS = 20  # exponents that AWQ tries
GRAM_SAMPLES = 256
DAMPING = 0.01  # GPTQ: share of the mean diagonal, as in the published code
Dense = dict[str, tuple[mx.array, mx.array | None]]  # layer -> its weight and bias


@stage_command
@calib_dir_option
@click.option("--iters", type=click.IntRange(min=2), default=400, help="Iterations of the ways that learn.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, help="Samples per iteration.")
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), default="64", help="Inputs that share a scale.")
@click.option("--num-images", type=click.IntRange(min=1), default=64, help="Unseen captions to draw.")
@click.option("--num-steps", type=click.IntRange(min=1), default=20, help="Steps of each image.")
@click.option("--blocks", help="Quantize only these, comma-separated.  [default: all]")
def main(
    calib_dir: Path, iters: int, batch_size: int, group_size: str, num_images: int, num_steps: int, blocks: str | None
) -> None:  # fmt: skip
    """Compare nearest, mx.quantize, AWQ, GPTQ, DWQ and stage 3W on the same data."""
    run_cpu_streams_side_by_side()
    manifest = read_manifest(calib_dir)
    settings = Settings(
        iters=iters, batch_size=batch_size, weight_bits=BITS, activation_bits=0, group_size=int(group_size), qdrop=0.0,
        micro_batch=min(batch_size, 8), activation_rule=STATIC_RULE,
    )  # fmt: skip
    unit = whole_model(calib_dir, manifest, settings, blocks.split(",") if blocks else None)
    ways: dict[str, Dense] = {}
    seconds, grams = {}, input_grams(unit)
    for name, make in WAYS.items():
        start = time.perf_counter()
        ways[name] = make(unit, grams)
        mx.eval([array for pair in ways[name].values() for array in pair if array is not None])
        seconds[name] = time.perf_counter() - start
    click.echo(f"{'':18} {'seconds':>8} {'PSNR':>8} {'worst':>7} {'FLIP':>7}")
    options = EvaluationOptions(num_images=num_images, num_steps=num_steps, batch_size=min(num_images, 64))
    for name, row in drawn(manifest, ways, options).items():
        flip = "–" if row["flip"]["mean"] is None else f"{row['flip']['mean']:.4f}"
        click.echo(f"{name:18} {seconds[name]:8.1f} {row['psnr']['mean']:6.1f}dB {row['psnr']['worst']:7.1f} {flip:>7}")


def whole_model(calib_dir: Path, manifest: dict[str, Any], settings: Settings, blocks: list[str] | None) -> Unit:
    """Return the model as one unit, with its cached samples; only layers of `blocks` are quantized."""
    mmdit = run_transformer(manifest)()
    names = list(model_blocks(mmdit))
    layers = [name for name, layer in model_layers(mmdit).items() if layer.block in (blocks or names)]
    if not layers:
        raise click.UsageError(f"--blocks {','.join(blocks or ())}: the model has {', '.join(names)}")
    samples = Samples.of_cache(calib_dir, read_cache_metadata(calib_dir), mmdit, names)
    return ModelUnit.build(mmdit, UnitSpec(MODEL, names, layers), samples, settings)


# --- the ways -------------------------------------------------------------------------------------------------


def input_grams(unit: Unit) -> Arrays:
    """Return XXᵀ of every distinct input of the unquantized model, over some of the training samples."""
    grams: Arrays = {}
    names = list(dict.fromkeys(unit.input_of.values()))
    for seen in unit.watch(names, spread_over(unit.samples.training, GRAM_SAMPLES)):
        grams = {name: grams.get(name, 0) + x.T @ x for name, x in seen.items()}
        mx.eval(grams)
    return grams


def nearest(unit: Unit, grams: Arrays) -> Dense:
    """Round to nearest on a min-max grid."""
    return {name: (layer.as_mlx().weight, unit.biases.get(name)) for name, layer in unit.nearest.items()}


def mlx_quantize(unit: Unit, grams: Arrays) -> Dense:
    """Quantize with MLX's own function."""
    group = unit.settings.group_size

    def dense(weight: mx.array) -> mx.array:
        codes, scales, biases = mx.quantize(weight.astype(mx.float16), group, BITS)
        return mx.dequantize(codes, scales, biases, group, BITS).astype(mx.float32)

    return {name: (dense(weight), unit.biases.get(name)) for name, weight in unit.weights.items()}


def awq(unit: Unit, grams: Arrays) -> Dense:
    """Scale by the activations (AWQ, Lin et al. 2024): round W·s to nearest, then divide by s.

    s is the root mean square of each channel to a power: the one that gives the layer the least output error.
    """

    def scaled(weight: mx.array, gram: mx.array, power: float) -> tuple[float, mx.array]:
        scaling = mx.power(mx.sqrt(mx.maximum(mx.diag(gram), 1e-12)), power)
        scaling = scaling / mx.sqrt(scaling.max() * scaling.min())
        layer = QuantizedLayer.nearest(np.array(weight * scaling), BITS, unit.settings.group_size).as_mlx()
        dense = layer.weight / scaling
        error = dense - weight
        return (error * (error @ gram)).sum().item(), dense

    found: Dense = {}
    for name, weight in unit.weights.items():
        tried = (scaled(weight, grams[unit.input_of[name]], power / POWERS) for power in range(POWERS))
        found[name] = min(tried, key=lambda one: one[0])[1], unit.biases.get(name)
    return found


def gptq(unit: Unit, grams: Arrays) -> Dense:
    """Spread each column's error over the columns that follow (GPTQ, Frantar et al. 2022), on stage 3W's first grid."""
    found: Dense = {}
    for name, weight in unit.weights.items():
        dense, gram = np.array(weight), np.array(grams[unit.input_of[name]], np.float64)
        grid = searched_grid(dense, BITS, unit.settings.group_size)
        layer = QuantizedLayer(gptq_codes(dense, gram, *grid), *grid).as_mlx()
        found[name] = layer.weight, unit.biases.get(name)
    return found


def gptq_codes(weight: np.ndarray, gram: np.ndarray, scale: np.ndarray, zero_point: np.ndarray) -> np.ndarray:
    """Round columns in order of their activations' energy, and return the codes (out, in) uint8.

    weight (out, in), gram XXᵀ (in, in), grid (out, groups).
    """
    width = weight.shape[1]
    order = np.argsort(-np.diag(gram), kind="stable")
    damped = gram[np.ix_(order, order)] + np.eye(width) * DAMPING * np.trace(gram) / width
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    remaining = weight.astype(np.float64)[:, order]
    scales, zero_points = (
        np.repeat(array.astype(np.float64), width // scale.shape[1], axis=1)[:, order] for array in (scale, zero_point)
    )
    codes = np.empty((len(weight), width), np.uint8)
    for position, column in enumerate(order):
        s, z = scales[:, position], zero_points[:, position]
        code = np.clip(np.rint(remaining[:, position] / s + z), 0, 2**BITS - 1)
        error = (remaining[:, position] - (code - z) * s) / factor[position, position]
        remaining[:, position + 1 :] -= np.outer(error, factor[position, position + 1 :])
        codes[:, column] = code
    return codes


class ScalesOnly(UnitTraining):
    """The training of DWQ: every iteration tunes, none moves the rounding."""

    @property
    def rounding_iters(self) -> int:
        """Return 0."""
        return 0


def scales_only(unit: Unit, grams: Arrays) -> Dense:
    """Round to nearest; distil scales, zero points and biases against the model's output, as mlx-lm's DWQ does."""
    return trained(ScalesOnly(unit))


def ours(unit: Unit, grams: Arrays) -> Dense:
    """Train as stage 3W does: codes, then scales, zero points and biases."""
    return trained(UnitTraining(unit))


def trained(training: UnitTraining) -> Dense:
    """Run a training, and return the dense weights and biases that it ends with."""
    with progress_bar(training.iters, type(training).__name__, "it", leave=False) as bar:
        while training.iteration < training.iters:
            training.step()
            bar.update()
    codes = training.unit.codes(training.state, hard=True)
    final = training.unit.quantized(training.state, codes, with_ranges=False)
    return {name: (layer.weight, layer.deployed_bias) for name, layer in final.layers.items()}


WAYS: dict[str, Callable[[Unit, Arrays], Dense]] = {
    "nearest": nearest, "mx.quantize": mlx_quantize, "AWQ, scaling": awq, "GPTQ": gptq, "DWQ, scales only": scales_only, "3W": ours,
}  # fmt: skip


# --- pictures -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DenseVariant(Variant):
    """A variant of stage 4 whose dense weights take the place of the layers' own."""

    layers: Dense = field(default_factory=dict)

    @contextmanager
    def in_place(self, pipeline: Pipeline) -> Iterator[None]:
        """Put the weights in place; drop the transformer at the end."""
        for name, (weight, bias) in self.layers.items():
            module = model_layers(pipeline.mmdit)[name].module
            module["weight"] = weight.astype(module["weight"].dtype)
            if bias is not None:
                module["bias"] = bias.astype(module["weight"].dtype)
        try:
            yield
        finally:
            pipeline.drop(TRANSFORMER)


def drawn(manifest: dict[str, Any], ways: Mapping[str, Dense], options: EvaluationOptions) -> dict[str, dict]:
    """Draw with the weights of each way, and return the metrics against the original."""
    pipeline, info, fingerprint = load_evaluated(manifest)
    prompts, _ = choose_prompts(manifest, info.captions, None, options.num_images, options.seed)
    run = plan_evaluation(options, manifest, info, fingerprint, pipeline.use_t5, prompts)
    texts = PromptEncoder(pipeline, prompts, run.cfg_weight, run.negative_prompt, None)
    found = {}
    with progress_bar(0, "sampling", "step", leave=False) as bar:
        original = sample(pipeline, texts, run, DenseVariant("original"), bar)
        for name, layers in ways.items():
            images = sample(pipeline, texts, run, DenseVariant(name, layers=layers), bar)
            found[name] = describe_variant(prompts, run.seed, original, images)
    return found


if __name__ == "__main__":
    main()
