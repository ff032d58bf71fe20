"""The training that every phase of stage 3W shares: state, optimizers, batches, checkpoints, grids and ranges."""

import functools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_map

from calibration_store.names import block_of
from w4a8.backend.interrupts import finishing
from w4a8.backend.parallel import compiled
from w4a8.backend.progress import ProgressBar, say_aside
from w4a8.rounding.methods import Arrays
from w4a8.rounding.rest import size_of
from w4a8.rounding.settings import Indices, Settings, cosine
from w4a8.rounding.training_samples import TrainingSamples
from w4a8.rounding.units import Gradients

SAID_FROM = 60.0  # seconds of a training after which its last measurement is announced
CHECKPOINT_SECONDS = 30.0  # between checkpoints
CHECKPOINT_SHARE = 0.1  # the share of the time that writing them may take
CURVE_POINTS = 50  # points of the curve of training losses that is kept
OPTIMIZERS = ("alpha", "scale", "range", "rest")  # named after what they move; `scale`: zero points and biases, too


class NotFiniteError(ArithmeticError):
    """A loss or a gradient is NaN or infinite: nothing can be learned from it."""


class Adam(optimizers.Adam):
    """MLX's Adam, with a parameter's update in one kernel on a GPU."""

    @functools.cached_property
    def _update(self) -> Callable:
        def update(gradient, parameter, m, v, learning_rate, step):  # MLX arrays
            within = {"m": m, "v": v}
            known, self._state = self._state, {"learning_rate": learning_rate, "step": step}
            try:
                moved = optimizers.Adam.apply_single(self, gradient, parameter, within)
            finally:
                self._state = known
            return moved, within["m"], within["v"]

        return compiled(update)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        """Return the moved parameter, and put its new moments m and v into state."""
        moved, state["m"], state["v"] = self._update(
            gradient, parameter, state["m"], state["v"], self.state["learning_rate"], self.state["step"]
        )
        return moved


class TrainedUnit(Protocol):
    """A unit, or the whole model, as its training sees it."""

    name: str
    layers: list[str]
    settings: Settings
    samples: TrainingSamples
    input_of: dict[str, str]  # layer -> the layer that names their shared input
    start: dict[str, Arrays]


