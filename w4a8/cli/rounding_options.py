"""What can be chosen of learned rounding (stage 3W)."""

from collections.abc import Callable

import click

from calibration_store.limits import MOST_ITERATIONS, MOST_SECONDS
from w4a8.cli.options import COUNT, RATE, SEED

OPTIONS = (
    click.option("--blocks", help="Blocks to train, such as mm0,mm5.  [default: all that are cached]"),
    click.option(
        "--iters",
        type=click.IntRange(10, MOST_ITERATIONS),
        default=400,
        help="Iterations per unit; the last 30 % tune scales and ranges.",
    ),
    click.option("--batch-size", type=COUNT, default=16, help="Cached samples per iteration."),
    click.option(
        "--micro-batch",
        type=COUNT,
        help="Samples of an iteration in memory at once; changes nothing but float noise.  [default: by memory]",
    ),
    click.option(
        "--weight-bits",
        type=click.Choice(["2", "3", "4", "5", "6", "8"]),
        default="4",
        help="Bits of a weight's code; those that MLX runs natively.",
    ),
    click.option(
        "--activation-bits",
        type=click.IntRange(0, 8),
        default=8,
        help="Bits of a layer's input (simulated); 0: unquantized.",
    ),
    click.option(
        "--activation-rule",
        type=click.Choice(["token", "static"]),
        default="token",
        help="How inputs are quantized while weights are trained: token: a range of its own for each token (a8-token); "
        "static: learned ranges for each cached noise level (a8-learned).",
    ),
    click.option(
        "--average-bits",
        type=click.FloatRange(2, 8),
        help="Bits of a weight on average, such as 4.5: given where the model's output minds most (measured, sensitivity.json).",
    ),
    click.option("--bit-choices", default="4,8", help="--average-bits: widths that a layer may have, such as 3,4,6."),
    click.option(
        "--bits",
        multiple=True,
        metavar="PATTERN=BITS",
        help="Bits of some layers, such as '*.mlp.fc2=8'. Repeatable; the last one counts.",
    ),
    click.option(
        "--exclude", multiple=True, metavar="PATTERN", help="Layers that stay as they are, such as 'mm0.*'. Repeatable."
    ),
    click.option(
        "--sensitivity-only",
        is_flag=True,
        help="Measure what the output minds (adaround_cache/sensitivity.json), and stop.",
    ),
    click.option(
        "--group-size",
        type=click.Choice(["0", "32", "64", "128"]),
        default="64",
        help="Inputs that share a scale; 0: one scale per output channel; those that MLX runs natively.",
    ),
    click.option(
        "--unit",
        type=click.Choice(["block", "sublayer", "layer", "model"]),
        help="What is trained for its own output.  [default: model up to 100 M weights, else block]",
    ),
    click.option(
        "--block-inputs",
        type=click.Choice(["original", "mixed"]),
        default="original",
        help="What a block is trained on: inputs of the original model, or half of their elements as the quantized blocks before give "
        "them (QDrop, TaQ-DiT). Needs a cache of the ends.",
    ),
    click.option(
        "--end-to-end",
        type=click.IntRange(0, MOST_ITERATIONS),
        help="Iterations of a last phase: scales, zero points, biases and ranges of all blocks against the model's output.  "
        "[default: half of --iters for a model above 100 M weights, else 0]",
    ),
    click.option(
        "--rounding",
        type=click.Choice(["ste", "sigmoid"]),
        default="ste",
        help="ste: hard codes, straight-through gradient; sigmoid: AdaRound's, hardened on the way.",
    ),
    click.option(
        "--qdrop",
        type=click.FloatRange(0, 1),
        default=0.5,
        help="Share of input elements left unquantized while ranges are trained.",
    ),
    click.option(
        "--lr-alpha",
        type=RATE,
        default=None,
        help="Learning rate of the rounding variables.  [default: 4e-3 ste, 1e-2 sigmoid]",
    ),
    click.option(
        "--lr-activation-scale",
        type=RATE,
        default=5e-3,
        help="Learning rate of the (log) clipping ranges.",
    ),
    click.option(
        "--regularizer-weight",
        type=RATE,
        default=0.01,
        help="sigmoid: weight of the pull to 0 or 1, beside a loss of 1 for round-to-nearest.",
    ),
    click.option("--seed", type=SEED, default=0, help="Decides the batches."),
    click.option(
        "--checkpoint-seconds",
        type=click.FloatRange(0, MOST_SECONDS),
        default=30,
        help="How much of a unit's work a kill may cost.",
    ),
    click.option(
        "--alpha/--no-alpha",
        default=True,
        help="Keep the rounding variables in the files: 2 of 3 bytes a weight, which no later stage reads.",
    ),
)


def rounding_options(function: Callable) -> Callable:
    """Everything that decides the result of stage 3W."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function
