"""The sensitivity of the model's output to the quantization of each layer, by which bits are allocated."""

import os
from collections.abc import Callable, Sequence
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
from w4a8.effort import SMALL_MODEL
from w4a8.model.hooks import substituted_layers
from w4a8.model.layers import Block, Layer, model_blocks, num_weights, run_final_layer
from w4a8.quantized.layer import QuantizedLayer
from w4a8.rounding.quantized_forward import QuantizedForward
from w4a8.rounding.run import RoundingRun
from w4a8.rounding.training_samples import SampleBatch, Samples, TrainingSamples, spread_over, verified

MEASURED_ON, AT_ONCE = (32, 8), (16, 2)  # samples, for small models and for large ones
INPUT_NOISE = 0.02  # share of an input's root mean square, small enough for the output to follow linearly


def known_sensitivity(run: RoundingRun, choices: Sequence[int]) -> dict[str, Any] | None:
    """Return an earlier measurement on this cache, of this model, at these bits; None where there is none.

    A damaged file is reported and left aside.
    """
    path = BlockCachePaths(run.paths.calib_dir).sensitivity
    if not os.path.lexists(path):
        return None
    try:
        found = SENSITIVITY.read(path)
    except StoreError as error:
        click.echo(f"{error.message}: it is measured anew.", err=True)
        return None
    same = all(found[key] == value for key, value in described(run).items())
    whole = all({str(bits) for bits in choices} <= one["weights"].keys() for one in found["layers"].values())
    return found if same and whole and set(found["layers"]) >= set(run.layers) else None


def described(run: RoundingRun) -> dict[str, Any]:
    """Return the facts that identify a measurement of this run, as sensitivity.json notes them."""
    cache = run.cache
    made_from = {key: cache.get(key) for key in ("calibration_run", "weights_fingerprint")}
    made_from |= {key: cache[key] for key in ("selected_image_ids", "key_timesteps")}
    return made_from | {"group_size": run.settings.group_size}


def note_sensitivity(run: RoundingRun, choices: Sequence[int]) -> None:
    """Measure the sensitivity and write it to sensitivity.json; rank 0 does, the others wait."""
    if run.ranks.rank == 0:
        write_sensitivity(run.paths.calib_dir, measure_sensitivity(run, choices))
    run.ranks.barrier()


def measure_sensitivity(run: RoundingRun, choices: Sequence[int]) -> dict[str, Any]:
    """Return the content of sensitivity.json.

    Every layer's weight is measured at each of these bits, and every input, one at a time. Raises StoreError for a
    damaged cache.
    """
    mmdit, layers = run.original(), run.layers
    for _ in verified(run.paths.calib_dir, run.cache, [run.blocks]):
        pass
    samples = Samples.of_cache(run.paths.calib_dir, run.cache, run.mmdit, run.blocks)
    large = num_weights(layers.values()) > SMALL_MODEL
    chosen, chunk = spread_over(samples.training, MEASURED_ON[large]), AT_ONCE[large]
    chunks = [chosen[i : i + chunk] for i in range(0, len(chosen), chunk)]
    probe = SensitivityProbe.open(mmdit, run.blocks, samples, chunks)
    found: dict[str, Any] = {name: {"weights": {}, "size": int(np.prod(one.shape))} for name, one in layers.items()}
    inputs: dict[str, list[float]] = {}
    owners = {layer.input_owner for layer in layers.values()}
    with progress_bar(len(layers) * len(choices) + len(owners), "sensitivity", "measurement") as bar:
        for block in run.blocks:
            for layer in (one for one in model_blocks(mmdit)[block].layers if one.name in layers):
                for bits in choices:
                    found[layer.name]["weights"][str(bits)] = float(
                        probe.of_weight(layer, bits, run.settings.group_size).mean()
                    )
                    bar.update()
                if layer.input_owner not in inputs:
                    inputs[layer.input_owner] = probe.of_input(layer)
                    bar.update()
            probe.go_on()
    sigmas = [run.schedule[step] for step in run.cache["key_timesteps"]]
    made_by = {"w4a8_version": __version__, "num_samples": len(chosen)}
    return described(run) | made_by | {"sigmas": sigmas, "layers": found, "inputs": inputs}


