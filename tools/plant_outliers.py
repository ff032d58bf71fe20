"""Give a model folder the activations of real SD3-Medium without changing what it computes.

python tools/plant_outliers.py --model sd3-emoji --output models/planted

A small model trained for minutes has tame activations; SD3-Medium's have channels 3 to 90 times as wide as the
median one. Three rewritings of the weights plant such channels, with the ratios of tools/sd3_medium_extremes.json:
- inputs of q, k, v and of fc1: adaLN widens a channel, the weights that read it narrow it;
- inputs of o_proj: v_proj widens a channel (attention mixes tokens, never channels), o_proj narrows it;
- inputs of fc2: the three hidden channels of an MLP that matter least give way to three that cancel one another.
All factors are powers of two, so float16 holds the products exactly. Two things are lost: the part of the three channels that
the other channels cannot take over, and last bits of adaLN's and fc2's biases and of tiny weights, as many as float16 rounds off.

Shapes: C channels, H hidden channels of an MLP, P tokens of a stream; weights are (outputs, inputs).
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from safetensors.numpy import save

from calibration_store.errors import StoreError, WriteError
from calibration_store.files import atomic_file
from calibration_store.names import layer_kind, layers_by_kind
from w4a8.cli import stage_command
from w4a8.model.catalog import describe_model
from w4a8.model.folder import FolderPipeline
from w4a8.model.hooks import hooked_layers
from w4a8.model.layers import model_layers
from w4a8.model.loading import load_pipeline, whole_model
from w4a8.model.migration import MODULATED
from w4a8.model.prompt_encoder import encode_prompts
from w4a8.model.prompts import draw_builtin_prompts
from w4a8.model.sampling import decode_latents, euler_steps, initial_noise

TABLE = Path(__file__).resolve().parent / "sd3_medium_extremes.json"
REAL_BLOCKS = (23, 22, 0, 14, 20, 8, 3, 11, 17, 5, 21, 1, 12, 6, 18, 9, 2, 15, 4, 16, 7, 19, 10, 13)  # wild ones early
STREAMS = {"img": "image_transformer_block", "txt": "text_transformer_block"}
READERS = {"attn": ("attn.q_proj", "attn.k_proj", "attn.v_proj"), "mlp": ("mlp.fc1",)}
ADALN = "adaLN_modulation.layers.1"
CHANNELS_PER_OUTLIER = 48
SPREAD = 4  # the channels that are wide on every token vary by a quarter of the widest one
LINEAR = 4.0  # from here on GELU(x) = x to 1.3e-4
LARGEST = 16384.0  # a quarter of float16's range: other prompts go further than the calibration's
NOTE = (
    "A variant made by tools/plant_outliers.py: the same images, to 45-50 dB, from activations with the outlier channels of "
    "SD3-Medium. Its figures are for the calibration and quantization of such channels, not for its images."
)

CALIBRATION_STEPS = 8

Weights = dict[str, np.ndarray]


@stage_command
@click.option("--model", default="sd3-emoji", help="sd3-emoji, or a folder in its layout.")
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder to write; new, or empty."
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, help="Prompts, noise, and which channels.")
@click.option(
    "--strength", type=click.FloatRange(min=0), default=1.0, help="Aim at SD3-Medium's ratios to this power; 0 is none."
)
@click.option("--calibration-images", type=click.IntRange(min=1), default=32, help="To see what the channels are for.")
@click.option("--num-images", type=click.IntRange(min=1), default=8, help="To compare, of other prompts.")
@click.option("--num-steps", type=click.IntRange(min=2), default=20, help="Steps of the images to compare.")
def main(
    model: str, output: Path, seed: int, strength: float, calibration_images: int, num_images: int, num_steps: int
) -> None:
    """Write a variant of a model folder that computes the same with SD3-Medium's outlier channels.

    It prints the activations before and after, and the PSNR between the images of both, on prompts not used to calibrate.
    """
    if output.exists() and any(output.iterdir()):
        raise StoreError(f"{output} is not empty: give a new folder")
    info = describe_model(model)
    if info.folder is None:
        raise click.UsageError(f"--model {model}: give sd3-emoji or a folder in its layout")
    pipeline = load_pipeline(info, whole_model("float32"))
    prompts = draw_builtin_prompts(info.captions, seed)[: num_images + calibration_images]
    if len(prompts) < num_images + calibration_images:
        raise click.UsageError(f"{num_images} + {calibration_images} images, and only {len(prompts)} prompts")
    calibration = (prompts[num_images:], seed, CALIBRATION_STEPS, info.cfg_weight)
    inputs, _ = observe(pipeline, *calibration, lambda x: x.astype(np.float16))
    ratios = real_ratios(list(inputs), len(pipeline.mmdit.multimodal_transformer_blocks), strength)
    weights = {name: np.array(array) for name, array in dict(tree_flatten(pipeline.mmdit.parameters())).items()}
    planted = plant(weights, inputs, ratios, seed)
    write_variant(info.folder, output, planted, {"of": info.folder.name, "seed": seed, "strength": strength})
    click.echo(f"wrote {output}")

    comparison = (prompts[:num_images], seed, num_steps, info.cfg_weight)
    (before, images), (after, same) = (
        observe(each, *comparison, lambda x: np.abs(x).max((0, 1))[None])
        for each in (pipeline, load_pipeline(describe_model(str(output)), whole_model("float32")))
    )
    report(before, after, ratios)
    with np.errstate(divide="ignore"):  # equal images
        psnr = 10 * np.log10(255**2 / ((images - same.astype(float)) ** 2).mean((1, 2, 3)))
    click.echo(
        f"same-seed PSNR of {num_images} images, {num_steps} steps, guidance {info.cfg_weight:g}, float32: "
        f"mean {psnr.mean():.1f} dB, lowest {psnr.min():.1f} dB"
    )


# --- what to plant ------------------------------------------------------------------------------------------


def real_ratios(names: Sequence[str], depth: int, strength: float) -> dict[str, float]:
    """Return the ratio of the widest to the median channel that each layer is to have: SD3-Medium's to the power `strength`.

    A block of a model of `depth` blocks takes after a block of about its relative depth; the last, without text o_proj and
    mlp, takes after the last.
    """
    table = json.loads(TABLE.read_text())
    column, last = table["columns"].index("max_over_median_channel"), len(REAL_BLOCKS) - 1
    blocks = sorted(REAL_BLOCKS[:depth]) if depth <= last else [i * last // (depth - 1) for i in range(depth)]
    rows = {name: table["layers"][f"mm{blocks[int(name.split('.')[0][2:])]}.{layer_kind(name)}"] for name in names}
    return {name: row[column] ** strength for name, row in rows.items()}


def weight(layer: str, parameter: str = "weight") -> str:
    """Return a parameter's name: mm3.img.attn.q_proj -> multimodal_transformer_blocks.3.image_transformer_block.attn.q_proj.weight."""
    block, stream, rest = layer.split(".", 2)
    return f"multimodal_transformer_blocks.{block[2:]}.{STREAMS[stream]}.{rest}.{parameter}"


