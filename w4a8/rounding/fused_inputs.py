"""Quantize a layer's inputs per token, leave a share of them as they are (QDrop), and cast them: one kernel on a GPU."""

import functools
import warnings
from collections.abc import Callable

import mlx.core as mx

from w4a8.quantized.dynamic_rules import SMALLEST_STEP, DynamicPerToken
from w4a8.statistics.kernel_source import KERNEL_HEADER

THREADS = 256  # of a group, which takes a token
# A group reads its token for the range, and once more to quantize it; the second reading hits the cache. The hash that
# draws the elements that stay as they are is PCG's output function (O'Neill 2014), once for the token and once for the
# channel.
SOURCE = """
// Metal adds the attributes whose names stand here: thread_position_in_threadgroup, threadgroup_position_in_grid.
SHARED float lows[THREADS], highs[THREADS];
const long begin = (long)GROUP * WIDTH;
float low = 0.0f, high = 0.0f;
for (int i = THREAD; i < WIDTH; i += THREADS) {
    const float value = (float)x[begin + i];
    low = value < low ? value : low;
    high = value > high ? value : high;
}
lows[THREAD] = low;
highs[THREAD] = high;
BARRIER;
for (int half = THREADS / 2; half > 0; half /= 2) {
    if (THREAD < half) {
        lows[THREAD] = lows[THREAD + half] < lows[THREAD] ? lows[THREAD + half] : lows[THREAD];
        highs[THREAD] = highs[THREAD + half] > highs[THREAD] ? highs[THREAD + half] : highs[THREAD];
    }
    BARRIER;
}
low = lows[0];
high = highs[0];
float step_ = (high - low) / (float)TOP;
step_ = step_ > SMALLEST ? step_ : SMALLEST;
const float zero_point = rint(-low / step_);
const unsigned int token = mixed((unsigned int)GROUP ^ (unsigned int)key[0]) ^ (unsigned int)key[1];
for (int i = THREAD; i < WIDTH; i += THREADS) {
    const float value = (float)x[begin + i];
    float code = rint(value / step_) + zero_point;
    code = code < 0.0f ? 0.0f : (code > (float)TOP ? (float)TOP : code);
    const bool stays = (mixed(mixed(token) + (unsigned int)i) >> 8) < (unsigned int)STAYING;
    given[begin + i] = (U)(stays ? value : (code - zero_point) * step_);
}
"""
FUNCTIONS = """
FUNCTION unsigned int mixed(unsigned int state) {
    state = state * 747796405u + 2891336453u;
    const unsigned int word = ((state >> ((state >> 28u) + 4u)) ^ state) * 277803737u;
    return (word >> 22u) ^ word;
}
"""


def dropped_inputs(rule: DynamicPerToken, x: mx.array, drop: float, key: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return x (…, channels) quantized by the rule, the share `drop` of the elements unquantized, in dtype.

    key: decides which elements stay. Gradients pass through unchanged. The kernel and its plain twin draw other elements.
    """

    @mx.custom_function
    def through(x: mx.array) -> mx.array:
        kernel = _kernel(rule.bits)
        if kernel is None:
            quantized = rule.at(0.0, 1)("", x.astype(mx.float32))
            return mx.where(mx.random.bernoulli(drop, x.shape, key), x, quantized).astype(dtype)
        return kernel(x, drop, key, dtype)

    @through.vjp
    def gradient(x: mx.array, slope: mx.array, output: mx.array) -> mx.array:
        return slope.astype(x.dtype)

    return through(x)  # type: ignore[return-value]  # MLX's stubs say object


@functools.cache
def _kernel(bits: int) -> Callable | None:
    """Return the kernel; None on a CPU, and with a warning where it does not give what its plain twin gives."""
    if mx.default_device() == mx.Device(mx.cpu):
        return None
    kernel, x = _built(bits), mx.random.normal((7, 320), key=mx.random.key(0)) * 3
    try:
        found = kernel(x, 0.0, mx.random.key(1), mx.bfloat16)
        if mx.array_equal(found, DynamicPerToken(bits).at(0.0, 1)("", x).astype(mx.bfloat16)).item():
            return kernel
        failure = "its results differ"
    except (RuntimeError, ValueError) as error:
        failure = " ".join(str(error).split())[:200]
    warnings.warn(
        f"the kernel of quantized inputs failed its self-check ({failure}): MLX's operations are used", stacklevel=2
    )
    return None


def _built(bits: int) -> Callable:
    backend = "metal" if mx.metal.is_available() else "cuda"
    build = mx.fast.metal_kernel if backend == "metal" else mx.fast.cuda_kernel
    constants = f"#define THREADS {THREADS}\n#define TOP {2**bits - 1}\n#define SMALLEST {SMALLEST_STEP}f\n"
    header = KERNEL_HEADER[backend] + constants + FUNCTIONS
    kernel: Callable = build(f"dropped_inputs_{bits}", ["x", "key"], ["given"], SOURCE, header)  # type: ignore[assignment]

    def run(x: mx.array, drop: float, key: mx.array, dtype: mx.Dtype) -> mx.array:
        return kernel(
            inputs=[x, key],
            template=[("U", dtype), ("WIDTH", x.shape[-1]), ("STAYING", round(drop * 2**24))],
            grid=(x.size // x.shape[-1] * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[x.shape],
            output_dtypes=[dtype],
        )[0]

    return run
