"""Say which file, damaged how, is given to which stage: the cases of tools/corruption_campaign.py that the formats imply."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from calibration_store.block_cache import CACHE_METADATA, cache_record, read_cache_metadata, stored_shapes
from calibration_store.cache_plan import CACHE_PLAN
from calibration_store.configs import MULTITIER_CONFIG, W4A8_CONFIG
from calibration_store.evaluation import EVALUATION_RUN
from calibration_store.manifest import MANIFEST
from calibration_store.model_config import MODEL_CONFIG
from calibration_store.model_folder import LOCAL_FILES, VOCABULARY
from calibration_store.partials import COLLECTION, PARTIAL
from calibration_store.samples import SAMPLE
from calibration_store.schema import JsonFormat, Record
from calibration_store.statistics import STATISTICS, STATISTICS_FILE, STEP_INDEX
from calibration_store.weights import LOSSES, WEIGHTS_METADATA, WEIGHTS_PLAN, layer_record
from tools.mutations import (
    Mutation,
    checkpoint_mutations,
    copied,
    edited,
    file_mutations,
    json_mutations,
    npz_mutations,
    replace,
    weight_mutations,
)
from tools.road import commands

# The commands of the clean run, small; {run} is the folder of a case, {root} the one above it.
CLEAN = [
    (script.removesuffix(".py"), *options) for script, *options in commands("tiny", "{run}", model="{root}/model")[:8]
]
GENERATE, CACHE, COLLECT, PLOTTED, _, OPTIMIZE, _, EVALUATED = CLEAN
ANALYZE = tuple(word for word in PLOTTED if word != "--plot")
HALF = (*OPTIMIZE, "--blocks", "mm0")
EVALUATE = (*EVALUATED, "--output", "{run}/new")
EVALUATE_AGAIN = (*EVALUATED, "--resume")
DRAW = (
    "draw_images",
    "red heart",
    "--num-steps",
    "1",
    "--activations",
    "--model",
    "{run}/quantized_model",
    "--output",
    "{run}/new",
)
Expectation = Literal["refusal", "untouched", "success"]


class Target(NamedTuple):
    """A file below `base` (run, half or model), and the stage that must not believe it when it is damaged.

    resume: the stage may also make the file anew; then `result` (default: the file) must be that of the clean run.
    expects: the right reaction. A refusal is one line and a non-zero exit code; with "untouched" every file must be as it was,
    too. "success" is for damage that means nothing to the stage, such as a member that it does not know.
    surroundings: an unusual state of the process, a key of SURROUNDINGS in tools/corruption_campaign.py.
    """

    base: str
    file: str
    command: tuple[str, ...]
    resume: bool = False
    result: str | None = None
    without: tuple[str, ...] = ()
    expects: Expectation = "refusal"
    surroundings: str | None = None


Cases = Iterator[tuple[list[Target], list[Mutation]]]


def resumed(base: str, file: str, command: tuple[str, ...], **more: Any) -> Target:
    flag = () if "--resume" in command else ("--resume",)
    return Target(base, file, (*command, *flag), resume=True, **more)


def forced(file: str, command: tuple[str, ...], *more: str) -> Target:
    return Target("run", file, (*command, *more, "--force"))


def every_format(clean: Path) -> Cases:
    """Yield (targets, mutations) of each kind of file."""
    run = clean / "run"
    yield from stage_1(run)
    yield from weight_track(run, clean / "half")
    yield from activation_track(run)
    yield from model_folder(clean / "model")


def of_json(path: Path, kind: JsonFormat, *more: Mutation) -> list[Mutation]:
    return [*json_mutations(kind.type, path), *file_mutations(path, kept_text=True), *more]


def of_npz(
    path: Path,
    record: Record,
    *more: Mutation,
    prefix: str = "",
    kept: tuple[str, ...] = (),
    flip_at: float = 2 / 3,
) -> list[Mutation]:
    return [*npz_mutations(record, path, prefix, kept), *file_mutations(path, flip_at=flip_at), *more]


def stage_1(run: Path) -> Cases:
    def second_image(**changes: Any) -> Any:
        return lambda manifest: manifest["images"][1].update(changes)

    manifest = [
        edited("a character that the tokenizer lacks", second_image(prompt="a 😀")),
        edited("another prompt", second_image(prompt="rocket")),
        edited("an image twice", second_image(image_id=0)),
        edited("another seed", second_image(seed=7)),
        edited("another guidance", second_image(cfg_weight=9.0)),
        edited("another file", second_image(filename="images/0000.png")),
        edited("an image less", lambda m: m["images"].pop()),
        edited("n_completed", lambda m: m.update(n_completed=1)),
        edited("another model's weights", lambda m: m.update(weights_fingerprint="0" * 64)),
        edited("another sampler shift", lambda m: m.update(sampler_shift=2.0)),
        edited("more steps", lambda m: m.update(num_steps=4)),
        edited("other latents", lambda m: m.update(latent_size=[8, 8])),
        edited("an odd latent", lambda m: m.update(latent_size=[15, 16])),
        edited("another precision", lambda m: m.update(activation_dtype="float16")),
        edited("T5", lambda m: m.update(use_t5=True)),
        edited("a model that is not there", lambda m: m.update(model_version="/nowhere/model")),
        edited("a checkpoint that is not there", lambda m: m.update(local_checkpoint="/nowhere/file.safetensors")),
        edited("another format", lambda m: m.update(format="calibration_manifest_v9")),
    ]
    name = "manifest.json"
    yield [forced(name, COLLECT, "--dry-run"), resumed("run", name, GENERATE)], of_json(run / name, MANIFEST, *manifest)
    name = "samples/0000_000.npz"
    more = [
        copied("another step's", run / "samples/0000_001.npz"),
        copied("another image's", run / "samples/0001_000.npz"),
    ]
    yield (
        [forced(name, COLLECT, "--dry-run"), resumed("run", name, GENERATE)],
        of_npz(run / name, SAMPLE, *more, kept=()),
    )
    name = "images/0000.png"
    yield (
        [resumed("run", name, GENERATE)],
        [*file_mutations(run / name), copied("another image's", run / "images/0001.png")],
    )


def weight_track(run: Path, half: Path) -> Cases:
    one_block = ("--blocks", "mm0")
    name = "adaround_cache/metadata.json"

    def shape(metadata: dict) -> None:
        metadata["block_shapes"]["mm0"]["output_shapes"][0][1] += 1

    def input_key(metadata: dict) -> None:
        metadata["block_shapes"]["mm0"]["input_keys"][0] = "mm3__out0"

    more = [
        edited("another shape", shape),
        edited("another key", input_key),
        edited("another calibration run", lambda m: m.update(calibration_run="0" * 64)),
        edited("a sample twice", lambda m: m["samples"].append(m["samples"][0])),
        edited("another sample's file", lambda m: m["samples"][0].update(file=m["samples"][1]["file"])),
        edited("a block less", lambda m: m["block_names"].pop()),
    ]
    yield [forced(name, OPTIMIZE, *one_block, "--dry-run")], of_json(run / name, CACHE_METADATA, *more)
    name = "adaround_cache/plan.json"
    yield [resumed("run", name, CACHE)], of_json(run / name, CACHE_PLAN)
    name = "adaround_cache/samples/0000_000.npz"
    shapes = {
        key: shape for key, shape in stored_shapes(read_cache_metadata(run)).items() if key.startswith(("mm0__", "mod"))
    }
    more = [
        copied("another step's", run / "adaround_cache/samples/0000_001.npz"),
        copied("another image's", run / "adaround_cache/samples/0001_000.npz"),
    ]
    yield (
        [forced(name, OPTIMIZE, *one_block), resumed("run", name, CACHE)],
        of_npz(run / name, cache_record(shapes), *more, flip_at=0.01),  # in the block that is trained
    )

    learned = (*EVALUATE, "--variants", "w4-adaround")
    name = "adaround_weights/metadata.json"
    more = [
        edited("another calibration run", lambda m: m.update(calibration_run="0" * 64)),
        edited("another model's weights", lambda m: m.update(weights_fingerprint="0" * 64)),
        edited("other bits", lambda m: m.update(weight_bits=3)),
        edited("other groups", lambda m: m.update(group_size=32)),
    ]
    yield [Target("run", name, learned)], of_json(run / name, WEIGHTS_METADATA, *more)
    name = "adaround_weights/plan.json"
    yield [resumed("run", name, OPTIMIZE)], of_json(run / name, WEIGHTS_PLAN)
    name = "adaround_weights/mm0_losses.json"
    yield [resumed("run", name, OPTIMIZE)], of_json(run / name, LOSSES)
    name = "adaround_weights/mm0.npz"
    layer = layer_record(4)
    arrays = of_npz(
        run / name, layer, copied("another block's", run / "adaround_weights/mm1.npz"),
        prefix="mm0_txt_mlp_fc2__", kept=("alpha", "bias"),
    )  # fmt: skip
    yield [Target("run", name, learned)], arrays
    yield [resumed("run", name, OPTIMIZE)], list(file_mutations(run / name))
    name = "adaround_weights/checkpoint.npz"
    target = resumed(
        "half", name, HALF, result="adaround_weights/mm0.npz",
        without=("adaround_weights/mm0.npz", "adaround_weights/mm0_losses.json", "adaround_weights/metadata.json"),
    )  # fmt: skip
    yield [target], [*file_mutations(half / name), *checkpoint_mutations(half / name)]


def activation_track(run: Path) -> Cases:
    analyzers = (ANALYZE, ("analyze_activations_multitier", "--policy", "sqnr", "--average-bits", "6"))

    def analyzed(name: str) -> list[Target]:
        return [Target("run", name, command) for command in analyzers]

    name = "activations/layer_statistics.json"
    more = [
        edited("a step twice", lambda m: m["step_keys"].append("0")),
        edited("no sigma of a step", lambda m: m["sigma_map"].pop("1")),
        edited("two steps of one sigma", lambda m: m["sigma_map"].update({"1": m["sigma_map"]["0"]})),
        edited("a folder outside", lambda m: m.update(timestep_dir="../activations/timestep_stats")),
        edited("an absolute folder", lambda m: m.update(timestep_dir=str(run / "activations/timestep_stats"))),
        edited(
            "sigmas in another order",
            lambda m: m.update(sigma_map=dict(zip(m["sigma_map"], reversed(m["sigma_map"].values()), strict=True))),
        ),
        edited(
            "sigmas that are timesteps", lambda m: m.update(sigma_map={k: 1000 * v for k, v in m["sigma_map"].items()})
        ),
        edited("more images than ids", lambda m: m["metadata"].update(num_images=5)),
        edited("a step less", lambda m: m["step_keys"].pop()),
    ]
    yield analyzed(name), of_json(run / name, STATISTICS_FILE, *more)
    name = "activations/timestep_stats/step_1_index.json"
    layer = "mm1.txt.mlp.fc2"
    more = [
        edited("a layer less", lambda m: m.pop(layer) and None),
        edited("another range", lambda m: m[layer].update(tensor_absmax=m[layer]["tensor_absmax"] * 2)),
        edited("no shift", lambda m: m[layer].update(has_shift=False)),
        edited("no histogram", lambda m: m[layer].update(has_hist=False)),
        edited("a percentile outside", lambda m: m[layer].update(hist_p999=1e6)),
        copied("another step's", run / "activations/timestep_stats/step_2_index.json"),
    ]
    yield analyzed(name), of_json(run / name, STEP_INDEX, *more)
    name = "activations/timestep_stats/step_1.npz"
    more = [copied("another step's", run / "activations/timestep_stats/step_2.npz")]
    prefix = layer.replace(".", "_") + "__"
    yield analyzed(name), of_npz(run / name, STATISTICS, *more, prefix=prefix)
    name = "activations/partial/collection.json"
    yield [resumed("run", name, COLLECT)], of_json(run / name, COLLECTION)
    name = "activations/partial/0000_001.npz"
    more = [
        copied("another step's", run / "activations/partial/0000_000.npz"),
        copied("another image's", run / "activations/partial/0001_001.npz"),
    ]
    yield [resumed("run", name, COLLECT)], of_npz(run / name, PARTIAL, *more)
    yield from configs(run, layer)
    name = str(next((run / "evaluation/runs").glob("w4-rtn*")).relative_to(run))
    original = next((run / "evaluation/runs").glob("fp_*"))
    yield (
        [resumed("run", name, EVALUATE_AGAIN)],
        of_npz(run / name, EVALUATION_RUN, copied("another variant's", original)),
    )


def configs(run: Path, layer: str) -> Cases:
    def entry(**changes: Any) -> Any:
        return lambda config: config["per_timestep"]["0"][layer].update(changes)

    def migrated(config: dict) -> None:
        layers = config["outlier_config"]
        if layers:
            next(iter(layers.values()))["multiplier_vector"] = [2.0]
        else:
            config["outlier_config"] = 5

    for name, kind, variant in (
        ("quant_config.json", W4A8_CONFIG, "a8"), ("quant_config_multitier.json", MULTITIER_CONFIG, "multitier"),
    ):  # fmt: skip
        more = [
            edited("a shift of one value", entry(shift=[0.5])),
            edited("a negative range", entry(clipping_range=-5.0)),
            edited("10^12 bits", entry(bits=10**12)),
            edited("a layer less", lambda c: c["per_timestep"]["0"].pop(layer) and None),
            edited("another calibration run", lambda c: c["metadata"].update(calibration_run="0" * 64)),
            edited("another model's weights", lambda c: c["metadata"].update(weights_fingerprint="0" * 64)),
            edited("no sigma of a step", lambda c: c["sigma_map"].pop("1") and None),
            edited("two steps of one sigma", lambda c: c["sigma_map"].update({"1": c["sigma_map"]["0"]})),
            edited("an unknown scale_meaning", lambda c: c["metadata"].update(scale_meaning="half")),
            edited("multipliers of one value", migrated),
        ]
        target = Target("run", f"activations/{name}", (*EVALUATE, "--variants", variant))
        yield [target], of_json(run / target.file, kind, *more)


def model_folder(model: Path) -> Cases:
    draw = (
        "generate_calibration_data",
        "--model",
        "{run}",
        "--num-images",
        "1",
        "--num-steps",
        "1",
        "--calib-dir",
        "{run}/new",
    )

    def reads(name: str) -> list[Target]:
        return [Target("model", name, draw)]

    more = [
        edited("heads that are not 64 wide", lambda c: c["mmdit"].update(num_heads=2)),
        edited("more layers", lambda c: c["mmdit"].update(depth_multimodal=9)),
        edited("fewer layers", lambda c: c["clip_g"].update(num_layers=2)),
        edited("another vocabulary", lambda c: c["clip_l"].update(vocab_size=2000)),
        edited("an unknown entry", lambda c: c["mmdit"].update(colour=3)),
        edited("an unknown entry of a text encoder", lambda c: c["clip_g"].update(colour=3)),
        edited("an entry that is not the file's to say", lambda c: c["mmdit"].update(low_memory_mode=True)),
        edited("another patch", lambda c: c["mmdit"].update(patch_size=4)),
    ]
    yield reads("config.json"), of_json(model / "config.json", MODEL_CONFIG, *more)
    more = [
        edited("an id outside the table", lambda v: v.update({"a</w>": 10**6})),
        edited("an id twice", lambda v: v.update({"a</w>": v["b</w>"]})),
        edited("no end token", lambda v: v.pop("<|endoftext|>") and None),
    ]
    yield reads("vocab.json"), of_json(model / "vocab.json", VOCABULARY, *more)
    lines = (model / "merges.txt").read_text().split("\n")
    changed = ["\n".join([*lines[:9], line, *lines[9:]]).encode() for line in ("a b c", "zz qq", lines[5], "")]
    yield (
        reads("merges.txt"),
        [
            *[m for m in file_mutations(model / "merges.txt", kept_text=True) if m.name not in ("truncated", "empty")],
            *[Mutation(f"merge {i}", partial(replace, content=text)) for i, text in enumerate(changed)],
        ],
    )
    broken = ("empty", "garbage", "a folder", "a link to itself", "a dangling link", "a pipe", "100 GB of nothing")
    yield reads("captions.txt"), [m for m in file_mutations(model / "captions.txt", True) if m.name in broken]
    for part in LOCAL_FILES:
        name = f"{part}.safetensors"
        plain = [m for m in file_mutations(model / name) if m.name != "a flipped bit"]  # nobody noted its bits yet
        yield reads(name), [*plain, *weight_mutations()]


def exported(run: Path) -> Cases:
    """Yield damage of a folder of stage 5, which notes digests of all files that decide its pictures."""

    def exchanged(vocabulary: dict) -> None:
        first, second = list(vocabulary)[:2]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    def wider(activations: dict) -> None:
        for entry in next(iter(activations["per_timestep"].values())).values():
            entry["clipping_range"] = entry["clipping_range"] * 2

    def without_ranges(activations: dict) -> None:
        del activations["per_timestep"]

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
        "activations.json": [
            edited("wider ranges", wider),
            edited("ranges of no step", without_ranges),
            edited("another rule", lambda a: a.update(rule="dynamic per block of 32, symmetric")),
            edited("a rule that nobody knows", lambda a: a.update(rule="dynamic per block of 16")),
        ],
        "mmdit.safetensors": [],
        "clip_l.safetensors": [],
    }.items():
        path = run / folder / name
        yield [Target("run", f"{folder}/{name}", DRAW)], [*file_mutations(path), *more]
