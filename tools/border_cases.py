"""Add cases to tools/corruption_campaign.py that no format's declaration implies.

They are files of another run, archives that unpack to gigabytes, numbers that no file can hold, and odd surroundings.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from calibration_store.npz import write_npz
from tools.campaign_cases import (
    CACHE,
    COLLECT,
    EVALUATE,
    EVALUATE_AGAIN,
    GENERATE,
    OPTIMIZE,
    every_format,
    forced,
    resumed,
)
from tools.cases import Case, Mutation, Target
from tools.mutations import copied, edited, file_mutations, npz_bombs, npz_oddities

HUGE = "99999999999999999999"  # more than 64 bits
LEARNED = (*EVALUATE, "--variants", "w4-adaround")
DRAW = ("draw_images", "red heart", "--num-steps", "1", "--activations", "--model", "{run}/quantized_model", "--output", "{run}/new")
REPORT = ("report_calibration", "--output", "{run}/new")
ANALYZE = ("analyze_activations",)


def all_cases(clean: Path) -> Iterator[Case]:
    """Yield every case of the campaign, from the files of the clean runs."""
    for targets, mutations in itertools.chain(every_format(clean), border_cases(clean)):
        for target in targets:
            for mutation in mutations:
                yield Case(target, mutation)


def border_cases(clean: Path) -> Iterator[tuple[list[Target], list[Mutation]]]:
    """Yield (targets, mutations) from the files of the clean runs: run/, and other/ with another seed."""
    yield from foreign_files(clean / "run", clean / "other")
    yield from bombs(clean / "run")
    yield from exported(clean / "run")
    yield from limits()
    yield from surroundings()


def foreign_files(run: Path, other: Path) -> Iterator[tuple[list[Target], list[Mutation]]]:
    """Yield files of equal shapes from another run, and a file of this run with its rows exchanged."""
    losses = resumed(
        "run", "adaround_weights/mm0_losses.json", OPTIMIZE, result="adaround_weights/metadata.json",
        without=("adaround_weights/metadata.json",),
    )  # fmt: skip
    for name, targets in {
        "samples/0000_000.npz": [forced("", COLLECT, "--dry-run"), resumed("run", "", GENERATE)],
        "samples/0001_003.npz": [resumed("run", "", GENERATE)],
        "images/0000.png": [resumed("run", "", GENERATE)],
        "adaround_cache/samples/0000_000.npz": [forced("", OPTIMIZE, "--blocks", "mm0"), resumed("run", "", CACHE)],
        "activations/partial/0000_001.npz": [resumed("run", "", COLLECT)],
        "activations/timestep_stats/step_1.npz": [Target("run", "", ANALYZE)],
        "adaround_weights/mm0.npz": [Target("run", "", LEARNED), resumed("run", "", OPTIMIZE)],
        "adaround_weights/mm0_losses.json": [losses],
    }.items():
        yield [target._replace(file=name) for target in targets], [copied("another run's", other / name)]
    name = "adaround_weights/mm0.npz"
    yield [Target("run", name, LEARNED), resumed("run", name, OPTIMIZE)], [Mutation("rows in another order", reversed_rows)]


def reversed_rows(path: Path) -> None:
    arrays = dict(np.load(path))
    key = next(key for key in arrays if key.endswith("__q"))
    path.unlink()
    write_npz(path, arrays | {key: arrays[key][::-1]})


def bombs(run: Path) -> Iterator[tuple[list[Target], list[Mutation]]]:
    """Yield bombs for each kind of NPZ: refused in a known member, ignored in a member that the stage does not know."""
    again = str(next((run / "evaluation/runs").glob("w4-rtn*")).relative_to(run))
    for name, known, target in (
        ("samples/0000_000.npz", "x", forced("", COLLECT, "--dry-run")),
        ("adaround_cache/samples/0000_000.npz", "mm0__arg0", forced("", OPTIMIZE, "--blocks", "mm0")),
        ("activations/partial/0000_001.npz", "limits", resumed("run", "", COLLECT)),
        ("activations/timestep_stats/step_1.npz", "mm0_img_attn_q_proj__avg_min", Target("run", "", ANALYZE)),
        (again, "latents", resumed("run", "", EVALUATE_AGAIN)),
    ):
        yield [target._replace(file=name)], list(npz_bombs(known))
        yield [target._replace(file=name, resume=False, expects="success")], list(npz_oddities())
    name = "adaround_weights/mm0.npz"  # metadata.json notes its digest, so that any change is refused
    known = next(key for key in np.load(run / name).files if key.endswith("__q"))
    mutations = [*npz_bombs(known), *npz_oddities()]
    yield [Target("run", name, LEARNED), resumed("run", name, OPTIMIZE)], mutations


def exported(run: Path) -> Iterator[tuple[list[Target], list[Mutation]]]:
    """Yield damage of a folder of stage 5, which notes digests of all files that decide its pictures."""

    def exchanged(vocabulary: dict) -> None:
        first, second = list(vocabulary)[:2]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    def wider(activations: dict) -> None:
        for entry in next(iter(activations["per_timestep"].values())).values():
            entry["clipping_range"] = entry["clipping_range"] * 2

    def first_value(config: dict) -> None:
        key = next(iter(config["latent_format"]))
        config["latent_format"][key] = config["latent_format"][key] * 2

    folder = "quantized_model"
    for name, more in {
        "config.json": [
            edited("another sampler shift", lambda c: c.update(sampler_shift=2.0)),
            edited("another latent format", first_value),
            edited("8 bits over 4", lambda c: c["export"].update(weight_bits=8)),
            edited("an infinite entry", lambda c: c.update(colour="@@1e999")),
        ],
        "vocab.json": [edited("two ids exchanged", exchanged)],
        "activations.json": [edited("wider ranges", wider)],
        "mmdit.safetensors": [],
        "clip_l.safetensors": [],
    }.items():
        path = run / folder / name
        yield [Target("run", f"{folder}/{name}", DRAW)], [*file_mutations(path), *more]


def nothing(path: Path) -> None:
    """Leave the file as it is, since the case is in the command."""


def limits() -> Iterator[tuple[list[Target], list[Mutation]]]:
    """Yield commands with numbers and names that no file can hold; they must be refused before anything is deleted."""
    for command in (
        *((*GENERATE, option, HUGE) for option in ("--seed", "--stride", "--num-steps", "--batch-size", "--num-images", "--latent-size")),
        *((*GENERATE, "--cfg-weight", value) for value in ("1e20", "1e39")),
        *((script, option, HUGE) for script in (CACHE[0], COLLECT[0]) for option in ("--stride", "--num-images")),
        (CACHE[0], "--stride", "200000"),
        *((*OPTIMIZE, option, HUGE) for option in ("--seed", "--iters", "--batch-size", "--micro-batch", "--end-to-end")),
        *((*OPTIMIZE, option, "1e31") for option in ("--lr-alpha", "--lr-activation-scale", "--regularizer-weight")),
    ):  # fmt: skip
        name = Mutation(" ".join(command[-2:]), nothing)
        yield [Target("run", "manifest.json", (*command, "--force"), expects="untouched")], [name]
    for command in (
        (*EVALUATE[:-2], "--seed", HUGE), (*EVALUATE[:-2], "--cfg-weight", "1e20"), ("evaluate_quantization", "--output", ""),
        ("report_calibration", "--output", ""), ("draw_images", "cat", "--output", ""), (*GENERATE, "--calib-dir", ""),
        ("export_quantized_model", "--output", "", "--force"), (*ANALYZE, "--output", ""), (*ANALYZE, "--outlier-threshold", "1e39"),
        *((*command, "--force", "--calib-dir", "") for command in (CACHE, COLLECT, OPTIMIZE)),
    ):  # fmt: skip
        name = Mutation(" ".join(word or "''" for word in command[-2:]), nothing)
        yield [Target("run", "manifest.json", command, expects="untouched")], [name]


def surroundings() -> Iterator[tuple[list[Target], list[Mutation]]]:
    """Yield commands with sound files in odd surroundings."""
    here = [Mutation("as it is", nothing)]

    def target(command: tuple[str, ...], around: str, expects: str) -> Target:
        return Target("run", "manifest.json", command, expects=expects, surroundings=around)

    for command in (forced("", COLLECT).command, DRAW, (*EVALUATE, "--variants", "w4-rtn"), (*GENERATE, "--force")):
        yield [target(command, "no temporary folder", "untouched")], here
    for command in (ANALYZE, REPORT, DRAW, (*EVALUATE, "--variants", "w4-rtn"), forced("", COLLECT).command):
        yield [target(command, "a full standard output", "refusal")], here
        yield [target(command, "no standard streams", "success")], here
    yield [target(("export_quantized_model", "--output", "{run}/new"), "no standard streams", "success")], here
