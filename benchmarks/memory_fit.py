"""Fits of the constants that memory is foreseen with: passes, iterations of stage 3W, and decoding, at several sizes."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from benchmarks.random_block import RandomSamples
from benchmarks.random_transformer import random_transformer
from w4a8.backend import blas
from w4a8.backend.parallel import run_cpu_streams_side_by_side
from w4a8.model.diffusionkit import VAEDecoder, VAEDecoderConfig
from w4a8.model.layers import model_blocks, model_layers
from w4a8.rounding.settings import Settings
from w4a8.rounding.unit_training import UnitTraining
from w4a8.rounding.units import BlockUnit, UnitSpec

TEXT = 154


def transformer(hidden: int, depth: int) -> nn.Module:
    return random_transformer(mx.float32, depth_multimodal=depth, hidden_size_override=hidden, num_heads=hidden // 64)


def sizes(rows: int, tokens: int, hidden: int) -> tuple[int, int]:
    """Elements of a token array, and of a block's attention scores."""
    return rows * tokens * hidden, rows * (hidden // 64) * tokens**2


def solve(arrays: list[tuple[float, ...]], peaks: list[float]) -> np.ndarray:
    """Least squares of the relative errors."""
    a, b = np.array(arrays), np.array(peaks)
    found = np.linalg.lstsq(a / b[:, None], np.ones(len(b)), rcond=None)[0]
    print(
        "   constants",
        *(f"{value:.3g}" for value in found),
        "  foreseen ÷ measured",
        *(f"{r:.2f}" for r in a @ found / b),
    )
    return found


def fit_passes() -> None:
    """Forward passes, float32: peak beside the weights in arrays of tokens, and of scores."""
    arrays, peaks = [], []
    for hidden, side, rows, depth in (
        (192, 16, 2, 6),
        (192, 32, 2, 6),
        (192, 64, 2, 4),
        (384, 32, 2, 4),
        (768, 16, 2, 4),
        (384, 32, 8, 4),
    ):
        mmdit = transformer(hidden, depth)
        shapes = ((rows, side, side, 16), (rows, TEXT, 1, 4096), (rows, 2048))
        latent, text, pooled = (mx.random.normal(shape) for shape in shapes)
        timestep = mx.array([700.0])
        mmdit.cache_modulation_params(pooled, timestep)
        given = {"latent_image_embeddings": latent, "token_level_text_embeddings": text}
        mx.eval(mmdit.parameters(), given)
        for _ in range(2):
            mx.clear_cache()
            active = mx.get_active_memory()
            mx.reset_peak_memory()
            mx.eval(mmdit(**given, timestep=mx.broadcast_to(timestep[0], [rows])))
        peaks.append((mx.get_peak_memory() - active) / 4)
        arrays.append(sizes(rows, side * side // 4 + TEXT, hidden))
    print("forward pass: arrays of tokens, of scores")
    solve(arrays, peaks)


def fit_iterations() -> None:
    """Iterations of stage 3W: what a sample adds."""
    run_cpu_streams_side_by_side()
    arrays, peaks = [], []
    for hidden, tokens, count in ((192, 64, 1), (192, 256, 1), (192, 1024, 1), (384, 256, 1), (192, 256, 4)):
        mmdit = transformer(hidden, count + 1)
        data = RandomSamples(model_blocks(mmdit)["mm0"], 8, tokens, TEXT, hidden)
        names = [f"mm{i}" for i in range(count)]
        layers = [name for name, layer in model_layers(mmdit).items() if layer.block in names]
        others = sum(array.nbytes for _, array in tree_flatten(mmdit.parameters()))
        found = []
        for samples in (2, 4):
            settings = Settings(iters=1000, batch_size=samples, lr_alpha=3e-3, lr_activation_scale=1e-3, seed=0, activation_rule="static")
            training = UnitTraining(
                BlockUnit.build(mmdit, UnitSpec("unit", names, layers), data, settings)
            )
            for _ in range(3):
                training.step()
            training.iteration = settings.rounding_iters
            mx.reset_peak_memory()
            training.step()
            found.append(mx.get_peak_memory() - others)
            weights = sum(weight.nbytes for weight in training.unit.weights.values())
            del training
            mx.clear_cache()
        each = (found[1] - found[0]) / 2
        print(
            f"   hidden {hidden}, {tokens} tokens, {count} blocks: {each / 1e6:.1f} MB a sample, {(found[0] - 2 * each) / weights:.1f} x the weights"
        )
        if count == 1:
            peaks.append(each / 4)
            arrays.append(sizes(2, tokens + TEXT, hidden))
    print("an iteration of stage 3W, one block: arrays of tokens, of scores")
    solve(arrays, peaks)


def fit_decoding() -> None:
    """Decoding an image: pixels of the last channels."""
    decoder, channels = VAEDecoder(), VAEDecoderConfig().block_out_channels[0]
    mx.eval(decoder.parameters())
    arrays, peaks = [], []
    for side in (8, 16, 24):
        latent = mx.random.normal((1, side, side, 16))
        mx.eval(latent)
        mx.clear_cache()
        active = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(decoder(latent))
        peaks.append((mx.get_peak_memory() - active) / 4)
        arrays.append((64 * side * side * channels,))
    print("decoding: pixels x last channels")
    solve(arrays, peaks)


def print_fits() -> None:
    print(mx.default_device(), "float32, peaks in arrays of 4 bytes")
    blas.cores = lambda: 1  # of one group of rows
    fit_passes()
    fit_decoding()
    fit_iterations()
