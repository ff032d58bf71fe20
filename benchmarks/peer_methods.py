"""The ways that peers.py compares, and how each of them is drawn."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.error_feedback import gptq_layer
from w4a8.cli import progress_bar
from w4a8.evaluation.drawn_images import choose_prompts, load_evaluated, plan_evaluation, sample
from w4a8.evaluation.metrics import describe_variant
from w4a8.model.layers import model_layers
from w4a8.model.parts import TRANSFORMER, Pipeline
from w4a8.model.prompt_encoder import PromptEncoder
from w4a8.quantized.layer import QuantizedLayer
from w4a8.rounding.training_samples import spread_over
from w4a8.rounding.unit_training import UnitTraining
from w4a8.rounding.units import Arrays, Unit

BITS, SEARCHED = 4, 20  # AWQ tries so many exponents
GRAM_SAMPLES = 256
Dense = dict[str, tuple[mx.array, mx.array | None]]  # layer -> its weight and bias


def input_grams(unit: Unit) -> Arrays:
    """XXᵀ of every distinct input of the unquantized model, over some of the training samples."""
    grams: Arrays = {}
    for seen in unit.watch(
        list(dict.fromkeys(unit.input_of.values())), spread_over(unit.samples.training, GRAM_SAMPLES)
    ):
        grams = {name: grams.get(name, 0) + x.T @ x for name, x in seen.items()}
        mx.eval(grams)
    return grams


def nearest(unit: Unit, grams: Arrays) -> Dense:
    """Round to nearest on a min-max grid."""
    return {name: (layer.as_mlx().weight, unit.biases.get(name)) for name, layer in unit.nearest.items()}


def mlx_quantize(unit: Unit, grams: Arrays) -> Dense:
    """MLX's own."""

    group = unit.settings.group_size

    def dense(weight: mx.array) -> mx.array:
        codes, scales, biases = mx.quantize(weight.astype(mx.float16), group, BITS)
        return mx.dequantize(codes, scales, biases, group, BITS).astype(mx.float32)

    return {name: (dense(weight), unit.biases.get(name)) for name, weight in unit.weights.items()}


def awq(unit: Unit, grams: Arrays) -> Dense:
    """Activation-aware scaling (Lin et al. 2024): W·s to nearest, then / s; s from the root mean square of each channel, to the
    power that gives the layer the least output error."""

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


def gptq(unit: Unit, grams: Arrays) -> Dense:
    """Frantar et al. 2022."""

    group = unit.settings.group_size
    return {
        name: (gptq_layer(weight, grams[unit.input_of[name]], BITS, group).as_mlx().weight, unit.biases.get(name))
        for name, weight in unit.weights.items()
    }


def scales_only(unit: Unit, grams: Arrays) -> Dense:
    """Codes to nearest; scales, zero points and biases distilled against the model's output, as mlx-lm's DWQ does."""

    class ScalesOnly(UnitTraining):
        @property
        def rounding_iters(self) -> int:
            return 0

    return trained(unit, ScalesOnly(unit))


def ours(unit: Unit, grams: Arrays) -> Dense:
    """Stage 3W: codes, then scales, zero points and biases."""

    return trained(unit, UnitTraining(unit))


def trained(unit: Unit, training: UnitTraining) -> Dense:
    """The dense weights and biases that a training ends with."""
    with progress_bar(training.iters, type(training).__name__, "it", leave=False) as bar:
        while training.iteration < training.iters:
            training.step()
            bar.update()
    final = unit.quantized(training.state, unit.codes(training.state, hard=True), with_ranges=False)
    return {name: (layer.weight, layer.deployed_bias) for name, layer in final.layers.items()}


WAYS: dict[str, Callable[[Unit, Arrays], Dense]] = {
    "nearest": nearest, "mx.quantize": mlx_quantize, "AWQ, scaling": awq, "GPTQ": gptq, "DWQ, scales only": scales_only, "3W": ours,
}  # fmt: skip


# --- pictures -----------------------------------------------------------------------------------------------


@dataclass
class Dressed:
    """Stands for a variant of stage 4: dense weights put in place."""

    name: str
    layers: Dense = field(default_factory=dict)
    weights = rule = None

    @contextmanager
    def in_place(self, pipeline: Pipeline) -> Iterator[None]:

        for name, (weight, bias) in self.layers.items():
            module = model_layers(pipeline.mmdit)[name].module
            module["weight"] = weight.astype(module["weight"].dtype)
            if bias is not None:
                module["bias"] = bias.astype(module["weight"].dtype)
        try:
            yield
        finally:
            pipeline.drop(TRANSFORMER)


def drawn(manifest: Mapping[str, Any], ways: Mapping[str, Dense], num_images: int) -> dict[str, dict]:
    """Each way's metrics against the original."""

    pipeline, info, fingerprint = load_evaluated(manifest)
    prompts, _ = choose_prompts(manifest, info.captions, None, num_images, 10_000)
    run = plan_evaluation(manifest, info, fingerprint, pipeline.use_t5, prompts, 20, None, 10_000, min(num_images, 64))
    texts = PromptEncoder(pipeline, prompts, run.cfg_weight, run.negative_prompt, None)
    found = {}
    with progress_bar(0, "sampling", "step", leave=False) as bar:
        original = sample(pipeline, texts, run, Dressed("original"), bar)
        for name, layers in ways.items():
            found[name] = describe_variant(
                prompts, run.seed, original, sample(pipeline, texts, run, Dressed(name, layers), bar)
            )
    return found
