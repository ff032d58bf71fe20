"""Stage 3W: learn how to round the weights of every linear layer, and the clipping ranges of its inputs.

Reads   adaround_cache/ (stage 2W) and the model
Writes  adaround_weights/: {block}.npz with codes, scales, zero points and ranges, metadata.json

python optimize_adaround.py --calib-dir calibration_data/demo --iters 80 --resume

A unit (the whole model, a block, a sublayer, a layer) is quantized and trained against what it gave unquantized on the
cached samples (AdaRound, BRECQ, TaQ-DiT). First the rounding variables α: up where α >= 0. Then, with the codes
decided, scales, zero points, biases and activation ranges (LSQ) together. Every loss is relative: 1 is the error of
round-to-nearest on a min-max grid, on the same samples. All in float32.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli_options import (
    Interrupted,
    calib_dir_option,
    format_bytes,
    format_seconds,
    model_place_options,
    progress_bar,
    resume_command,
    resume_options,
    stage_command,
)

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn
    import numpy as np

    from calibration_store import WeightPaths

TUNE_SHARE = 0.3  # of the iterations: codes decided, scales, zero points, biases and ranges trained
WARM_UP, BETA_START, BETA_END = 0.2, 20, 2  # AdaRound's regularizer, as shares of the rounding iterations
DECIDE_FROM = 0.4  # sigmoid: from here on the most decided variables are fixed, all at the end
LR_SCALES = 1e-3
HELD_OUT = 0.1  # of the images: never trained on, they judge
MODEL_UNIT_LIMIT = 100_000_000  # weights up to which the default unit is the whole model
ITERS = 400
BYTES_PER_WEIGHT = 5 + 2 * 16  # codes and alpha, and a checkpoint being replaced by the next
EVALUATED = 64  # samples that a loss is measured on
FIELDS = ("alpha", "scale", "zero_point", "bias", "range")


@dataclass(frozen=True)
class Settings:
    """What decides the result, beside the cache."""

    iters: int
    batch_size: int
    weight_bits: int
    activation_bits: int
    group_size: int
    rounding: str
    qdrop: float
    lr_alpha: float
    lr_activation_scale: float
    regularizer_weight: float
    seed: int

    @property
    def rounding_iters(self) -> int:
        return round(self.iters * (1 - TUNE_SHARE))


@dataclass(frozen=True)
class Job:
    """A stretch of blocks that shares samples and files: one block, or all of them for --unit model.

    A stage names the layers that are trained together, and those whose outputs count (none: the job's own outputs).
    """

    name: str
    blocks: list[str]
    stages: list[tuple[list[str], list[str]]]


def plan_jobs(layers: Sequence[str], blocks: Sequence[str], unit: str) -> list[Job]:
    """What is trained together, in order."""
    of_block = {block: [layer for layer in layers if layer.startswith(f"{block}.")] for block in blocks}
    if unit == "model":
        return [Job("model", list(blocks), [(list(layers), [])])]
    jobs = []
    for block, names in of_block.items():
        stages = [(names, [])]
        if unit == "sublayer":  # TaQ-DiT: attention and MLP apart
            attention = [name for name in names if ".attn." in name]
            mlp = [name for name in names if ".mlp." in name]
            stages = [
                (attention, [name for name in attention if name.endswith(".o_proj")]),
                (mlp, [name for name in mlp if name.endswith(".fc2")]),
            ]
        elif unit == "layer":  # all at once: each has its own loss
            stages = [(names, names)]
        jobs.append(Job(block, [block], stages))
    return jobs


# --- samples ------------------------------------------------------------------------------------------------


class Samples:
    """The cached samples of a job, float16 in memory (the GPU's, where there is one); batches of them in float32."""

    def __init__(self, calib_dir: Path, job: Job):
        import mlx.core as mx
        import numpy as np

        from calibration_store import read_cache_metadata, read_cached_block

        count = len(read_cache_metadata(calib_dir)["samples"])
        self.image_ids, self._arrays = [], []
        for position, cached in enumerate(read_cached_block(calib_dir, job.blocks[0], job.blocks[-1])):
            members = [*cached.inputs, cached.modulation_input, *cached.outputs]
            if not self._arrays:
                self._arrays = [np.empty((count, *member.shape), np.float16) for member in members]
            for array, member in zip(self._arrays, members, strict=True):
                array[position] = member
            self.image_ids.append(cached.image_id)
        if mx.default_device() != mx.Device(mx.cpu):  # copied once: a batch of SD3-Medium's samples is 0.2 GB
            self._arrays = [mx.array(array) for array in self._arrays]
        self.training, self.held_out = split_samples(self.image_ids)

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self._arrays)

    def batch(self, indices: Sequence[int]) -> "list[mx.array]":
        """Inputs, modulation input and outputs of these samples, rows one below the other."""
        import mlx.core as mx

        if isinstance(self._arrays[0], mx.array):
            indices = mx.array(indices)
        picked = (array[indices] for array in self._arrays)
        return [mx.array(array.reshape(-1, *array.shape[2:])).astype(mx.float32) for array in picked]


def verify_cache(calib_dir: Path, jobs: Sequence[Job]) -> None:
    """Check what the jobs will train on, checksums and every value. Raises StoreError that names the file.

    Once a run, before any work: later the data are mapped, and a flipped bit would be trained on.
    """
    from calibration_store import BlockCachePaths, block_keys, check_cached_sample, read_cache_metadata, stored_shapes

    metadata, root = read_cache_metadata(calib_dir), BlockCachePaths(calib_dir).root
    keys = {key for job in jobs for part in block_keys(metadata, job.blocks[0], job.blocks[-1]) for key in part}
    shapes = {key: shape for key, shape in stored_shapes(metadata).items() if key in keys or key == "modulation_input"}
    with progress_bar(len(metadata["samples"]), "checking the cache", "sample", leave=False) as bar:
        for sample in metadata["samples"]:
            check_cached_sample(root / sample["file"], sample["image_id"], sample["step_index"], shapes, checked=True)
            bar.update()


def split_samples(image_ids: list[int]) -> tuple[list[int], list[int]]:
    """(training, held-out) sample indices: every tenth image judges; of a single image every tenth sample."""
    images = sorted(set(image_ids))
    judges = set(images[:: round(1 / HELD_OUT)]) if len(images) > 1 else set()
    held_out = [i for i, image in enumerate(image_ids) if image in judges] or list(range(0, len(image_ids), 10))
    return [i for i in range(len(image_ids)) if i not in set(held_out)] or held_out, held_out


def spread_over(indices: list[int], count: int) -> list[int]:
    """At most `count` of the indices, evenly."""
    return indices[:: -(-len(indices) // count)]


# --- the quantized unit -------------------------------------------------------------------------------------


@dataclass
class Quantized:
    """What stands in for the linear layers while a unit is trained; `compute` is called in their place."""

    weights: "dict[str, mx.array]"  # (out, in)
    biases: "dict[str, mx.array]"
    ranges: "dict[str, mx.array]" = field(default_factory=dict)  # of a layer's input; none: not quantized
    shifts: "dict[str, mx.array]" = field(default_factory=dict)
    bits: int = 8
    drop: float = 0.0  # share of input elements that stay unquantized (QDrop)
    key: "mx.array | None" = None
    kept: Sequence[str] = ()  # layers whose outputs are wanted
    outputs: "dict[str, mx.array]" = field(default_factory=dict)
    _last: tuple = (None, None)

    def compute(self, name: str, layer: "nn.Module", x: "mx.array") -> "mx.array":
        """The layer with its quantized weight and input; q, k and v share one quantized input."""
        if name in self.weights:
            if self._last[0] is not x:
                self._last = (x, self._quantize_input(name, x))
            y = self._last[1] @ self.weights[name].T
            y = y + self.biases[name] if name in self.biases else y
        else:
            y = layer(x)
        if name in self.kept:
            self.outputs[name] = y
        return y

    def _quantize_input(self, name: str, x: "mx.array") -> "mx.array":
        import mlx.core as mx

        from quantizers import fake_quantize

        if name not in self.ranges:
            return x
        quantized = fake_quantize(x, self.ranges[name], self.bits, self.shifts.get(name))
        if not self.drop:
            return quantized
        self.key, key = mx.random.split(self.key)
        return mx.where(mx.random.bernoulli(self.drop, x.shape, key), x, quantized)


@dataclass
class Watch(Quantized):
    """Notes the inputs of the layers `names` and changes nothing."""

    names: Sequence[str] = ()
    inputs: "dict[str, mx.array]" = field(default_factory=dict)

    def compute(self, name: str, layer: "nn.Module", x: "mx.array") -> "mx.array":
        if name in self.names:
            self.inputs[name] = x.reshape(-1, x.shape[-1])
        return super().compute(name, layer, x)


def run_unit(pipeline, job: Job, batch: "list[mx.array]", quantized: Quantized, targets: list[str]) -> "list[mx.array]":
    """What the unit gives for a batch: outputs of the target layers, of the job's block, or the model's velocity."""
    from diffusion import run_block, run_final_layer
    from hooks import block_slots, substituted_layers

    quantized.kept = targets
    slots = block_slots(pipeline.mmdit)
    modules = {name: slots[name][0][slots[name][1]] for name in job.blocks}
    tokens, modulation_input = batch[:2], batch[2]
    with substituted_layers(pipeline.mmdit, quantized.compute):
        for name in job.blocks:
            tokens = run_block(modules[name], tokens, modulation_input)
    quantized._last = (None, None)  # else every state keeps a batch's activations alive
    if targets:
        return [quantized.outputs.pop(name) for name in targets]
    return [run_final_layer(pipeline.mmdit, tokens[0], modulation_input)] if job.name == "model" else tokens


def unit_targets(pipeline, job: Job, batch: "list[mx.array]", targets: list[str]) -> "list[mx.array]":
    """What the unquantized unit gives for a batch."""
    from diffusion import run_final_layer

    if targets:
        return run_unit(pipeline, job, batch, Quantized({}, {}), targets)
    if job.name == "model":
        return [run_final_layer(pipeline.mmdit, batch[3], batch[2])]
    return batch[3:]


class Unit:
    """A stage of a job: its layers, its loss, and the pieces of its training state."""

    def __init__(self, pipeline, job: Job, stage: tuple[list[str], list[str]], samples: Samples, settings: Settings):
        import mlx.core as mx
        import numpy as np

        from hooks import layer_slots
        from quantizers import grid_position, min_max_grid, nearest_codes, searched_grid

        self.pipeline, self.job, self.samples, self.settings = pipeline, job, samples, settings
        self.layers, self.targets = stage
        slots = layer_slots(pipeline.mmdit)
        linears = {name: slots[name][0][slots[name][1]] for name in self.layers}
        self.input_of = {name: name.replace("k_proj", "q_proj").replace("v_proj", "q_proj") for name in self.layers}
        self.weights = {name: linear.weight for name, linear in linears.items()}
        self._grams: dict[tuple, dict[str, mx.array]] = {}
        self.biases = {name: linear.bias for name, linear in linears.items() if "bias" in linear}
        self.nearest, self.floor, start = {}, {}, {key: {} for key in FIELDS}
        for name, linear in linears.items():
            weight = np.array(linear.weight, np.float32)
            grid = min_max_grid(weight, settings.weight_bits, settings.group_size)
            self.nearest[name] = (nearest_codes(weight, *grid, settings.weight_bits), *grid)
            scale, zero_point = searched_grid(weight, settings.weight_bits, settings.group_size)
            position = grid_position(weight, scale, zero_point)
            self.floor[name] = mx.array(np.floor(position))
            start["alpha"][name] = first_alpha(position - np.floor(position), settings.rounding)
            start["scale"][name], start["zero_point"][name] = mx.array(scale), mx.array(zero_point)
        start["bias"] = dict(self.biases)
        self.norms = [1.0]
        batch_ids = spread_over(samples.training, EVALUATED)
        self.norms = [max(error, 1e-20) for error in self.errors(self.nearest_state(), batch_ids)]
        self.shifts, ranges = self.measure_inputs(batch_ids)
        start["range"] = {name: mx.log(value) for name, value in ranges.items()}
        self.start = start

    # the loss

    def errors(self, state: Quantized, indices: list[int]) -> list[float]:
        """Mean squared error of each output, relative to round-to-nearest, over these samples."""
        import mlx.core as mx

        totals = None
        size = self.settings.batch_size
        for begin in range(0, len(indices), size):
            batch = self.samples.batch(indices[begin : begin + size])
            found = self.parts(state, batch)
            mx.eval(found)
            share = len(indices[begin : begin + size]) / len(indices)
            totals = [a + share * b.item() for a, b in zip(totals or [0.0] * len(found), found, strict=True)]
        return totals

    def parts(self, state: Quantized, batch: "list[mx.array]") -> "list[mx.array]":
        import mlx.core as mx

        targets = unit_targets(self.pipeline, self.job, batch, self.targets)
        given = run_unit(self.pipeline, self.job, batch, state, self.targets)
        norms = self.norms * (len(given) if len(self.norms) < len(given) else 1)
        return [mx.mean(mx.square(a - b)) / norm for a, b, norm in zip(given, targets, norms, strict=True)]

    def loss(self, indices: list[int], state: Quantized) -> float:
        """The mean of `errors`: 1 for round-to-nearest on the training samples."""
        errors = self.errors(state, indices)
        return sum(errors) / len(errors)

    def gradients(
        self, quantized: Quantized, indices: "np.ndarray", iteration: int
    ) -> "tuple[mx.array, dict[str, dict[str, mx.array]]]":
        """Loss and its gradients with respect to weights, biases and ranges; the CPU's cores share the batch."""
        import mlx.core as mx
        from mlx.utils import tree_map

        from diffusion import side_by_side

        def loss_of(parameters: dict, batch: list, key) -> "mx.array":
            state = Quantized(
                **parameters, shifts=quantized.shifts, bits=quantized.bits, drop=self.settings.qdrop, key=key
            )
            parts = self.parts(state, batch)
            return sum(parts) / len(parts)

        parameters = {"weights": quantized.weights, "biases": quantized.biases, "ranges": quantized.ranges}
        mx.eval(parameters)
        total = None
        with side_by_side(len(indices)) as groups:
            for group, stream in groups:
                key = mx.random.key(hash((self.settings.seed, iteration, group.start)) % 2**32)
                with mx.stream(stream):
                    batch = self.samples.batch(indices[group])
                    found = mx.value_and_grad(loss_of)(parameters, batch, key)
                    share = (group.stop - group.start) / len(indices)
                    found = tree_map(partial(mx.multiply, share), found)
                total = [*(total or []), found]
            mx.eval(total)
        loss, gradients = total[0]
        for other_loss, other in total[1:]:
            loss, gradients = loss + other_loss, tree_map(mx.add, gradients, other)
        return loss, gradients

    def loss_with_ranges(self, indices: list[int], state: Quantized) -> float | None:
        """`loss` of a state with quantized inputs."""
        return self.loss(indices, state)

    # what the unit looks like at a point of its training

    def nearest_state(self) -> Quantized:
        """Round-to-nearest on a min-max grid, activations as they are."""
        import mlx.core as mx

        from quantizers import dequantize

        weights = {
            name: dequantize(mx.array(codes).astype(mx.float32), mx.array(scale), mx.array(zero_point))
            for name, (codes, scale, zero_point) in self.nearest.items()
        }
        return Quantized(weights, self.biases)

    def codes(self, state: dict, hard: bool) -> "dict[str, mx.array]":
        """Codes (out, in) float32, between two of the grid's while a sigmoid is undecided."""
        import mlx.core as mx

        from quantizers import rectified_sigmoid

        top = 2**self.settings.weight_bits - 1
        codes = {}
        for name, alpha in state["alpha"].items():
            soft = self.settings.rounding == "sigmoid" and not hard
            up = rectified_sigmoid(alpha) if soft else (alpha >= 0).astype(mx.float32)
            codes[name] = mx.clip(self.floor[name] + up, 0, top)
        return codes

    def quantized(self, state: dict, codes: "dict[str, mx.array]", with_ranges: bool) -> Quantized:
        """The unit with these codes on the state's grids."""
        import mlx.core as mx

        from quantizers import dequantize

        weights = {name: dequantize(codes[name], state["scale"][name], state["zero_point"][name]) for name in codes}
        ranges = {}
        if with_ranges and self.settings.activation_bits:
            ranges = {name: mx.exp(state["range"][self.input_of[name]]) for name in self.layers}
        return Quantized(weights, state["bias"], ranges, self.shifts, self.settings.activation_bits)

    def measure_inputs(self, indices: list[int]) -> "tuple[dict[str, mx.array], dict[str, mx.array]]":
        """Shifts of the post-GELU layers, (min + max) / 2 per channel, and for every input the range to start from.

        The range costs no more than the full one by the moments of x − shift over these samples, every token counted.
        """
        import mlx.core as mx
        import numpy as np

        from quantizers import channel_clipping_range

        if not self.settings.activation_bits:
            return {}, {}
        inputs = list(dict.fromkeys(self.input_of.values()))
        seen_of: dict[str, list[mx.array]] = {}  # minimum, maximum, sum and sum of squares per channel; tokens
        for seen in self.watch(inputs, indices):
            for name, x in seen.items():
                new = [x.min(axis=0), x.max(axis=0), x.sum(axis=0), mx.square(x).sum(axis=0), mx.array(float(len(x)))]
                old = seen_of.get(name)
                seen_of[name] = new if old is None else [
                    mx.minimum(old[0], new[0]), mx.maximum(old[1], new[1]), *map(mx.add, old[2:], new[2:])
                ]  # fmt: skip
            mx.eval(seen_of)
        shifts, ranges = {}, {}
        for name, arrays in seen_of.items():
            low, high, total, squares, tokens = (np.array(array, np.float64) for array in arrays)
            shift = (low + high) / 2 if name.endswith(".mlp.fc2") else np.zeros_like(low)
            if name.endswith(".mlp.fc2"):
                shifts[name] = mx.array(shift.astype(np.float32))
            reach = np.maximum(np.abs(low - shift), np.abs(high - shift))
            power = np.maximum(squares / tokens - 2 * shift * total / tokens + shift * shift, 0)
            found = channel_clipping_range(reach, power, 1, [self.settings.activation_bits])[0]
            ranges[name] = mx.array(np.float32(max(found, 1e-8)))
        return shifts, ranges

    def watch(self, names: list[str], indices: list[int]) -> "Iterator[dict[str, mx.array]]":
        """The inputs (tokens, channels) of these layers in the unquantized unit, a few samples at a time."""
        size = min(8, self.settings.batch_size)
        for begin in range(0, len(indices), size):
            watching = Watch({}, {}, names=names)
            run_unit(self.pipeline, self.job, self.samples.batch(indices[begin : begin + size]), watching, [])
            yield watching.inputs


class LayerUnit(Unit):
    """Layers that are each trained for their own output: ‖(Ŵ − W)·X‖² = tr(E·XXᵀ·Eᵀ) needs no sample, only XXᵀ."""

    def errors(self, state: Quantized, indices: list[int]) -> list[float]:
        return [part.item() for part in self.gram_errors(state.weights, self.grams(indices))]

    def loss_with_ranges(self, indices: list[int], state: Quantized) -> float | None:
        """Not known: the Gram matrix is that of the unquantized inputs, and ranges keep their first value."""
        return None

    def gram_errors(self, weights: "dict[str, mx.array]", grams: "dict[str, mx.array]") -> "list[mx.array]":
        """Squared output error of each layer, relative to `norms`."""
        errors = [weights[name] - self.weights[name] for name in self.layers]
        found = [(e * (e @ grams[self.input_of[name]])).sum() for name, e in zip(self.layers, errors, strict=True)]
        norms = self.norms if len(self.norms) == len(found) else [1.0] * len(found)
        return [error / norm for error, norm in zip(found, norms, strict=True)]

    def grams(self, indices: list[int]) -> "dict[str, mx.array]":
        """XXᵀ per input, (channels, channels), divided by the number of samples."""
        import mlx.core as mx

        key = tuple(indices)
        if key not in self._grams:
            totals = {}
            for seen in self.watch(list(dict.fromkeys(self.input_of.values())), indices):
                totals = {name: totals.get(name, 0) + x.T @ x / len(indices) for name, x in seen.items()}
                mx.eval(totals)
            self._grams[key] = totals
        return self._grams[key]

    def gradients(self, quantized: Quantized, indices: "np.ndarray", iteration: int) -> tuple:
        grams = self.grams(self.samples.training)
        loss = sum(self.gram_errors(quantized.weights, grams)) / len(self.layers)
        weights = {}
        for name, norm in zip(self.layers, self.norms, strict=True):
            error = quantized.weights[name] - self.weights[name]
            weights[name] = 2 * (error @ grams[self.input_of[name]]) / norm / len(self.layers)
        biases = {name: bias * 0 for name, bias in quantized.biases.items()}
        return loss, {
            "weights": weights,
            "biases": biases,
            "ranges": {name: r * 0 for name, r in quantized.ranges.items()},
        }


def first_alpha(fraction: "np.ndarray", rounding: str) -> "mx.array":
    """α where the unrounded weight starts: fraction (out, in) is how far it lies above the lower code."""
    import mlx.core as mx

    from quantizers import rectified_sigmoid_inverse

    above = mx.array(fraction)
    return above - 0.5 if rounding == "ste" else rectified_sigmoid_inverse(mx.clip(above, 1e-4, 1 - 1e-4))


# --- training -----------------------------------------------------------------------------------------------


class NotFiniteError(ArithmeticError):
    """A loss or a gradient is NaN or infinite: nothing can be learned from it."""


class Training:
    """The optimization of one unit: its state, optimizers and iteration; `step` takes one."""

    def __init__(self, unit: Unit):
        import mlx.optimizers as optimizers

        self.unit, self.settings = unit, unit.settings
        self.state = {key: dict(value) for key, value in unit.start.items()}
        self.iteration = 0
        self.alpha_optimizer, self.scale_optimizer, self.range_optimizer = (
            optimizers.Adam(1e-3, bias_correction=True) for _ in range(3)
        )
        self.fixed = {name: alpha * 0 for name, alpha in self.state["alpha"].items()}  # sigmoid: 1 where decided
        self._good = (self._parts(), 0)  # the last state whose loss was finite, and its iteration

    def arrays(self) -> "dict[str, mx.array]":
        """Everything that the rest of the training follows from, flat."""
        tree = {"state": self.state, "fixed": self.fixed if self.settings.rounding == "sigmoid" else {}}
        for name in ("alpha", "scale", "range"):
            tree[f"{name}_optimizer"] = getattr(self, f"{name}_optimizer").state
        return dict(flatten(tree))

    def restore(self, arrays: "dict[str, np.ndarray]", iteration: int) -> None:
        """Go on from `arrays` at an iteration. Raises ValueError when they are not of this unit, or not finite."""
        import mlx.core as mx
        import numpy as np

        if not 0 <= iteration <= self.settings.iters:
            raise ValueError(f"iteration {iteration}")
        for name, array in arrays.items():
            if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
                raise ValueError(f"{name} is not finite")
            if name.startswith("state|scale|") and not (array > 0).all():
                raise ValueError(f"{name} is not above 0")
            self._check_moment(name, array)
        own = {name: array.shape for name, array in self.arrays().items() if "optimizer" not in name}
        found = {name: array.shape for name, array in arrays.items() if "optimizer" not in name}
        if own != found:
            raise ValueError("arrays of another unit")
        tree = unflatten({name: mx.array(array) for name, array in arrays.items()})
        for name in ("alpha", "scale", "range"):
            if f"{name}_optimizer" not in tree:
                raise ValueError(f"no {name}_optimizer")
        self.state = {key: tree["state"].get(key, {}) for key in FIELDS}
        self.fixed = tree.get("fixed") or self.fixed
        for name in ("alpha", "scale", "range"):
            getattr(self, f"{name}_optimizer").state = tree[f"{name}_optimizer"]
        self.iteration = iteration
        self._good = (self._parts(), iteration)

    def _check_moment(self, name: str, array: "np.ndarray") -> None:
        """An optimizer's m and v have the shape of what they move. Raises ValueError."""
        optimizer, *path = name.split("|")
        if optimizer.endswith("_optimizer") and path[-1] in ("m", "v"):
            kind = {"alpha_optimizer": "alpha", "range_optimizer": "range"}.get(optimizer)
            moved = self.state[kind] if kind else self.state[path[0]]
            own = moved.get(path[-2])
            if own is None or own.shape != array.shape:
                raise ValueError(f"{name} is of another layer")

    def step(self) -> float:
        """One iteration on a batch that only seed and iteration decide; returns its loss.

        Raises NotFiniteError, back at the last state whose loss and gradients were finite.
        """
        import mlx.core as mx
        import numpy as np
        from mlx.utils import tree_flatten

        unit, settings = self.unit, self.settings
        random = np.random.default_rng([settings.seed, self.iteration])
        size = min(settings.batch_size, len(unit.samples.training))
        indices = np.sort(random.choice(unit.samples.training, size, replace=False))
        tuning = self.iteration >= settings.rounding_iters
        codes = unit.codes(self.state, hard=tuning)
        quantized = unit.quantized(self.state, codes, with_ranges=tuning)
        loss, gradients = unit.gradients(quantized, indices, self.iteration)
        finite = [mx.isfinite(array).all() for _, array in tree_flatten([loss, gradients])]
        if not mx.stack(finite).all().item():
            found, self.iteration = self.iteration, self._good[1]
            self._set(self._good[0])
            what = "a gradient is" if mx.isfinite(loss).item() else "the loss is"
            raise NotFiniteError(f"{what} not finite at iteration {found}")
        self._good = (self._parts(), self.iteration)
        if tuning:
            self.tune(codes, gradients)
        else:
            self.round(gradients["weights"])
        self.iteration += 1
        mx.eval(
            self.state,
            self.fixed,
            [o.state for o in (self.alpha_optimizer, self.scale_optimizer, self.range_optimizer)],
        )
        return loss.item()

    def _parts(self) -> dict[str, Any]:
        """The state as it is now: references, no copies (MLX arrays do not change)."""
        from mlx.utils import tree_map

        optimizers = {name: getattr(self, f"{name}_optimizer").state for name in ("alpha", "scale", "range")}
        return tree_map(lambda array: array, {"state": self.state, "fixed": self.fixed, **optimizers})

    def _set(self, parts: dict[str, Any]) -> None:
        self.state, self.fixed = parts["state"], parts["fixed"]
        for name in ("alpha", "scale", "range"):
            getattr(self, f"{name}_optimizer").state = parts[name]

    def round(self, weight_gradients: "dict[str, mx.array]") -> None:
        """Move the rounding variables."""
        import mlx.core as mx

        from quantizers import rectified_sigmoid, rectified_sigmoid_gradient, rounding_regularizer_gradient

        settings, alphas = self.settings, self.state["alpha"]
        progress = self.iteration / settings.rounding_iters
        beta = BETA_START + (BETA_END - BETA_START) * max(0.0, (progress - WARM_UP) / (1 - WARM_UP))
        count = sum(alpha.size for alpha in alphas.values())
        gradients = {}
        for name, alpha in alphas.items():
            scale = self.state["scale"][name]
            gradient = (weight_gradients[name].reshape(*scale.shape, -1) * scale[..., None]).reshape(alpha.shape)
            if settings.rounding == "sigmoid":
                if progress > WARM_UP:
                    pull = rounding_regularizer_gradient(rectified_sigmoid(alpha), beta)
                    gradient = gradient + settings.regularizer_weight / count * pull
                gradient = mx.where(self.fixed[name] > 0, 0, gradient * rectified_sigmoid_gradient(alpha))
            gradients[name] = gradient
        self.alpha_optimizer.learning_rate = settings.lr_alpha * (0.05 + 0.95 * cosine(progress))
        moved = self.alpha_optimizer.apply_gradients(gradients, alphas)
        if settings.rounding == "ste":
            moved = {name: mx.clip(alpha, -0.5, 0.5) for name, alpha in moved.items()}
        else:
            moved = {name: mx.where(self.fixed[name] > 0, alphas[name], alpha) for name, alpha in moved.items()}
            if progress > DECIDE_FROM and self.iteration % 10 == 0:
                moved = self.decide(moved, (progress - DECIDE_FROM) / (0.98 - DECIDE_FROM))
        self.state["alpha"] = moved

    def decide(self, alphas: "dict[str, mx.array]", share: float) -> "dict[str, mx.array]":
        """Fix the most decided share of each layer's sigmoids at 0 or 1 and go on with the others."""
        import mlx.core as mx

        from quantizers import rectified_sigmoid

        decided = {}
        for name, alpha in alphas.items():
            distance = mx.where(self.fixed[name] > 0, 1.0, mx.abs(rectified_sigmoid(alpha) - 0.5))
            position = max(0, int((1 - share) * (distance.size - 1)))
            self.fixed[name] = (distance >= mx.sort(distance.reshape(-1))[position]).astype(mx.float32)
            decided[name] = mx.where(self.fixed[name] > 0, mx.where(alpha >= 0, 10.0, -10.0), alpha)
        return decided

    def tune(self, codes: "dict[str, mx.array]", gradients: "dict[str, dict[str, mx.array]]") -> None:
        """Move scales (on a log scale), zero points and biases, and the activation ranges (on a log scale)."""
        import mlx.core as mx

        state, settings = self.state, self.settings
        parameters, slopes = {"scale": {}, "zero_point": {}, "bias": state["bias"]}, {"scale": {}, "zero_point": {}}
        for name, code in codes.items():
            scale, zero_point = state["scale"][name], state["zero_point"][name]
            grouped = gradients["weights"][name].reshape(*scale.shape, -1)
            distance = code.reshape(grouped.shape) - zero_point[..., None]
            slopes["scale"][name] = (grouped * distance).sum(axis=-1) * scale
            slopes["zero_point"][name] = -grouped.sum(axis=-1) * scale * 10  # in tenths of a code
            parameters["scale"][name], parameters["zero_point"][name] = mx.log(scale), zero_point / 10
        slopes["bias"] = gradients["biases"]
        progress = (self.iteration - settings.rounding_iters) / max(1, settings.iters - settings.rounding_iters)
        self.scale_optimizer.learning_rate = LR_SCALES * cosine(progress)
        moved = self.scale_optimizer.apply_gradients(slopes, parameters)
        state["scale"] = {name: mx.exp(value) for name, value in moved["scale"].items()}
        state["zero_point"] = {name: value * 10 for name, value in moved["zero_point"].items()}
        state["bias"] = moved["bias"]
        if state["range"]:
            of_input: dict[str, mx.array] = {}
            for name, gradient in gradients["ranges"].items():
                source = self.unit.input_of[name]
                of_input[source] = of_input.get(source, 0) + gradient * mx.exp(state["range"][source])
            self.range_optimizer.learning_rate = settings.lr_activation_scale * cosine(progress)
            state["range"] = self.range_optimizer.apply_gradients(of_input, state["range"])


def flatten(tree: dict[str, Any], prefix: str = "") -> "Iterator[tuple[str, mx.array]]":
    """(path, array) of nested dictionaries; mlx.utils joins paths with dots, which layers have in their names."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}|")
        else:
            yield prefix + name, value


def unflatten(arrays: "dict[str, mx.array]") -> dict[str, Any]:
    """Nested dictionaries from the paths of `flatten`."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *parents, name = path.split("|")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    return tree


def cosine(progress: float) -> float:
    """1 at the start, 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def train(training: Training, bar, save: Callable[[], None], checkpoint_seconds: float) -> dict[str, float]:
    """Run the training to its end, with a checkpoint now and then; returns the unit's losses."""
    unit, settings = training.unit, training.settings
    held_out = spread_over(unit.samples.held_out, EVALUATED)
    last_saved, average, changed = time.monotonic(), None, "0.0%"
    while training.iteration < settings.iters:
        loss = training.step()
        average = loss if average is None else 0.9 * average + 0.1 * loss
        bar.update()
        if training.iteration % 10 == 0:
            changed = f"{changed_share(training):.1%}"
        bar.set_postfix(loss=f"{average:.3f}", changed=changed, refresh=False)
        if time.monotonic() - last_saved > checkpoint_seconds:
            save()
            last_saved = time.monotonic()
    codes = unit.codes(training.state, hard=True)
    final = unit.quantized(training.state, codes, with_ranges=False)
    with_ranges = unit.quantized(training.state, codes, with_ranges=True)
    losses_with_ranges = unit.loss_with_ranges(held_out, with_ranges)
    first = unit.quantized(unit.start, unit.codes(unit.start, hard=True), with_ranges=False)
    hardened = unit.quantized({**unit.start, "alpha": training.state["alpha"]}, codes, with_ranges=False)
    chosen = spread_over(unit.samples.training, EVALUATED)
    losses = {
        "nearest": unit.loss(held_out, unit.nearest_state()),
        "start": unit.loss(held_out, first),
        "hardened": unit.loss(held_out, hardened),
        "end": unit.loss(held_out, final),
        "end_activations": losses_with_ranges,
        "end_training": unit.loss(chosen, final),
    }
    for name, value in losses.items():
        if value is not None and not math.isfinite(value):
            raise NotFiniteError(f"the held-out loss {name!r} is not finite after iteration {training.iteration}")
    return losses


def changed_share(training: Training) -> float:
    """Share of the unit's weights that by now do not round as they would at the start."""
    start = training.unit.start["alpha"]
    changed = [((alpha >= 0) != (start[name] >= 0)).sum() for name, alpha in training.state["alpha"].items()]
    return sum(changed).item() / sum(alpha.size for alpha in start.values())


# --- files --------------------------------------------------------------------------------------------------


def layer_arrays(training: Training, keep_nearest: bool) -> "dict[str, np.ndarray]":
    """What the block files say of a trained unit's layers: {layer__field: array}."""
    import numpy as np

    from quantizers import grid_position

    unit, state = training.unit, training.state
    codes = unit.codes(state, hard=True)
    arrays = {}
    for name in unit.layers:
        prefix = name.replace(".", "_")
        if keep_nearest:
            q, scale, zero_point = unit.nearest[name]
            lower = np.floor(grid_position(np.array(unit.weights[name]), scale, zero_point))
            alpha = np.where(q > lower, 0.5, -0.5).astype(np.float32)
        else:
            alpha, q = np.array(state["alpha"][name]), np.array(codes[name]).astype(np.uint8)
            scale, zero_point = np.array(state["scale"][name]), np.array(state["zero_point"][name])
            if name in state["bias"]:
                arrays[f"{prefix}__bias"] = np.array(state["bias"][name])
        arrays |= {f"{prefix}__alpha": alpha, f"{prefix}__q": q}
        arrays |= {f"{prefix}__scale": scale, f"{prefix}__zero_point": zero_point}
        if state["range"]:
            arrays[f"{prefix}__act_scale"] = np.exp(np.array(state["range"][unit.input_of[name]], np.float32))
        if name in unit.shifts:
            arrays[f"{prefix}__act_shift"] = np.array(unit.shifts[name])
    return arrays


class Checkpoint:
    """checkpoint.npz: where the job under way stands, so that a kill costs little."""

    def __init__(self, paths: "WeightPaths", job: Job, plan: dict[str, Any]):
        import hashlib

        import orjson

        self.path, self.job = paths.checkpoint, job
        same = {
            key: value for key, value in plan.items() if key not in LEARNING_RATES
        }  # these may change after a fault
        self.plan = hashlib.sha256(orjson.dumps(same, option=orjson.OPT_SORT_KEYS)).hexdigest()

    def save(self, stage: int, training: Training, done: "dict[str, np.ndarray]", losses: list[dict]) -> None:
        import numpy as np
        import orjson

        from calibration_store import write_npz

        position = {"plan": self.plan, "job": self.job.name, "stage": stage, "iteration": training.iteration}
        arrays = {f"training.{name}": np.array(array) for name, array in training.arrays().items()}
        arrays |= {f"done.{name}": array for name, array in done.items()}
        encoded = np.frombuffer(orjson.dumps(position | {"losses": losses}), np.uint8)
        write_npz(self.path, arrays | {"position": encoded})

    def load(self) -> "tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]] | None":
        """(position, arrays of the training, arrays of finished stages) of this job's last checkpoint, or None.

        A damaged one, or one of another run, is said and left aside: the job begins anew.
        """
        from calibration_store import StoreError, read_npz, read_position

        if not os.path.lexists(self.path):
            return None
        try:
            arrays = read_npz(self.path, "the unit begins anew")
            position = read_position(arrays)
            if (position["plan"], position["job"]) != (self.plan, self.job.name):
                return None
            if not position["stage"] < len(self.job.stages) or len(position["losses"]) != position["stage"]:
                raise ValueError(f"stage {position['stage']}")
        except (StoreError, ValueError) as error:
            self.discard(error)
            return None
        parts: dict[str, dict] = {"training": {}, "done": {}}
        for name, array in arrays.items():
            part, _, rest = name.partition(".")
            if rest:
                parts.setdefault(part, {})[rest] = array
        return position, parts["training"], parts["done"]

    def discard(self, why: Exception) -> None:
        """Say that a checkpoint cannot be used; the next one takes its place."""
        click.echo(
            f"{self.path.name} cannot be used ({' '.join(str(why).split())[:160]}): {self.job.name} begins anew.",
            err=True,
        )


def run_job(
    pipeline, paths: "WeightPaths", job: Job, plan: dict[str, Any], settings: Settings, unit_class: type[Unit], bar,
    checkpoint_seconds: float,
) -> None:  # fmt: skip
    """Train a job's stages, from its checkpoint if there is one, and write its blocks' files."""
    from calibration_store import StoreError, remove_file, write_json, write_npz

    samples = Samples(paths.calib_dir, job)
    checkpoint = Checkpoint(paths, job, plan)
    position, saved, done = checkpoint.load() or ({"stage": 0, "losses": []}, {}, {})
    if not done_is_of(job, position["stage"], done, settings.weight_bits):
        checkpoint.discard(ValueError("arrays of another unit"))
        position, saved, done = {"stage": 0, "losses": []}, {}, {}
    losses = position["losses"]
    bar.n += settings.iters * position["stage"]
    for stage in range(position["stage"], len(job.stages)):
        training = Training(unit_class(pipeline, job, job.stages[stage], samples, settings))
        if saved:
            try:
                training.restore(saved, position["iteration"])
                bar.n += position["iteration"]
            except ValueError as error:
                checkpoint.discard(error)
            saved = {}

        save = partial(checkpoint.save, stage, training, done, losses)
        try:
            found = train(training, bar, save, checkpoint_seconds)
        except NotFiniteError as error:
            save()
            write_json(paths.plan, plan | {"diverged": unit_name(job, stage)})
            raise StoreError(
                f"{unit_name(job, stage)}: {error}; the last good state, iteration {training.iteration}, is kept: --resume goes "
                "on from it, also with a lower --lr-alpha or --lr-activation-scale (TROUBLESHOOTING_GUIDE Issue 25)"
            ) from None
        found["kept_nearest"] = not found["end"] < found["nearest"]
        done |= layer_arrays(training, found["kept_nearest"])
        losses.append(found | {"layers": len(training.unit.layers)})
    for block in job.blocks:
        prefix = block + "_"
        write_npz(paths.block(block), {key: array for key, array in done.items() if key.startswith(prefix)})
        write_json(paths.losses(block), {"format": "adaround_losses_v1", "unit": job.name, "stages": losses})
    pipeline.mmdit.clear_modulation_params_cache()
    remove_file(checkpoint.path)


def unit_name(job: Job, stage: int) -> str:
    """What a stage of a job is called."""
    return job.name if len(job.stages) == 1 else f"{job.name} {('attention', 'MLP')[stage]}"


def done_is_of(job: Job, stage: int, done: "dict[str, np.ndarray]", bits: int) -> bool:
    """Whether a checkpoint's finished arrays are codes and scales of the layers of the stages before this one."""
    from calibration_store import layer_fault, layer_name

    layers: dict[str, dict] = {}
    for key, array in done.items():
        name, _, field = key.rpartition("__")
        layers.setdefault(layer_name(name), {})[field] = array
    expected = {name for names, _ in job.stages[:stage] for name in names}
    return set(layers) == expected and not any(layer_fault(fields, bits) for fields in layers.values())


def train_jobs(
    pipeline, paths: "WeightPaths", jobs: list[Job], plan: dict[str, Any], settings: Settings, unit_class: type[Unit],
    seconds: float,
) -> None:  # fmt: skip
    """Train every job that is not finished, with a checkpoint every `seconds`."""
    todo = [job for job in jobs if not finished(pipeline, paths, job, plan)]
    verify_cache(paths.calib_dir, todo)
    stages = sum(len(job.stages) for job in jobs)
    with progress_bar(settings.iters * stages, jobs[0].name, "it") as bar:
        for job in jobs:
            if job in todo:
                bar.set_description(job.name)
                run_job(pipeline, paths, job, plan, settings, unit_class, bar, seconds)
            else:
                bar.n += settings.iters * len(job.stages)


def finished(pipeline, paths: "WeightPaths", job: Job, plan: dict[str, Any]) -> bool:
    """Whether every block of the job is on disk, valid, and of this model's layers."""
    from calibration_store import LOSSES, StoreError, read_quantized_block

    try:
        found = {}
        for block in job.blocks:
            found |= read_quantized_block(paths, block, plan)
            losses = LOSSES.read(paths.losses(block))
            if losses["unit"] != job.name or len(losses["stages"]) != len(job.stages):
                return False
    except StoreError:
        return False
    layers = [name for names, _ in job.stages for name in names]
    shapes = {name: weight.shape for name, weight in zip(layers, layer_weights(pipeline, layers), strict=True)}
    return {name: fields["q"].shape for name, fields in found.items()} == shapes


def write_metadata(paths: "WeightPaths", plan: dict[str, Any], jobs: list[Job]) -> list[tuple[str, dict]]:
    """Write metadata.json, last; returns (unit, losses) of every trained unit."""
    from calibration_store import LOSSES, WEIGHTS_FORMAT, write_json

    rows, blocks = [], {}
    for job in jobs:
        stages = LOSSES.read(paths.losses(job.blocks[0]))["stages"]
        rows += [(unit_name(job, stage), losses) for stage, losses in enumerate(stages)]
        for block in job.blocks:
            blocks[block] = {"unit": job.name, "stages": stages}
    write_json(paths.metadata, {**plan, "format": WEIGHTS_FORMAT, "losses": blocks})
    return rows


def print_losses(rows: list[tuple[str, dict]]) -> None:
    """The table at the end: errors on held-out samples, relative to round-to-nearest on the training samples."""
    click.echo(
        f"{'error, round-to-nearest = 1':16} {'nearest':>9} {'start':>9} {'hardened':>9} {'end':>9} {'with A8':>9} {'(training)':>11}"
    )
    for name, row in rows:
        figures = " ".join(
            f"{row[key]:9.3f}" if row[key] is not None else f"{'–':>9}"
            for key in ("nearest", "start", "hardened", "end", "end_activations")
        )
        kept = "  kept round-to-nearest (Issue 22)" if row["kept_nearest"] else ""
        click.echo(f"{name:27} {figures} {row['end_training']:11.3f}{kept}")


# --- the stage ----------------------------------------------------------------------------------------------


def make_plan(calib_dir: Path, unit: str, blocks: list[str], settings: Settings) -> dict[str, Any]:
    """What this run is (plan.json), and most of metadata.json."""
    from dataclasses import asdict

    from calibration_store import WEIGHTS_FORMAT, read_cache_metadata

    cache = read_cache_metadata(calib_dir)
    return {
        "format": WEIGHTS_FORMAT,
        "model_version": cache.get("model_version"),
        "calibration_run": cache.get("calibration_run"),
        "weights_fingerprint": cache.get("weights_fingerprint"),
        "unit": unit,
        "block_names": blocks,
        **asdict(settings),
        "num_samples": len(cache["samples"]),
        "selected_image_ids": cache["selected_image_ids"],
        "key_timesteps": cache["key_timesteps"],
    }


LEARNING_RATES = ("lr_alpha", "lr_activation_scale")
OPTIONS = {
    "unit": "--unit", "block_names": "--blocks", "iters": "--iters", "batch_size": "--batch-size", "weight_bits": "--weight-bits",
    "activation_bits": "--activation-bits", "group_size": "--group-size", "rounding": "--rounding", "qdrop": "--qdrop",
    "lr_alpha": "--lr-alpha", "lr_activation_scale": "--lr-activation-scale", "regularizer_weight": "--regularizer-weight",
    "seed": "--seed", "selected_image_ids": "cached images", "key_timesteps": "cached steps",
}  # fmt: skip


def choose(
    pipeline, cached: list[str], blocks: str | None, unit: str | None, settings: Settings
) -> tuple[list[str], str, list[str]]:
    """(layers, unit, blocks) of the run. Raises UsageError for blocks that are not cached and groups that do not fit."""
    from calibration_store import shown
    from hooks import block_slots, layer_slots

    model = list(block_slots(pipeline.mmdit))
    chosen = [name.strip() for name in blocks.split(",")] if blocks is not None else cached
    unknown = [name for name in chosen if name not in cached]
    if unknown:
        raise click.UsageError(
            f"--blocks: {', '.join(map(shown, unknown))} not in the cache, which has {', '.join(cached)}"
        )
    chosen = [name for name in cached if name in chosen]
    slots = layer_slots(pipeline.mmdit)
    layers = [name for name in slots if name.split(".")[0] in chosen]
    weights = [slots[name][0][slots[name][1]].weight for name in layers]
    if settings.group_size and any(weight.shape[1] % settings.group_size for weight in weights):
        widths = sorted({weight.shape[1] for weight in weights})
        raise click.UsageError(f"--group-size {settings.group_size} does not divide the layers' inputs ({widths})")
    if unit == "model" and chosen != model:
        raise click.UsageError(
            "--unit model needs every block: run cache_adaround_data.py without --blocks, and leave --blocks out here"
        )
    if unit is None:
        fits = sum(weight.size for weight in weights) <= MODEL_UNIT_LIMIT
        unit = "model" if chosen == model and fits else "block"
    return layers, unit, chosen


def estimate(pipeline, paths: "WeightPaths", job: Job, settings: Settings, unit_class: type[Unit]) -> tuple[float, int]:
    """(seconds of an iteration, peak bytes) from setting a job up and two timed iterations."""
    import mlx.core as mx

    mx.reset_peak_memory()
    samples = Samples(paths.calib_dir, job)
    training = Training(unit_class(pipeline, job, job.stages[0], samples, settings))
    training.iteration = settings.rounding_iters  # the tuning iterations take the most
    for _ in range(2):
        start = time.perf_counter()
        training.step()
        seconds = time.perf_counter() - start
    on_cpu = mx.default_device() == mx.Device(mx.cpu)  # else the peak holds the samples already
    return seconds, mx.get_peak_memory() + (samples.num_bytes if on_cpu else 0)


@stage_command
@calib_dir_option
@model_place_options
@click.option("--blocks", help="Blocks to train, such as mm0,mm5.  [default: all that are cached]")
@click.option(
    "--iters",
    type=click.IntRange(min=10),
    default=ITERS,
    help="Iterations per unit; the last 30 % tune scales and ranges.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=16, help="Cached samples per iteration.")
@click.option(
    "--weight-bits",
    type=click.Choice(["2", "3", "4", "5", "6", "8"]),
    default="4",
    help="Bits of a weight's code; those that MLX runs natively.",
)
@click.option(
    "--activation-bits",
    type=click.IntRange(0, 8),
    default=8,
    help="Bits of a layer's input (simulated); 0: unquantized.",
)
@click.option(
    "--group-size",
    type=click.Choice(["0", "32", "64", "128"]),
    default="64",
    help="Inputs that share a scale; 0: one scale per output channel; those that MLX runs natively.",
)
@click.option(
    "--unit",
    type=click.Choice(["block", "sublayer", "layer", "model"]),
    help="What is trained for its own output.  [default: model up to 100 M weights, else block]",
)
@click.option(
    "--rounding",
    type=click.Choice(["ste", "sigmoid"]),
    default="ste",
    help="ste: hard codes, straight-through gradient; sigmoid: AdaRound's, hardened on the way.",
)
@click.option(
    "--qdrop",
    type=click.FloatRange(0, 1),
    default=0.5,
    help="Share of input elements left unquantized while ranges are trained.",
)
@click.option(
    "--lr-alpha",
    type=click.FloatRange(min=0),
    default=None,
    help="Learning rate of the rounding variables.  [default: 4e-3 ste, 1e-2 sigmoid]",
)
@click.option(
    "--lr-activation-scale",
    type=click.FloatRange(min=0),
    default=5e-3,
    help="Learning rate of the (log) clipping ranges.",
)
@click.option(
    "--regularizer-weight",
    type=click.FloatRange(min=0),
    default=0.01,
    help="sigmoid: weight of the pull to 0 or 1, beside a loss of 1 for round-to-nearest.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Decides the batches.")
@click.option(
    "--checkpoint-seconds", type=click.FloatRange(min=0), default=30, help="How much of a unit's work a kill may cost."
)
@resume_options
def main(
    calib_dir: Path,
    model: str | None,
    local_checkpoint: Path | None,
    blocks: str | None,
    unit: str | None,
    lr_alpha: float | None,
    checkpoint_seconds: float,
    resume: bool,
    force: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Stage 3W: learned rounding (AdaRound, TaQ-DiT)."""
    from calibration_store import (
        WEIGHTS_PLAN,
        WeightPaths,
        check_stage,
        locked_folder,
        open_stage,
        plan_before,
        read_cache_metadata,
        read_manifest,
        require_space,
        write_json,
    )

    if options["activation_bits"] == 1:
        raise click.UsageError("--activation-bits 1: a symmetric grid needs 2 bits or more; 0 leaves activations alone")
    if lr_alpha is None:
        lr_alpha = 4e-3 if options["rounding"] == "ste" else 1e-2
    options |= {key: int(options[key]) for key in ("weight_bits", "group_size")}
    settings = Settings(lr_alpha=lr_alpha, **options)
    paths = WeightPaths(calib_dir)
    cache = read_cache_metadata(calib_dir)
    manifest = read_manifest(calib_dir)
    from diffusion import load_run_pipeline, run_cpu_streams_side_by_side

    run_cpu_streams_side_by_side()
    pipeline = load_run_pipeline(manifest, "float32", model, local_checkpoint)
    layers, unit, chosen = choose(pipeline, cache["block_names"], blocks, unit, settings)
    jobs = plan_jobs(layers, chosen, unit)
    plan = make_plan(calib_dir, unit, chosen, settings)
    click.echo(
        f"{manifest['model_version']}: {len(layers)} layers of {len(chosen)} blocks, W{settings.weight_bits}"
        f"{f'A{settings.activation_bits}' if settings.activation_bits else ''}, "
        f"{f'groups of {settings.group_size}' if settings.group_size else 'per output channel'}, unit {unit}, "
        f"{settings.iters} iterations of {settings.batch_size}, {len(cache['samples'])} cached samples"
    )
    before = plan_before(paths.plan, WEIGHTS_PLAN, resume) or {}
    compared = {key: flag for key, flag in OPTIONS.items() if not ("diverged" in before and key in LEARNING_RATES)}
    check_stage(paths, paths.plan, WEIGHTS_PLAN, plan, compared, resume, force)
    unit_class = LayerUnit if unit == "layer" else Unit
    todo = [job for job in jobs if force or not finished(pipeline, paths, job, plan)]
    size = BYTES_PER_WEIGHT * sum(weight.size for weight in layer_weights(pipeline, layers_of(todo)))
    if dry_run:
        print_estimate(pipeline, paths, todo, len(jobs), None if force else plan, settings, unit_class, size)
        return
    require_space(paths.root, size, "give fewer --blocks")
    with locked_folder(paths.root):
        check_stage(paths, paths.plan, WEIGHTS_PLAN, plan, compared, resume, force)
        open_stage(paths, paths.plan, plan, force)
        if "diverged" in before:
            write_json(paths.plan, plan)
        try:
            train_jobs(pipeline, paths, jobs, plan, settings, unit_class, checkpoint_seconds)
            rows = write_metadata(paths, plan, jobs)
        except KeyboardInterrupt:
            raise Interrupted(what_is_kept(paths)) from None
    print_losses(rows)
    click.echo(f"wrote {paths.metadata} and a file per block")


def layers_of(jobs: Sequence[Job]) -> list[str]:
    """Every layer that the jobs train."""
    return [name for job in jobs for names, _ in job.stages for name in names]


def what_is_kept(paths: "WeightPaths") -> str:
    """After Ctrl-C: what is on the disk, and how to go on."""
    blocks = [path.stem for path in paths.owned_files() if path.suffix == ".npz" and path != paths.checkpoint]
    kept = [f"finished blocks ({', '.join(blocks)})"] if blocks else []
    kept += ["a checkpoint"] if paths.checkpoint.exists() else []
    what = (
        f"{' and '.join(kept)} kept in {paths.root}" if kept else "nothing was finished, and no checkpoint written, yet"
    )
    return f"interrupted: {what}; go on with: {resume_command()}"


def print_estimate(
    pipeline, paths: "WeightPaths", todo: list[Job], jobs: int, plan: dict[str, Any], settings: Settings,
    unit_class: type[Unit], size: int,
) -> None:  # fmt: skip
    """--dry-run: time, memory and bytes of what is left to do."""
    if not todo:
        click.echo(f"nothing to do: all {jobs} units are finished in {paths.root}")
        return
    try:
        seconds, peak = estimate(pipeline, paths, todo[0], settings, unit_class)
    except NotFiniteError as error:
        raise click.ClickException(f"{todo[0].name}: {error}: nothing can be learned with these options") from None
    left = settings.iters * sum(len(job.stages) for job in todo)
    started = Checkpoint(paths, todo[0], plan).load() if plan else None
    if started is not None:
        left -= settings.iters * started[0]["stage"] + min(started[0]["iteration"], settings.iters)
    click.echo(
        f"to do: {len(todo)} of {jobs} units, {left} iterations: about {format_seconds(seconds * left)}, {format_bytes(peak)} of memory at "
        f"the peak, at most {format_bytes(size)} in {paths.root}"
    )


def layer_weights(pipeline, layers: list[str]) -> "list[mx.array]":
    """The weights of these layers."""
    from hooks import layer_slots

    slots = layer_slots(pipeline.mmdit)
    return [slots[name][0][slots[name][1]].weight for name in layers]


if __name__ == "__main__":
    main()
