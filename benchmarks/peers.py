"""Compare other people's ways to 4 to 6 bits with stage 3W, on the same cached samples: PSNR over bits a weight.

    python benchmarks/peers.py --calib-dir calibration_data/demo --iters 400 --ggml libggml-base.so --plot docs/peers.png

It reads stages 1 and 2W (--boundaries ends or all), and writes the picture alone. Each learned way gets the same iterations
of the same batches. It is for small models, since the whole model is trained at once. Bits are those of codes, scales and
minima, and of a low-rank part, for each weight of the layers in the blocks. Biases and layers outside the blocks stay as they
are, except the biases of DWQ, and what stage 3W trains beside the codes, which takes no byte more.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
from matplotlib.figure import Figure

from benchmarks.peer_ways import (
    BITS,
    GGML_TYPES,
    RANKS,
    Dense,
    Ggml,
    Way,
    awq,
    gptq,
    grouped,
    input_grams,
    mlx_quantize,
    nearest,
    svdquant,
)
from calibration_store.block_cache import read_cache_metadata
from calibration_store.manifest import read_manifest
from w4a8.backend.parallel import run_cpu_streams_side_by_side
from w4a8.cli import calib_dir_option, progress_bar, stage_command
from w4a8.evaluation.drawn_images import choose_prompts, load_evaluated, plan_evaluation, sample
from w4a8.evaluation.metrics import describe_variant
from w4a8.evaluation.variants import Variant
from w4a8.model.layers import model_blocks, model_layers
from w4a8.model.parts import TRANSFORMER, Pipeline
from w4a8.model.prompt_encoder import PromptEncoder
from w4a8.model.runs import run_transformer
from w4a8.options import EvaluationOptions
from w4a8.quantized.layer import QuantizedLayer
from w4a8.rounding.final_phase import FinalTraining
from w4a8.rounding.methods import Arrays
from w4a8.rounding.rest import EVERYTHING, rest_places
from w4a8.rounding.settings import STATIC_RULE, Settings
from w4a8.rounding.training import Training
from w4a8.rounding.training_samples import Samples
from w4a8.rounding.unit_phase import trained_layers
from w4a8.rounding.unit_training import UnitTraining
from w4a8.rounding.units import MODEL, ModelUnit, Unit, UnitSpec
from w4a8.rounding.whole_model import WholeModel

GROUP = 64  # of the ways that have one size
OURS = ((4, 0), (4, 64), (4, 32), (5, 64), (6, 64))  # bits and groups of stage 3W; 0: a whole row


@stage_command
@calib_dir_option
@click.option("--iters", type=click.IntRange(min=3), default=400, help="Iterations of the ways that learn.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, help="Samples per iteration.")
@click.option("--num-images", type=click.IntRange(min=1), default=64, help="Unseen captions to draw.")
@click.option("--num-steps", type=click.IntRange(min=1), default=20, help="Steps of each image.")
@click.option("--blocks", help="Quantize only these, comma-separated.  [default: all]")
@click.option(
    "--ggml", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="A library of ggml, for its types."
)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Picture of PSNR over bits a weight.")
def main(
    calib_dir: Path, iters: int, batch_size: int, num_images: int, num_steps: int, blocks: str | None, ggml: Path | None,
    plot: Path | None,
) -> None:  # fmt: skip
    """Compare nearest, mx.quantize, AWQ, GPTQ, DWQ, SVDQuant, ggml's types and stage 3W on the same data."""
    run_cpu_streams_side_by_side()
    manifest = read_manifest(calib_dir)
    settings = Settings(
        iters=iters, batch_size=batch_size, weight_bits=BITS, activation_bits=0, group_size=GROUP, qdrop=0.0,
        micro_batch=batch_size if mx.default_device() != mx.Device(mx.cpu) else min(batch_size, 8), activation_rule=STATIC_RULE,
    )  # fmt: skip

    def unit_of(bits: int, group: int) -> Unit:
        chosen = replace(settings, weight_bits=bits, group_size=group)
        return whole_model(calib_dir, manifest, chosen, blocks.split(",") if blocks else None)

    unit = unit_of(BITS, GROUP)
    grams = input_grams(unit)
    ways: dict[str, Callable[[], Way]] = {name: lambda make=make: make(unit, grams) for name, make in PEERS.items()}
    ways |= {f"SVDQuant, rank {rank}": lambda rank=rank: svdquant(unit, grams, rank) for rank in RANKS}
    if ggml is not None:
        library = Ggml(ggml)
        ways |= {f"ggml {name}": lambda name=name: library.way(unit, name) for name in GGML_TYPES}
    ways |= {
        f"3W, {bits} bits, {f'groups of {group}' if group else 'rows'}": lambda b=bits, g=group: ours(unit_of(b, g))
        for bits, group in OURS
    }
    click.echo(f"{'':26} {'bits':>5} {'seconds':>8} {'PSNR':>8} {'worst':>7} {'FLIP':>7}")
    options = EvaluationOptions(num_images=num_images, num_steps=num_steps, batch_size=min(num_images, 64))
    points = {}
    for name, way, seconds, row in drawn(manifest, ways, options):
        flip = "–" if row["flip"]["mean"] is None else f"{row['flip']['mean']:.4f}"
        psnr = row["psnr"]
        click.echo(f"{name:26} {way.bits:5.2f} {seconds:8.1f} {psnr['mean']:6.1f}dB {psnr['worst']:7.1f} {flip:>7}")
        points[name] = way.bits, psnr["mean"]
    if plot is not None:
        draw_points(points, plot)