class SensitivityProbe:
    """The model run on from the block that is being measured; the blocks before it are not run again.

    `open` runs the unquantized model; the constructor stores.
    """

    def __init__(
        self, mmdit: nn.Module, blocks: Sequence[Block], batches: Sequence[SampleBatch], outputs: Sequence[mx.array],
        steps: Sequence[np.ndarray], num_steps: int, power: float,
    ):  # fmt: skip
        """Store chunks of samples: their inputs, the unquantized model's outputs, and their positions in key_timesteps.

        num_steps: the number of key_timesteps; power: the mean square of the outputs.
        """
        self.mmdit, self._blocks, self._at = mmdit, blocks, 0
        self._tokens = [batch.tokens for batch in batches]  # the inputs of the block that is being measured
        self._modulations = [batch.modulation for batch in batches]
        self._outputs, self._power = outputs, power
        self._steps, self._num_steps = np.concatenate(steps), num_steps
        self._counts = [len(chunk) for chunk in steps]

    @classmethod
    def open(
        cls, mmdit: nn.Module, blocks: Sequence[str], samples: TrainingSamples, chunks: Sequence[Sequence[int]]
    ) -> "SensitivityProbe":
        """Run the unquantized model on these chunks of samples, and return the probe at its first block."""
        stretch, batches = [model_blocks(mmdit)[name] for name in blocks], [samples.batch(chunk) for chunk in chunks]
        outputs = [run_on(mmdit, stretch, one.tokens, one.modulation, QuantizedForward({}, {})) for one in batches]
        mx.eval([one.tokens for one in batches], [one.modulation for one in batches], outputs)
        power = float(np.mean([float(mx.mean(mx.square(output))) for output in outputs]))
        steps = [samples.steps(chunk) for chunk in chunks]
        return cls(mmdit, stretch, batches, outputs, steps, len(samples.all_steps), power)

    def go_on(self) -> None:
        """Go on to the next block."""
        block, tokens = self._blocks[self._at], []
        for given, modulation in zip(self._tokens, self._modulations, strict=True):
            tokens.append(block.run(given, modulation))
            mx.eval(tokens[-1])
        self._tokens, self._at = tokens, self._at + 1

    def of_weight(self, layer: Layer, bits: int, group_size: int) -> np.ndarray:
        """Return the output's relative squared error with this layer rounded to nearest, by sample: (samples,)."""
        weight = QuantizedLayer.nearest(np.array(layer.weight, np.float32), bits, group_size).as_mlx().weight
        biases = {} if layer.bias is None else {layer.name: layer.bias}
        return self._errors(lambda: QuantizedForward({layer.name: weight}, biases))

    def of_input(self, layer: Layer) -> list[float]:
        """Return the gain of the layer's input at every cached step.

        The gain is the output's relative squared error for each unit of squared error of the input. It is measured with
        uniform noise whose root mean square is INPUT_NOISE times the input's.
        """
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
        energy = np.repeat([float(each) for each in energies], self._counts)
        gains = errors / np.maximum(energy, 1e-30)
        every = [gains[self._steps == step] for step in range(self._num_steps)]
        return [float(each.mean() if each.size else gains.mean()) for each in every]

    def _errors(self, new_forward: Callable[[], QuantizedForward]) -> np.ndarray:
        """Return every sample's mean squared error of the output, relative to the mean square: (samples,) float64."""
        errors: list[mx.array] = []
        with streams_for(len(self._counts)) as streams:
            for index, (reference, count) in enumerate(zip(self._outputs, self._counts, strict=True)):
                with mx.stream(streams[index % len(streams)]):
                    difference = mx.square(self._output(index, new_forward()) - reference).reshape(count, -1)
                    errors.append(difference.mean(axis=1))
                if (index + 1) % len(streams) == 0:
                    mx.eval(errors)
        return np.concatenate([np.array(each, np.float64) for each in errors]) / self._power

    def _output(self, index: int, forward: QuantizedForward) -> mx.array:
        """Return the velocity of a chunk of samples, run on from the present block."""
        return run_on(self.mmdit, self._blocks[self._at :], self._tokens[index], self._modulations[index], forward)


def run_on(
    mmdit: nn.Module, blocks: Sequence[Block], tokens: list[mx.array], modulation: mx.array, forward: QuantizedForward
) -> mx.array:
    """Run these blocks, up to the model's last, and the final layer; return the velocity, a patch a token."""
    with substituted_layers(mmdit, forward.compute):
        for block in blocks:
            tokens = block.run(tokens, modulation)
    return run_final_layer(mmdit, tokens[0], modulation)
