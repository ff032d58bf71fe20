"""How much the model's output minds the quantization of each layer: what bits are given by."""

import os
from collections.abc import Sequence
from typing import Any

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from calibration_store.errors import StoreError
from calibration_store.layout import BlockCachePaths
from calibration_store.sensitivity import SENSITIVITY, write_sensitivity
from w4a8 import __version__
from w4a8.backend.parallel import streams_for
from w4a8.backend.progress import progress_bar
from w4a8.model.hooks import substituted_layers
from w4a8.model.layers import Layer, model_blocks, run_final_layer
from w4a8.quantized.layer import QuantizedLayer
from w4a8.rounding.quantized_forward import QuantizedForward
from w4a8.rounding.run import MODEL_UNIT_LIMIT, RoundingRun, num_weights
from w4a8.rounding.training_samples import TrainingSamples, spread_over, verified

MEASURED_ON, AT_ONCE = (32, 8), (16, 2)  # samples, for small models and for large ones
INPUT_NOISE = 0.02  # of an input's root mean square: small enough for the output to follow linearly


def known_sensitivity(rounding: RoundingRun, choices: Sequence[int]) -> dict[str, Any] | None:
    """What was measured before on this cache, of this model, at these bits; None where that is to be done."""
    path = BlockCachePaths(rounding.paths.calib_dir).sensitivity
    if not os.path.lexists(path):
        return None
    try:
        found = SENSITIVITY.read(path)
    except StoreError as error:
        click.echo(f"{error.message}: it is measured anew.", err=True)
        return None
    same = all(found[key] == value for key, value in described(rounding).items())
    whole = all({str(bits) for bits in choices} <= one["weights"].keys() for one in found["layers"].values())
    return found if same and whole and set(found["layers"]) >= set(rounding.layers) else None


def described(rounding: RoundingRun) -> dict[str, Any]:
    """What a measurement is of."""
    cache = rounding.cache
    made_from = {key: cache.get(key) for key in ("calibration_run", "weights_fingerprint")}
    made_from |= {key: cache[key] for key in ("selected_image_ids", "key_timesteps")}
    return made_from | {"group_size": rounding.settings.group_size}


def note_sensitivity(rounding: RoundingRun, choices: Sequence[int]) -> None:
    """Measure it and write it down; rank 0 does, the others wait."""
    if rounding.ranks.rank == 0:
        write_sensitivity(rounding.paths.calib_dir, measure_sensitivity(rounding, choices))
    rounding.ranks.barrier()


def measure_sensitivity(rounding: RoundingRun, choices: Sequence[int]) -> dict[str, Any]:
    """The content of sensitivity.json: every layer's weight at each of these bits, and every input, one at a time."""
    mmdit, layers = rounding.open(), rounding.layers
    for _ in verified(rounding.paths.calib_dir, rounding.cache, [rounding.blocks]):
        pass
    samples = rounding.whole_samples()
    large = num_weights(layers.values()) > MODEL_UNIT_LIMIT
    chosen, chunk = spread_over(samples.training, MEASURED_ON[large]), AT_ONCE[large]
    probe = SensitivityProbe(mmdit, rounding.blocks, samples, [chosen[i : i + chunk] for i in range(0, len(chosen), chunk)])
    found: dict[str, Any] = {name: {"weights": {}, "size": int(np.prod(one.shape))} for name, one in layers.items()}
    inputs: dict[str, list[float]] = {}
    owners = {layer.input_owner for layer in layers.values()}
    with progress_bar(len(layers) * len(choices) + len(owners), "sensitivity", "measurement") as bar:
        for block in rounding.blocks:
            for layer in (one for one in model_blocks(mmdit)[block].layers if one.name in layers):
                for bits in choices:
                    found[layer.name]["weights"][str(bits)] = float(
                        probe.of_weight(layer, bits, rounding.settings.group_size).mean()
                    )
                    bar.update()
                if layer.input_owner not in inputs:
                    inputs[layer.input_owner] = probe.of_input(layer)
                    bar.update()
            probe.go_on()
    sigmas = [rounding.schedule[step] for step in rounding.cache["key_timesteps"]]
    made_by = {"w4a8_version": __version__, "num_samples": len(chosen)}
    return described(rounding) | made_by | {"sigmas": sigmas, "layers": found, "inputs": inputs}


