"""Quantization that is trained through: MLX arrays."""

import mlx.core as mx

from w4a8.analysis.clipping_ranges import levels

ZETA, GAMMA = 1.1, -0.1  # AdaRound (Nagel et al. 2020), equation 23


def rectified_sigmoid(alpha):
    """h(α) = clip(σ(α)·(ζ − γ) + γ, 0, 1): how far a weight is rounded up. MLX arrays of any shape."""
    return mx.clip(mx.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)


def rectified_sigmoid_inverse(h):
    """α with h(α) = h, for h within (0, 1). MLX arrays of any shape."""
    return -mx.log((ZETA - GAMMA) / (h - GAMMA) - 1)


def rectified_sigmoid_gradient(alpha):
    """dh/dα; 0 where h is clipped. MLX arrays of any shape."""
    sigmoid = mx.sigmoid(alpha)
    stretched = sigmoid * (ZETA - GAMMA) + GAMMA
    return sigmoid * (1 - sigmoid) * (ZETA - GAMMA) * ((stretched > 0) & (stretched < 1))


def rounding_regularizer_gradient(h, beta: float):
    """d/dh of AdaRound's regularizer Σ (1 − |2h − 1|^β): pushes h to 0 or 1, the harder the smaller β. MLX arrays."""
    distance = 2 * h - 1
    return -2 * beta * mx.sign(distance) * mx.abs(distance) ** (beta - 1)


def fake_quantize(x, clipping_range, bits: int, shift=None):
    """x̂ = Δ·clip(round((x − shift) / Δ), −n, n) + shift, Δ = clipping_range / n, n = 2^(bits−1) − 1. MLX arrays.

    Gradients are those of LSQ (Esser et al. 2020): round() passes them through; a clipped value gives none to x and
    its sign to the range. x (…, channels), clipping_range () or broadcastable, shift (channels,) or None.
    """
    n = levels(bits)
    step = clipping_range / n
    clipped = mx.clip((x if shift is None else x - shift) / step, -n, n)
    rounded = (clipped + mx.stop_gradient(mx.round(clipped) - clipped)) * step
    return rounded if shift is None else rounded + shift