class Training(ABC):
    """The state, the optimizers and the iteration of a training. A subclass defines what an iteration moves."""

    codes_per_step = 10.0  # codes that a zero point moves where a scale moves by a factor of e
    unit: TrainedUnit
    _finite: mx.array  # whether the gradients of the iteration at work are
    _before: dict[str, Any]  # the state that they belong to

    def __init__(self, unit: TrainedUnit):
        """Begin at the unit's start, with fresh optimizers."""
        self.unit, self.settings, self.iteration = unit, unit.settings, 0
        self.state: dict[str, Arrays] = {key: dict(value) for key, value in unit.start.items()}
        self.optimizers = {name: Adam(1e-3, bias_correction=True) for name in OPTIMIZERS}
        self.fixed = self.first_fixed()
        # A point of the curve is the sum of the losses of a stretch of iterations.
        self.curve = np.zeros(min(CURVE_POINTS, self.iters), np.float32)
        self._good = (self._parts(), 0)  # the last state whose loss was finite, and its iteration

    @property
    @abstractmethod
    def iters(self) -> int:
        """The number of iterations."""

    @property
    @abstractmethod
    def inputs_from(self) -> int:
        """The first iteration whose inputs are quantized."""

    def first_fixed(self) -> Arrays:
        """Return the arrays that the rounding method keeps beside α, at the start."""
        return {}

    def changed_share(self) -> float | None:
        """Return the share of the weights that no longer round as they did at the start, 0 to 1; None: codes stay."""
        return None

    @abstractmethod
    def measure(self) -> dict[str, Any]:
        """Return the losses of the finished training. Raises NotFiniteError where one is not finite."""

    # checkpoints

    def arrays(self) -> dict[str, mx.array]:
        """Return all arrays that the rest of the training follows from, by their paths (`flatten`)."""
        tree: dict[str, Any] = {"state": self.state, "fixed": self.fixed, "curve": mx.array(self.curve)}
        return dict(flatten(tree | {f"{name}_optimizer": each.state for name, each in self.optimizers.items()}))

    def restore(self, arrays: Mapping[str, np.ndarray], iteration: int) -> None:
        """Go on from `arrays` at an iteration. Raises ValueError when they are another unit's, or not finite."""
        if not 0 <= iteration <= self.iters:
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
        needed = [name for name in OPTIMIZERS if name != "rest" or self.unit.start.get(name)]  # 0.8.0 knew no rest
        missing = [name for name in needed if f"{name}_optimizer" not in tree]
        if missing:
            raise ValueError(f"no {missing[0]}_optimizer")
        self.state = {key: tree["state"].get(key, {}) for key in self.unit.start}
        self.fixed, self.curve = tree.get("fixed", {}), np.array(tree["curve"])
        for name in needed:
            self.optimizers[name].state = tree[f"{name}_optimizer"]
        self.iteration = iteration
        self._good = (self._parts(), iteration)

    def _check_moment(self, name: str, array: np.ndarray) -> None:
        """Raise ValueError where an optimizer's m or v has another shape than the array that it moves."""
        optimizer, *path = name.split("|")
        if optimizer.endswith("_optimizer") and path[-1] in ("m", "v"):
            kind = optimizer.removesuffix("_optimizer")
            moved = self.state[path[0] if kind == "scale" else kind]
            own = moved.get(path[-2])
            if own is None or own.shape != array.shape:
                raise ValueError(f"{name} is of another layer")

    def _parts(self) -> dict[str, Any]:
        """Return the state as it is now: references, no copies, since MLX arrays do not change."""
        states = {name: each.state for name, each in self.optimizers.items()}
        return tree_map(lambda array: array, {"state": self.state, "fixed": self.fixed, **states})

    def _set(self, parts: dict[str, Any]) -> None:
        """Go back to a state that `_parts` gave."""
        self.state, self.fixed = parts["state"], parts["fixed"]
        for name, each in self.optimizers.items():
            each.state = parts[name]

    # one iteration

    @abstractmethod
    def step(self) -> float:
        """Take one iteration on a batch that only seed and iteration decide; return its loss.

        Raises NotFiniteError, after a return to the last state whose loss and gradients were finite.
        """

    def drawn(self, iteration: int) -> np.ndarray:
        """Return the samples of an iteration, sorted; seed and iteration decide."""
        random, near = np.random.default_rng([self.settings.seed, iteration]), self.near(iteration)
        return np.sort(random.choice(near, min(self.settings.batch_size, len(near)), replace=False))

    def near(self, iteration: int) -> Indices:
        """Return the samples that an iteration draws from.

        They are all training samples, or a window that moves with the iterations and has passed over all at the end.
        """
        training, window = self.unit.samples.training, self.settings.window
        if not 0 < window < len(training):
            return training
        order = np.random.default_rng(self.settings.seed).permutation(training)
        begin = iteration * (len(training) - window) // max(1, self.iters - 1)
        return order[begin : begin + window]

    def _note(self, loss: mx.array, gradients: Any) -> None:
        """Note the state, before it moves, for `_finished`, which keeps it as good where its loss and gradients are finite."""
        leaves = tree_flatten([loss, gradients])
        assert isinstance(leaves, list)  # MLX's types allow a dictionary, which needs a `destination`
        self._finite = mx.stack([mx.isfinite(array).all() for _, array in leaves]).all()
        self._before = self._parts()

    def _finished(self, loss: mx.array) -> float:
        """Evaluate the moved state, count the iteration and its loss, and return the loss.

        An iteration waits for the device here, so that a GPU makes the gradients while Python describes how they move the
        state. Where a gradient is not finite, go back to the last good state and raise NotFiniteError.
        """
        mx.eval(loss, self._finite)
        value = float(loss)
        if not self._finite.item():
            found, self.iteration = self.iteration, self._good[1]
            self._set(self._good[0])
            what = "a gradient is" if math.isfinite(value) else "the loss is"
            raise NotFiniteError(f"{what} not finite at iteration {found}")
        # This drops the older state before the moved one is made, so that memory holds two states and not three.
        self._good = (self._before, self.iteration)
        mx.eval(self.state, self.fixed, [each.state for each in self.optimizers.values()])
        self.curve[self._stretch(self.iteration)] += np.float32(value)
        self.iteration += 1
        return value

    def _stretch(self, iteration: int) -> int:
        """Return the point of the curve that an iteration counts in."""
        return iteration * len(self.curve) // self.iters

    def mean_losses(self) -> list[float]:
        """Return the training losses of the whole training: the mean of each stretch of iterations."""
        counts = np.bincount([self._stretch(iteration) for iteration in range(self.iters)])
        return [round(float(total) / count, 6) for total, count in zip(self.curve, counts, strict=True)]

    def move_grids(self, slopes: Gradients, rate: float) -> None:
        """Move scales (on a log scale), zero points and biases along their slopes, at a learning rate."""
        state, codes = self.state, self.codes_per_step
        parameters = {
            "scale": {name: mx.log(scale) for name, scale in state["scale"].items()},
            "zero_point": {name: zero_point / codes for name, zero_point in state["zero_point"].items()},
            "bias": state["bias"],
        }
        slopes = {**slopes, "zero_point": {name: slope * codes for name, slope in slopes["zero_point"].items()}}
        self.optimizers["scale"].learning_rate = rate
        moved = self.optimizers["scale"].apply_gradients(slopes, parameters)
        state["scale"] = {name: mx.exp(value) for name, value in moved["scale"].items()}
        state["zero_point"] = {name: value * codes for name, value in moved["zero_point"].items()}
        state["bias"] = moved["bias"]

    def move_rest(self, gradients: Arrays, rate: float) -> None:
        """Move the 16-bit rest, {path: array}, in units of each parameter's size at the start, at a learning rate."""
        sizes = self._rest_sizes
        self.optimizers["rest"].learning_rate = rate
        moved = self.optimizers["rest"].apply_gradients(
            {path: gradient * sizes[path] for path, gradient in gradients.items()},
            {path: array / sizes[path] for path, array in self.state["rest"].items()},
        )
        self.state["rest"] = {path: array * sizes[path] for path, array in moved.items()}

    @functools.cached_property
    def _rest_sizes(self) -> dict[str, float]:
        """The size of each parameter of the rest at the start; measured once, since each needs an evaluation."""
        blocks = len({block_of(name) for name in self.unit.layers})
        return {path: size_of(array, blocks) for path, array in self.unit.start["rest"].items()}

    def move_ranges(self, gradients: Arrays) -> None:
        """Move the activation ranges (on a log scale)."""
        state, settings = self.state, self.settings
        of_input: Arrays = {}
        for name, gradient in gradients.items():
            source = self.unit.input_of[name]
            of_input[source] = of_input.get(source, mx.array(0.0)) + gradient * mx.exp(state["range"][source])
        progress = (self.iteration - self.inputs_from) / max(1, self.iters - self.inputs_from)
        self.optimizers["range"].learning_rate = settings.lr_activation_scale * cosine(progress)
        state["range"] = self.optimizers["range"].apply_gradients(of_input, state["range"])