class SensitivityProbe:
    """The model run on from the block that is being measured: what comes before is not run again."""

    def __init__(
        self, mmdit: nn.Module, blocks: Sequence[str], samples: TrainingSamples, chunks: Sequence[Sequence[int]]
    ):
        self.mmdit, self._blocks, self._at = mmdit, [model_blocks(mmdit)[name] for name in blocks], 0
        batches = [samples.batch(chunk) for chunk in chunks]
        self._modulations = [batch.modulation for batch in batches]
        self._tokens = [batch.tokens for batch in batches]
        self._steps = np.concatenate([samples.steps(chunk) for chunk in chunks])
        self._every_step = len(samples.all_steps)
        self._counts = [len(chunk) for chunk in chunks]
        self._outputs = [self._output(index, QuantizedForward({}, {})) for index in range(len(chunks))]
        mx.eval(self._tokens, self._modulations, self._outputs)
        self._power = float(np.mean([mx.mean(mx.square(output)).item() for output in self._outputs]))

    def go_on(self) -> None:
        """To the next block."""
        block, tokens = self._blocks[self._at], []
        for given, modulation in zip(self._tokens, self._modulations, strict=True):
            tokens.append(block.run(given, modulation))
            mx.eval(tokens[-1])
        self._tokens, self._at = tokens, self._at + 1

    def of_weight(self, layer: Layer, bits: int, group_size: int) -> np.ndarray:
        """The output's squared error, relative to its mean square, with this layer rounded to nearest: (samples,)."""
        weight = QuantizedLayer.nearest(np.array(layer.weight, np.float32), bits, group_size).as_mlx().weight
        biases = {} if layer.bias is None else {layer.name: layer.bias}
        return self._errors(lambda: QuantizedForward({layer.name: weight}, biases))

    def of_input(self, layer: Layer) -> list[float]:
        """The output's relative squared error for each unit of squared error of the layer's input, at every cached step."""
        energies: list[mx.array] = []

        def noisy(name: str, x: mx.array) -> mx.array:
            size = INPUT_NOISE * mx.sqrt(mx.mean(mx.square(x)))
            noise = size * (mx.random.uniform(shape=x.shape, key=mx.random.key(len(energies))) * 2 - 1) * 3**0.5
            energies.append(mx.mean(mx.square(noise)))
            return x + noise

        sharing = [one for one in self._blocks[self._at].layers if one.input_owner == layer.input_owner]
        weights = {one.name: one.weight for one in sharing}
        biases = {one.name: one.bias for one in sharing if one.bias is not None}
        errors = self._errors(lambda: QuantizedForward(weights, biases, noisy))
        energy = np.repeat([each.item() for each in energies], self._counts)
        gains = errors / np.maximum(energy, 1e-30)
        every = [gains[self._steps == step] for step in range(self._every_step)]
        return [float(each.mean() if each.size else gains.mean()) for each in every]

    def _errors(self, stand_in: Any) -> np.ndarray:
        """Relative squared error of the output of every sample, (samples,)."""
        errors: list[mx.array] = []
        with streams_for(len(self._counts)) as streams:
            for index, (reference, count) in enumerate(zip(self._outputs, self._counts, strict=True)):
                with mx.stream(streams[index % len(streams)]):
                    difference = mx.square(self._output(index, stand_in()) - reference).reshape(count, -1)
                    errors.append(difference.mean(axis=1))
                if (index + 1) % len(streams) == 0:
                    mx.eval(errors)
        return np.concatenate([np.array(each, np.float64) for each in errors]) / self._power

    def _output(self, index: int, stand_in: QuantizedForward) -> mx.array:
        """The velocity of a chunk of samples, run on from here."""
        tokens, modulation = self._tokens[index], self._modulations[index]
        with substituted_layers(self.mmdit, stand_in.compute):
            for block in self._blocks[self._at :]:
                tokens = block.run(tokens, modulation)
        return run_final_layer(self.mmdit, tokens[0], modulation)
