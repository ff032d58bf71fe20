"""Recorders: each turns the inputs that hooks report in one forward pass into the statistics of the pass."""

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from calibration_store.errors import StoreError
from calibration_store.layout import ActivationPaths
from calibration_store.partials import write_partial
from w4a8.model.hooks import hooked_layers
from w4a8.passes import Pass
from w4a8.statistics.kernels import INPUTS_PER_KERNEL, cpu_statistics, gpu_statistics, mlx_statistics


@dataclass
class PassStatistics:
    """Statistics of one pass, over its distinct inputs: layers that are given the same array share one."""

    layers: dict[str, int]  # layer -> index of its distinct input
    channels: list[int]  # number of channels of each distinct input
    results: list[list]  # [limits, histograms, moments] of one or several distinct inputs each, in order


class LazyRecorder:
    """A recorder that adds the statistics to the graph of the pass; one `mx.eval` computes everything pending.

    Left alone, MLX computes statistics last, since nothing in the pass waits for them, and every input lives
    until then. Therefore the last layer of each group of inputs is made to depend on the group's statistics: MLX uses
    the inputs up, and frees them, before the pass goes on.
    """

    def __init__(self, compute: Callable[[list[mx.array]], list[mx.array]]):
        self._compute = compute
        self._pass = PassStatistics({}, [], [])
        self._waiting: list[mx.array] = []
        self._last: mx.array | None = None

    def record(self, name: str, x: mx.array) -> mx.array | None:
        """Note a layer's input x (…, channels); return x tied to the statistics of a full group, else None."""
        tied = None
        if x is not self._last:  # q, k and v get the same array
            self._last = x
            self._pass.channels.append(x.shape[-1])
            self._waiting.append(x.reshape(-1, x.shape[-1]))
            if len(self._waiting) == INPUTS_PER_KERNEL:
                self._flush()
                tied = mx.depends([x], self._pass.results[-1])[0]
        self._pass.layers[name] = len(self._pass.channels) - 1
        return tied

    def _flush(self) -> None:
        if self._waiting:
            self._pass.results.append(self._compute(self._waiting))
            self._waiting = []

    def finish(self, output: mx.array) -> PassStatistics:
        """Evaluate the pass and return its statistics. output: the result of the pass."""
        self._last = None
        self._flush()
        mx.eval(self._pass.results, output)
        return self._pass


class StreamingRecorder:
    """A recorder for the CPU: NumPy takes each input while MLX's own thread computes the next ones.

    At most LOOKAHEAD inputs wait at a time, which is about the number that one block has. `mx.async_eval` only starts
    the work; the one blocking `mx.eval` of the pass is that of its output.
    """

    LOOKAHEAD = 6

    def __init__(self) -> None:
        self._pass = PassStatistics({}, [], [])
        self._waiting: deque[mx.array] = deque()
        self._last: mx.array | None = None

    def record(self, name: str, x: mx.array) -> None:
        """Note a layer's input x (…, channels), and begin to compute it."""
        if x is not self._last:
            self._last = x
            self._pass.channels.append(x.shape[-1])
            x = x.astype(mx.float32) if x.dtype == mx.bfloat16 else x  # NumPy has no bfloat16
            mx.async_eval(x)
            self._waiting.append(x)
            if len(self._waiting) > self.LOOKAHEAD:
                self._take_oldest()
        self._pass.layers[name] = len(self._pass.channels) - 1

    def _take_oldest(self) -> None:
        x = self._waiting.popleft()
        self._pass.results.append(cpu_statistics(np.array(x, copy=False).reshape(-1, x.shape[-1])))

    def finish(self, output: mx.array) -> PassStatistics:
        """Evaluate the pass and return its statistics. output: the result of the pass."""
        self._last = None
        while self._waiting:
            self._take_oldest()
        mx.eval(output)
        return self._pass


def new_recorder(implementation: str) -> LazyRecorder | StreamingRecorder:
    """Return a recorder for one pass. implementation: a name that `choose_statistics` returns."""
    if implementation == "cpu":
        return StreamingRecorder()
    if implementation == "mlx":
        return LazyRecorder(mlx_statistics)
    return LazyRecorder(functools.partial(gpu_statistics, backend=implementation))


def partial_arrays(statistics: PassStatistics, image_id: int, step: int, dtype: str) -> dict[str, np.ndarray]:
    """Return the statistics of one pass as the arrays of a partial file (`calibration_store.partials.PARTIAL`).

    dtype: the run's precision, which the advice in the error follows from. Raises StoreError when an activation is not
    finite.
    """
    limits, grouped, moments = (
        [np.asarray(array) for array in arrays] for arrays in zip(*statistics.results, strict=True)
    )
    histograms = np.concatenate(grouped)
    for name, index in statistics.layers.items():
        if histograms[index, 258]:
            way = "a smaller --cfg-weight or another copy of the model" if dtype == "float32" else "--dtype float32"
            raise StoreError(
                f"{name}: {histograms[index, 258]} activations are not finite at step {step} of image {image_id}; "
                f"run generate_calibration_data.py with {way}"
            )
    return {
        "image_id": np.array(image_id, np.int32),
        "step_index": np.array(step, np.int32),
        "layers": np.array(list(statistics.layers)),
        "inputs": np.array(list(statistics.layers.values()), np.int32),
        "channels": np.array(statistics.channels, np.int32),
        "limits": np.concatenate(limits, axis=1),
        "moments": np.concatenate(moments, axis=1),
        "histograms": histograms,
    }


def collect_pass(one: Pass, implementation: str) -> PassStatistics:
    """Run a pass under hooks and return its statistics. implementation: a name that `choose_statistics` returns."""
    recorder = new_recorder(implementation)
    with hooked_layers(one.pipeline.mmdit, recorder.record):
        return recorder.finish(one.forward())


def write_pass(
    paths: ActivationPaths, run: str, statistics: PassStatistics, image_id: int, step: int, dtype: str
) -> None:
    """Write the partial file of one pass. run: the identity of the calibration run.

    The writer's thread calls the function while the next pass computes.
    """
    write_partial(paths, partial_arrays(statistics, image_id, step, dtype), run)
