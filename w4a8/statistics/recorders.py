"""Recorders: what hooks report in one forward pass becomes its statistics."""

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
    """Statistics of one pass: `layers` maps a layer to its distinct input, `channels` are those of each distinct
    input, `results` are [limits, histograms, moments] of one or several distinct inputs, in order."""

    layers: dict[str, int]
    channels: list[int]
    results: list[list]


class LazyRecorder:
    """Adds the statistics to the graph of the pass; one `mx.eval` takes everything pending.

    Left alone, MLX computes statistics last, since nothing in the pass waits for them, and every input lives
    until then. So the last layer of each group of inputs is made to depend on the group's statistics: its inputs
    are used up, and freed, before the pass goes on.
    """

    def __init__(self, compute: Callable[[list[mx.array]], list[mx.array]]):
        self._compute = compute
        self._pass = PassStatistics({}, [], [])
        self._waiting: list = []
        self._last = None

    def record(self, name: str, x: mx.array) -> mx.array | None:
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
        """Evaluate the pass."""
        self._last = None
        self._flush()
        mx.eval(self._pass.results, output)
        return self._pass


class StreamingRecorder:
    """For the CPU: hands each input to NumPy while MLX's own thread computes the next ones.

    At most LOOKAHEAD inputs wait at a time, about those of one block. `mx.async_eval` only starts the work; the
    one blocking `mx.eval` of the pass is that of its output.
    """

    LOOKAHEAD = 6

    def __init__(self):
        self._pass = PassStatistics({}, [], [])
        self._waiting: deque = deque()
        self._last = None

    def record(self, name: str, x: mx.array) -> None:
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
        """As LazyRecorder.finish."""
        self._last = None
        while self._waiting:
            self._take_oldest()
        mx.eval(output)
        return self._pass


def new_recorder(implementation: str) -> LazyRecorder | StreamingRecorder:
    """A recorder for one pass; implementation is what `choose_statistics` gave."""
    if implementation == "cpu":
        return StreamingRecorder()
    if implementation == "mlx":
        return LazyRecorder(mlx_statistics)
    return LazyRecorder(functools.partial(gpu_statistics, backend=implementation))


def partial_arrays(statistics: PassStatistics, image_id: int, step: int, dtype: str) -> dict[str, np.ndarray]:
    """One pass's statistics as the arrays of a partial file. Raises StoreError when an activation is not finite.

    dtype: the run's precision; what to try follows from it.
    """
    limits, histograms, moments = (
        [np.asarray(array) for array in arrays] for arrays in zip(*statistics.results, strict=True)
    )
    histograms = np.concatenate(histograms)
    for name, index in statistics.layers.items():
        if histograms[index, 258]:
            way = "a smaller --cfg-weight or another copy of the model" if dtype == "float32" else "--dtype float32"
            raise StoreError(
                f"{name}: {histograms[index, 258]} activations are not finite at step {step} of image {image_id}; "
                f"run generate_calibration_data.py with {way}"
            )
    return {
        "image_id": np.int32(image_id),
        "step_index": np.int32(step),
        "layers": np.array(list(statistics.layers)),
        "inputs": np.array(list(statistics.layers.values()), np.int32),
        "channels": np.array(statistics.channels, np.int32),
        "limits": np.concatenate(limits, axis=1),
        "moments": np.concatenate(moments, axis=1),
        "histograms": histograms,
    }


def collect_pass(one: Pass, implementation: str) -> PassStatistics:
    """Run a pass under hooks; implementation is what `choose_statistics` gave."""
    recorder = new_recorder(implementation)
    with hooked_layers(one.pipeline.mmdit, recorder.record):
        return recorder.finish(one.forward())


def write_pass(
    paths: ActivationPaths, run: str, statistics: PassStatistics, image_id: int, step: int, dtype: str
) -> None:
    """Write one pass's partial file of a calibration run; runs on the writer's thread while the next pass computes."""
    write_partial(paths, partial_arrays(statistics, image_id, step, dtype), run)
