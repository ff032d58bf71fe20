"""Decode a latent with DiffusionKit's VAE, an operation at a time, and say what memory that takes from shapes."""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn

from w4a8.model.diffusionkit import VAEDecoder, upsample_nearest

KERNEL = 9  # pixels that a convolution reads for one
NORM_ARRAYS = 5  # copies of its input that a group norm holds at its peak, in groups, normalized and turned back
TOKEN_COPIES = 11  # arrays of tokens that the attention holds beside its scores


def decode(decoder: VAEDecoder, latent: mx.array) -> mx.array:
    """Return `decoder(latent)`, bit for bit, with less memory: latent (1, h, w, 16) -> pixels (1, 8h, 8w, 3).

    DiffusionKit evaluates a whole block at once. Its convolutions are then queued together, each with nine copies of its
    input on a CPU, and the peak depends on how many wait. Here each one is evaluated by itself.
    """
    x = _done(decoder.conv_in(latent))
    first, attention, last = decoder.mid_blocks
    x = _resnet(last, _done(attention(_resnet(first, x))))
    for block in reversed(decoder.up_blocks):
        for resnet in block.resnets:
            x = _resnet(resnet, x)
        if "upsample" in block:
            x = _done(upsample_nearest(x))
            x = _done(block.upsample(x))
    x = _done(decoder.conv_norm_out(x))
    x = _done(nn.silu(x))
    return _done(decoder.conv_out(x))


def _resnet(block: nn.Module, x: mx.array) -> mx.array:
    y = _done(block.norm1(x))
    y = _done(nn.silu(y))
    y = _done(block.conv1(y))
    y = _done(block.norm2(y))
    y = _done(nn.silu(y))
    y = _done(block.conv2(y))
    return _done(y + (block.conv_shortcut(x) if "conv_shortcut" in block else x))


def _done(x: mx.array) -> mx.array:
    mx.eval(x)
    return x


def decoding_elements(channels: Sequence[int], resnets: int, height: int, width: int) -> int:
    """Return the elements that `decode` holds at its peak beside the weights.

    channels: of the decoder's levels, the last pixels' first. resnets: of a level. height, width: of the latent.
    """
    tokens = height * width
    attention = tokens**2 + TOKEN_COPIES * tokens * channels[-1]
    return max(attention, *_operations(channels, resnets, tokens))


def _operations(channels: Sequence[int], resnets: int, pixels: int) -> Iterator[int]:
    """Yield the elements that each norm and each convolution of the levels holds."""
    before = channels[-1]
    for level in reversed(range(len(channels))):
        after = channels[level]
        for _ in range(resnets):
            yield pixels * (before + NORM_ARRAYS * before)
            yield pixels * (before + (KERNEL + 2) * before + after)  # the block's input; input, padded, copies; output
            yield pixels * (before + (KERNEL + 2) * after + after)
            before = after
        if level:
            pixels *= 4
            yield pixels * ((KERNEL + 2) * after + after)