def choose_scales(absmax: np.ndarray, persistence: np.ndarray, ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Return powers of two (C,), most of them 1, that make the widest channel `ratio` times the median one.

    absmax (C,); persistence (C,) is mean |x| ÷ largest |x|. Half of the widened channels come from the most persistent ones,
    and are wide on every token then; half come from the least persistent ones, and are wide on rare tokens.
    """
    count = 2 * max(1, absmax.size // (2 * CHANNELS_PER_OUTLIER))
    level = absmax / np.median(absmax)
    order = [channel for channel in np.argsort(persistence) if level[channel] > 0.75]
    halves = [rng.choice(group, count // 2, replace=False) for group in (order[: 2 * count], order[-2 * count :])]
    chosen = rng.permutation(np.concatenate(halves))
    wanted = ratio * np.geomspace(1, 0.4, count)
    scales = np.ones(absmax.size)
    scales[chosen] = 2.0 ** np.maximum(0, np.round(np.log2(wanted / level[chosen])))
    return scales


# --- the rewritings -----------------------------------------------------------------------------------------


def scale_modulated(weights: Weights, stream: str, part: str, scales: np.ndarray) -> None:
    """Multiply (1 + scale) · LN(x) + shift by `scales` (C,); the layers that read it take the factor out."""
    shift, scale = MODULATED[part]
    adaln = f"{stream}.{ADALN}"
    rows = weights[weight(adaln)].reshape(-1, scales.size, scales.size)  # a view: (parameters, C, C)
    bias = weights[weight(adaln, "bias")].reshape(-1, scales.size)
    rows[[shift, scale]] *= scales[:, None]
    bias[[shift, scale]] *= scales
    bias[scale] += scales - 1
    for reader in READERS[part]:
        weights[weight(f"{stream}.{reader}")] /= scales


def scale_values(weights: Weights, block: str, scales: np.ndarray) -> None:
    """Multiply the attention's output by `scales` (C,), in both streams, since each attends to the values of both."""
    for stream in STREAMS:
        weights[weight(f"{block}.{stream}.attn.v_proj")] *= scales[:, None]
        weights[weight(f"{block}.{stream}.attn.v_proj", "bias")] *= scales
        if weight(f"{block}.{stream}.attn.o_proj") in weights:
            weights[weight(f"{block}.{stream}.attn.o_proj")] /= scales


def scale_hidden(weights: Weights, stream: str, scales: np.ndarray) -> None:
    """Multiply hidden channels of an MLP by `scales` (H,); fc2 takes the factor out, which is exact only where GELU is linear."""
    weights[weight(f"{stream}.mlp.fc1")] *= scales[:, None]
    weights[weight(f"{stream}.mlp.fc1", "bias")] *= scales
    weights[weight(f"{stream}.mlp.fc2")] /= scales


def rare_direction(x: np.ndarray, widest: float, rng: np.random.Generator) -> tuple[np.ndarray, float, float]:
    """Return w (C,) and b such that z = w·x + b is positive on about one token in 50 and reaches ±widest; and a step.

    x (rows, P, C). The direction tells one place in the stream from the others (regularized, so that rounding
    its weights does not drown it). float16 holds w, w / 4, b, and b / 4 plus any multiple of step exactly.
    """
    tokens = x.reshape(-1, x.shape[-1]).astype(np.float64)
    covariance = np.cov(tokens.T)
    covariance += 0.1 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    directions = np.linalg.solve(covariance, (x.mean(0, np.float64) - tokens.mean(0)).T)  # (C, P)
    z = tokens @ directions
    rare = np.quantile(z, 0.98, axis=0)
    above, below = z.max(0) - rare, rare - z.min(0)
    place = rng.choice(np.argsort(above / below)[-4:])
    scale = widest / max(above[place], below[place])
    step = float(np.spacing(np.float16(widest + LINEAR)))
    b = -np.round(scale * rare[place] / (4 * step)) * 4 * step
    w = (scale / SPREAD * directions[:, place]).astype(np.float16).astype(np.float64) * SPREAD
    return w, float(b), step


def eliminate(columns: np.ndarray, bias: np.ndarray, hidden: np.ndarray, count: int) -> list[int]:
    """Make `count` hidden channels unused, at the least cost to fc2's output; columns (C, H) and bias (C,) change.

    The others take over what is linear in them (optimal brain surgeon, Hassibi & Stork 1993): the cost of channel c is
    |column c|² ÷ inverse covariance at (c, c), the variance that the others do not explain. hidden (rows, P, H).
    """
    tokens = hidden.reshape(-1, hidden.shape[-1]).astype(np.float64)
    covariance = np.cov(tokens.T)
    precision = np.linalg.inv(covariance + 1e-3 * np.trace(covariance) / len(covariance) * np.eye(len(covariance)))
    before = columns.copy()
    chosen: list[int] = []
    for _ in range(count):
        cost = np.full(len(precision), np.inf)
        kept = np.setdiff1d(np.arange(len(precision)), chosen)
        cost[kept] = (columns**2).sum(0)[kept] / precision.diagonal()[kept]
        channel = int(np.argmin(cost))
        shares = -precision[channel] / precision[channel, channel]  # -1 for the channel itself
        columns += np.outer(columns[:, channel], shares)
        precision += np.outer(precision[:, channel], shares)
        chosen.append(channel)
    bias += (before - columns) @ tokens.mean(0)
    return chosen


def plant_hidden(
    weights: Weights, stream: str, x: np.ndarray, hidden: np.ndarray, ratio: float, rng: np.random.Generator
) -> None:
    """Replace the three least important hidden channels by z, -z and z/4 + B, which cancel one another in fc2.

    GELU(z) - GELU(-z) = z for every z, and B keeps the third where GELU is linear: u · (z - 4 (z/4 + B)) is a
    constant, which fc2's bias takes back. The first is wide on rare tokens and near 0 on the others, the second wide on
    most, the third half as wide on all. x (rows, P, C), inputs of fc1; hidden (rows, P, H), inputs of fc2.
    """
    absmax = np.abs(hidden).max((0, 1)).astype(np.float64)
    widest = ratio * float(np.median(absmax))
    if widest < 1.25 * absmax.max():
        return  # wild enough by itself
    rows, row_bias, columns, column_bias = (
        weights[weight(f"{stream}.mlp.{name}", part)] for name in ("fc1", "fc2") for part in ("weight", "bias")
    )
    norms = np.linalg.norm(columns, axis=0)
    u = rng.permutation(columns[:, np.argsort(norms)[len(norms) // 2]]) / 2
    chosen = rng.permutation(eliminate(columns, column_bias, hidden, 3))
    w, b, step = rare_direction(x, widest, rng)
    level = np.ceil(max(widest / 2, widest / SPREAD + LINEAR) / step) * step
    factors = np.array([1, -1, 1 / SPREAD])
    rows[chosen], row_bias[chosen] = np.outer(factors, w), factors * b + [0, 0, level]
    columns[:, chosen] = np.outer(u, [1, -1, -SPREAD])
    column_bias += SPREAD * level * u


def plant(
    weights: Weights, inputs: dict[str, np.ndarray], ratios: dict[str, float], seed: int, exact: bool = True
) -> Weights:  # fmt: skip
    """Return a model's weights with planted channels, float16. inputs: layer -> (rows, P, channels), q_proj's for q, k and v.

    exact: plant hidden channels that cancel one another; else scale some, for random weights, whose images nobody looks at.
    """
    rng = np.random.default_rng(seed)
    planted = {name: array.astype(np.float64) for name, array in weights.items()}
    absmax = {name: np.abs(x).max((0, 1)).astype(np.float64) for name, x in inputs.items()}
    widest = max(ratios[name] * float(np.median(absmax[name])) for name in inputs)
    if not widest <= LARGEST:
        raise StoreError(f"activations would reach {widest:.2g}, more than float16 should hold; lower --strength")
    persistence = {name: np.abs(x).mean((0, 1), np.float64) / absmax[name] for name, x in inputs.items()}
    for block in dict.fromkeys(name.split(".")[0] for name in inputs):
        for stream in (f"{block}.img", f"{block}.txt"):
            if f"{stream}.mlp.fc2" in inputs:  # before fc1 is scaled
                fc1, fc2 = f"{stream}.mlp.fc1", f"{stream}.mlp.fc2"
                if exact:
                    plant_hidden(planted, stream, inputs[fc1], inputs[fc2], ratios[fc2], rng)
                else:
                    scale_hidden(planted, stream, choose_scales(absmax[fc2], persistence[fc2], ratios[fc2], rng))
            for part, readers in READERS.items():
                layer = f"{stream}.{readers[0]}"
                if layer in inputs:
                    scales = choose_scales(absmax[layer], persistence[layer], ratios[layer], rng)
                    scale_modulated(planted, stream, part, scales)
        layers = [name for name in (f"{block}.img.attn.o_proj", f"{block}.txt.attn.o_proj") if name in inputs]
        level, lasting, ratio = (  # one factor has to serve both streams
            np.exp(np.mean([np.log(values[name]) for name in layers], axis=0))
            for values in ({name: absmax[name] / np.median(absmax[name]) for name in layers}, persistence, ratios)
        )
        scale_values(planted, block, choose_scales(level, lasting, float(ratio), rng))
    return {name: to_float16(name, array) for name, array in planted.items()}


def to_float16(name: str, array: np.ndarray) -> np.ndarray:
    """Round to float16. Raises StoreError where an input channel exceeds its range, or loses more bits than rounding takes."""
    with np.errstate(over="ignore"):
        stored = array.astype(np.float16)
    if not np.isfinite(stored).all():
        raise StoreError(f"{name} reaches {np.abs(array).max():.2g}, more than float16 holds; lower --strength")
    lost, largest = np.abs(stored - array).max(0), np.abs(array).max(0)
    if (lost > largest * 2.0**-11).any():
        raise StoreError(f"{name} gets too small for float16; lower --strength")
    return stored


# --- the model ----------------------------------------------------------------------------------------------


def observe(
    pipeline: FolderPipeline, prompts: Sequence[str], seed: int, num_steps: int, cfg_weight: float,
    keep: Callable[[np.ndarray], np.ndarray],
) -> tuple[dict[str, np.ndarray], np.ndarray]:  # fmt: skip
    """Sample one image per prompt; return keep(inputs (R, P, channels)) of each layer at every third step, and images (B, h, w, 3).

    The second step is among them, and (of 3n + 2 steps) the last. q_proj, k_proj and v_proj have the same inputs, which are
    kept once, as q_proj's.
    """
    names = [name for name, layer in model_layers(pipeline.mmdit).items() if layer.input_owner == name]
    latent_size = tuple(pipeline.model_config["latent_size"])
    noise = mx.concatenate([initial_noise(seed + index, latent_size) for index in range(len(prompts))])
    text = encode_prompts(pipeline, prompts, cfg_weight)
    kept: dict[str, list[np.ndarray]] = {name: [] for name in names}
    seen: list[tuple[str, mx.array]] = []
    steps = euler_steps(pipeline, text, noise, num_steps, cfg_weight)
    next(steps)  # the modulation cache is built before hooks may be live
    with hooked_layers(pipeline.mmdit, lambda name, x: seen.append((name, x)), names):
        for state in steps:  # after step_index - 1
            for name, x in seen if state.step_index % 3 == 2 else ():
                kept[name].append(keep(np.array(x[:, :, 0])))
            seen.clear()
    images = np.stack([np.asarray(image) for image in decode_latents(pipeline, state.x)])
    return {name: np.concatenate(arrays) for name, arrays in kept.items()}, images


@contextlib.contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """Yield a folder to fill, which takes the place of `output` (not there yet, or empty) when the block ends well."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent))
        try:
            yield folder
            folder.chmod(0o755)
            folder.rename(output)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise WriteError(f"cannot write {output}: {error.strerror}") from None


def write_variant(source: Path, output: Path, weights: Weights, variant: dict[str, Any]) -> None:
    """Copy the model folder `source` with these transformer weights, and a note in config.json and README.md."""
    config = json.loads((source / "config.json").read_text()) | {"variant": variant | {"note": NOTE}}
    readme = source / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    with atomic_folder(output) as folder:
        for path in sorted(source.iterdir()):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
        for name, content in (
            ("mmdit.safetensors", save(weights)),
            ("config.json", json.dumps(config, indent=2).encode()),
            ("README.md", f"# {variant['of']} with planted outliers\n\n{NOTE}\n\n{text}".encode()),
        ):
            with atomic_file(folder / name) as file:
                file.write(content)


def report(before: dict[str, np.ndarray], after: dict[str, np.ndarray], ratios: dict[str, float]) -> None:
    """Print the ratios before and after, per kind of layer. before, after: layer -> the channels' largest |x| (rows, channels)."""
    widths = [{name: x.max(0) for name, x in absmax.items()} for absmax in (before, after)]
    found = [{name: x.max() / np.median(x) for name, x in width.items()} for width in widths]
    click.echo(
        f"{'inputs of':17}{'largest |x|':>16}   {'widest ÷ median channel, median layer and widest, before -> after (aim)'}"
    )
    for kind, layers in layers_by_kind(list(ratios)).items():
        largest = [max(width[name].max() for name in layers) for width in widths]
        line = f"{kind.replace('q_proj', 'q/k/v'):17}{largest[0]:7.1f} ->{largest[1]:6.1f}"
        for middle in (np.median, np.max):
            old, new, aim = (float(middle([values[name] for name in layers])) for values in (*found, ratios))
            line += f"   {old:5.1f} ->{new:6.1f} ({aim:5.1f})"
        click.echo(line)
    near = sum(0.5 <= found[1][name] / ratio <= 2 for name, ratio in ratios.items())
    click.echo(f"within a factor 2 of the aim: {near} of {len(ratios)} inputs")


if __name__ == "__main__":
    main()