def grid_slopes(codes: Arrays, scales: Arrays, zero_points: Arrays, gradients: Arrays) -> Gradients:
    """Return d loss / d log scale and d loss / d zero point by layer, each (out, groups).

    Ŵ = scale·(code − zero point); gradients: d loss / dŴ (out, in); codes (out, in); scales and zero points (out,
    groups).
    """
    slopes: Gradients = {"scale": {}, "zero_point": {}}
    for name, code in codes.items():
        scale, zero_point = scales[name], zero_points[name]
        grouped = gradients[name].reshape(*scale.shape, -1)
        distance = code.reshape(grouped.shape) - zero_point[..., None]
        slopes["scale"][name] = (grouped * distance).sum(axis=-1) * scale
        slopes["zero_point"][name] = -grouped.sum(axis=-1) * scale
    return slopes


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, mx.array]]:
    """Yield (path, array) of nested dictionaries, keys joined by "|".

    mlx.utils joins them by dots, which layers have in their names.
    """
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}|")
        else:
            yield prefix + name, value


def unflatten(arrays: Mapping[str, mx.array]) -> dict[str, Any]:
    """Return nested dictionaries from the paths of `flatten`."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *parents, name = path.split("|")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    return tree


def train(
    training: Training, bar: ProgressBar, save: Callable[[], None], checkpoint_seconds: float | None,
    count: Callable[[], None],
) -> dict[str, Any]:  # fmt: skip
    """Run the training to its end, and return its losses and their curve.

    save: writes a checkpoint, called every checkpoint_seconds; None means every CHECKPOINT_SECONDS, or less often where
    that would take more than CHECKPOINT_SHARE of the time. count: called after every iteration. Ctrl-C waits for the
    iteration's end, and leaves a checkpoint.
    """
    begun = last_saved = time.monotonic()
    pause = CHECKPOINT_SECONDS if checkpoint_seconds is None else checkpoint_seconds
    average, share = None, training.changed_share()
    with finishing("the iteration") as interrupted:
        while training.iteration < training.iters:
            loss = training.step()
            average = loss if average is None else 0.9 * average + 0.1 * loss
            count()
            if training.iteration % 10 == 0:
                share = training.changed_share()
            changed = {} if share is None else {"changed": f"{share:.1%}"}
            bar.set_postfix(loss=f"{average:.3f}", **changed, refresh=False)
            now = time.monotonic()
            if interrupted() or now - last_saved > pause:
                save()
                last_saved = time.monotonic()
                if checkpoint_seconds is None:
                    pause = max(CHECKPOINT_SECONDS, (last_saved - now) / CHECKPOINT_SHARE)
            if interrupted():
                raise KeyboardInterrupt
    if time.monotonic() - begun > SAID_FROM:
        say_aside(bar, f"{training.unit.name}: measuring the error on held-out samples")
    return training.measure() | {"curve": training.mean_losses()}
