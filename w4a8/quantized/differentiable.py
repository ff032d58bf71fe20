"""Quantize in a way that gradients pass through. All arrays are MLX's."""

import mlx.core as mx

from w4a8.analysis.clipping_ranges import levels

ZETA, GAMMA = 1.1, -0.1  # AdaRound (Nagel et al. 2020), equation 23


def rectified_sigmoid(alpha):
    """Return h(α) = clip(σ(α)·(ζ − γ) + γ, 0, 1), the share by which a weight is rounded up. α has any shape."""
    return mx.clip(mx.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)


def rectified_sigmoid_inverse(h):
    """Return the α with h(α) = h, for h within (0, 1). h has any shape."""
    return -mx.log((ZETA - GAMMA) / (h - GAMMA) - 1)


def rectified_sigmoid_gradient(alpha):
    """Return dh/dα, which is 0 where h is clipped. α has any shape."""
    sigmoid = mx.sigmoid(alpha)
    stretched = sigmoid * (ZETA - GAMMA) + GAMMA
    return sigmoid * (1 - sigmoid) * (ZETA - GAMMA) * ((stretched > 0) & (stretched < 1))


def rounding_regularizer_gradient(h, beta: float):
    """Return d/dh of AdaRound's regularizer Σ (1 − |2h − 1|^β), equation 24.

    It pushes h to 0 or 1, the harder the smaller β. h has any shape.
    """
    distance = 2 * h - 1
    return -2 * beta * mx.sign(distance) * mx.abs(distance) ** (beta - 1)


def fake_quantize(x, clipping_range, bits: int, shift=None):
    """Return x̂ = Δ·clip(round((x − shift) / Δ), −n, n) + shift, Δ = clipping_range / n, n = 2^(bits−1) − 1.

    x (…, channels), clipping_range () or broadcastable, shift (channels,) or None. Gradients are those of LSQ (Esser
    et al. 2020): round() passes them through; a clipped value gives none to x and its sign to the range.
    """
    n = levels(bits)
    step = clipping_range / n
    clipped = mx.clip((x if shift is None else x - shift) / step, -n, n)
    rounded = (clipped + mx.stop_gradient(mx.round(clipped) - clipped)) * step
    return rounded if shift is None else rounded + shift