def whole_model(calib_dir: Path, manifest: dict[str, Any], settings: Settings, blocks: list[str] | None) -> Unit:
    """Return the model as one unit, with its cached samples; only layers of `blocks` are quantized."""
    mmdit = run_transformer(manifest)()
    names = list(model_blocks(mmdit))
    layers = [name for name, layer in model_layers(mmdit).items() if layer.block in (blocks or names)]
    if not layers:
        raise click.UsageError(f"--blocks {','.join(blocks or ())}: the model has {', '.join(names)}")
    samples = Samples.of_cache(calib_dir, read_cache_metadata(calib_dir), mmdit, names)
    return ModelUnit.build(mmdit, UnitSpec(MODEL, names, layers), samples, settings)


class ScalesOnly(UnitTraining):
    """The training of DWQ: every iteration tunes, none moves the rounding."""

    @property
    def rounding_iters(self) -> int:
        """Return 0."""
        return 0


def scales_only(unit: Unit, grams: Arrays) -> Way:
    """Round to nearest; distil scales, zero points and biases against the model's output, as mlx-lm's DWQ does."""
    training = run_training(ScalesOnly(unit))
    codes = training.unit.codes(training.state, hard=True)
    final = training.unit.quantized(training.state, codes, with_ranges=False)
    return grouped(unit, {name: (layer.weight, layer.deployed_bias) for name, layer in final.layers.items()})


def ours(unit: Unit) -> Way:
    """Train as stage 3W does: two thirds of the iterations for the codes, one for what stays beside them."""
    settings = unit.settings
    last = settings.iters // 3
    unit.settings = replace(settings, iters=settings.iters - last)
    layers = trained_layers(run_training(UnitTraining(unit)), False)
    settings = replace(settings, end_to_end=last, rest=EVERYTHING)
    whole = WholeModel.build(unit.mmdit, list(model_blocks(unit.mmdit)), unit.samples, settings, layers, at_once=True)
    state = run_training(FinalTraining(whole)).state
    found: Dense = {}
    for name, fields in layers.items():
        codes = mx.array(fields["q"]).astype(mx.float32)
        layer = QuantizedLayer(codes, state["scale"][name], state["zero_point"][name], state["bias"].get(name))
        found[name] = layer.weight, layer.deployed_bias
    return grouped(unit, found, {path: mx.array(array) for path, array in whole.stored_rest(state).items()})


def run_training(training: Training) -> Any:
    """Run a training to its end, and return it."""
    with progress_bar(training.iters, type(training).__name__, "it", leave=False) as bar:
        while training.iteration < training.iters:
            training.step()
            bar.update()
    return training


PEERS: dict[str, Callable[[Unit, Arrays], Way]] = {
    "nearest": nearest, "mx.quantize": mlx_quantize, "AWQ, scaling": awq, "GPTQ": gptq, "DWQ, scales only": scales_only,
}  # fmt: skip


# --- pictures -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DenseVariant(Variant):
    """A variant of stage 4 whose dense weights take the place of the layers' own."""

    way: Way | None = None

    @contextmanager
    def in_place(self, pipeline: Pipeline) -> Iterator[None]:
        """Put the weights in place; drop the transformer at the end."""
        if self.way is not None:
            for name, (weight, bias) in self.way.layers.items():
                module = model_layers(pipeline.mmdit)[name].module
                module["weight"] = weight.astype(module["weight"].dtype)
                if bias is not None:
                    module["bias"] = bias.astype(module["weight"].dtype)
            places = {
                path: at for group in rest_places(pipeline.mmdit, EVERYTHING).values() for path, at in group.items()
            }
            for path, array in self.way.rest.items():
                owner, key = places[path]
                owner[key] = array.astype(owner[key].dtype)
        try:
            yield
        finally:
            pipeline.drop(TRANSFORMER)


def drawn(
    manifest: dict[str, Any], ways: Mapping[str, Callable[[], Way]], options: EvaluationOptions
) -> Iterator[tuple[str, Way, float, dict[str, Any]]]:
    """Make each way, draw with it, and yield (name, way, seconds that it took to make, metrics against the original)."""
    pipeline, info, fingerprint = load_evaluated(manifest)
    prompts, _ = choose_prompts(manifest, info.captions, None, options.num_images, options.seed)
    run = plan_evaluation(options, manifest, info, fingerprint, pipeline.use_t5, prompts)
    texts = PromptEncoder(pipeline, prompts, run.cfg_weight, run.negative_prompt, None)
    with progress_bar(0, "sampling", "step", leave=False) as bar:
        original = sample(pipeline, texts, run, DenseVariant("original"), bar)
        for name, make in ways.items():
            start = time.perf_counter()
            way = make()
            mx.eval([array for pair in way.layers.values() for array in pair if array is not None])
            seconds = time.perf_counter() - start
            images = sample(pipeline, texts, run, DenseVariant(name, way=way), bar)
            yield name, way, seconds, describe_variant(prompts, run.seed, original, images)


def draw_points(points: Mapping[str, tuple[float, float]], path: Path) -> None:
    """Draw PSNR over bits a weight: stage 3W as a line, everything else as labelled points."""
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    own = sorted(point for name, point in points.items() if name.startswith("3W"))
    axes.plot(*zip(*own, strict=True), "o-", color="tab:blue", label="stage 3W", zorder=3)
    for index, (name, (bits, psnr)) in enumerate(each for each in points.items() if not each[0].startswith("3W")):
        axes.plot(bits, psnr, "s^Dv<>pP*Xhd"[index % 12], color=f"C{index % 9 + 1}", label=name)
    axes.set(xlabel="bits a weight, with scales and low-rank parts", ylabel="PSNR to the original's images, dB")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path)


if __name__ == "__main__":
    main()
