"""Stage 1's run: manifest and samples; and what the stages after it check before they begin, go on or start over."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import orjson
from msgspec import Meta
from PIL import Image

from calibration_store.files import TEMP_SUFFIX, StoreError, matching, read_npz, remove_file, write_json
from calibration_store.schema import (
    FINITE,
    FLOATS,
    NOT_NEGATIVE,
    Count,
    Digest,
    Index,
    JsonFormat,
    Member,
    Name,
    NotNegative,
    Positive,
    Record,
    RelativePath,
    Seed,
    Side,
    Steps,
)

MANIFEST_FORMAT = "calibration_manifest_v1"
GENERATE = "generate_calibration_data.py"


class ImageEntry(TypedDict):
    image_id: Index
    prompt: Name
    negative_prompt: str
    seed: Seed
    cfg_weight: NotNegative
    num_steps: Steps
    filename: RelativePath | None


class _Manifest(TypedDict):
    format: Literal["calibration_manifest_v1"]
    model_version: Name
    num_steps: Steps
    cfg_scale: NotNegative
    negative_prompt: str
    latent_size: tuple[Side, Side]
    use_t5: bool
    sampler_shift: Positive
    seed_base: Annotated[int, Meta(ge=0, le=2**31)]
    activation_dtype: Literal["float16", "float32"]
    stride: Steps
    batch_size: Count
    save_images: bool
    num_images: Count
    n_completed: Index
    prompts_sha256: Digest
    package_versions: dict[str, str]
    images: list[ImageEntry]


class Manifest(_Manifest, total=False):
    """manifest.json; `weights_fingerprint` is not in files of version 0.2.0 and older."""

    local_checkpoint: Name | None
    weights_fingerprint: Digest
    batch_option: Count  # what was asked for; a run of fewer images has fewer rows in a pass


def manifest_fault(manifest: Manifest) -> str | None:
    """What a manifest's entries say of each other that cannot be."""
    images = manifest["images"]
    if not len(images) == manifest["n_completed"] <= manifest["num_images"]:
        return f"{len(images)} images, n_completed {manifest['n_completed']}, num_images {manifest['num_images']}"
    shared = {key: manifest[name] for key, name in SHARED_WITH_IMAGES.items()}
    for image in images:
        image_id = image["image_id"]
        own = shared | {"seed": manifest["seed_base"] + image_id}
        own["filename"] = f"images/{image_id:04d}.png" if manifest["save_images"] else None
        for key, expected in own.items():
            if image[key] != expected:
                return f"image {image_id}: {key} {image[key]!r}, expected {expected!r}"
    if manifest["batch_size"] > min(manifest.get("batch_option", manifest["batch_size"]), manifest["num_images"]):
        return f"batch_size {manifest['batch_size']} is above what was asked for, or the number of images"
    ids = [image["image_id"] for image in images]
    if ids != sorted(set(ids)) or (ids and ids[-1] >= manifest["num_images"]):
        return "image_ids are not distinct and ascending below num_images"
    if len(images) == manifest["num_images"]:
        digest = prompts_digest([image["prompt"] for image in images])
        if digest != manifest["prompts_sha256"]:
            return "prompts are not those of prompts_sha256"
    return None


SHARED_WITH_IMAGES = {"cfg_weight": "cfg_scale", "negative_prompt": "negative_prompt", "num_steps": "num_steps"}
MANIFEST = JsonFormat(MANIFEST_FORMAT, Manifest, GENERATE, manifest_fault)


def prompts_digest(prompts: Sequence[str]) -> str:
    """SHA-256 of the prompts in order: tells another list under --resume."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


@dataclass(frozen=True)
class CalibrationPaths:
    """Where stage 1 keeps what, below one `--calib-dir`."""

    root: Path

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def images(self) -> Path:
        return self.root / "images"

    def sample(self, image_id: int, step_index: int) -> Path:
        return self.samples / f"{image_id:04d}_{step_index:03d}.npz"

    def image(self, image_id: int) -> Path:
        return self.images / f"{image_id:04d}.png"

    def owned_files(self) -> list[Path]:
        """Every file that stage 1 wrote here, its half-written temporary files included.

        A PNG is ours when it says so itself or the manifest lists it: people keep their own 0001.png.
        """
        patterns = {self.root: r"manifest\.json", self.samples: r"\d{4,}_\d{3,}\.npz"}
        listed = _listed_pictures(self.manifest)
        pictures = [
            path for path in matching(self.images, r"\d{4,}\.png") if path.name in listed or is_our_picture(path)
        ]
        return [path for folder, pattern in patterns.items() for path in matching(folder, pattern)] + pictures


def sample_arrays(
    x: np.ndarray, timestep: np.ndarray, sigma: float, step_index: int, image_id: int, is_final: bool
) -> dict[str, np.ndarray]:
    """The arrays of one sample file. x (1, h, w, 16) and timestep () share the activation dtype."""
    return {
        "x": x,
        "timestep": np.asarray(timestep, dtype=x.dtype),
        "sigma": np.float32(sigma),
        "step_index": np.int32(step_index),
        "image_id": np.int32(image_id),
        "is_final": np.bool_(is_final),
    }


SAMPLE = Record(
    {
        "image_id": Member(("int32",), ()),
        "step_index": Member(("int32",), ()),
        "x": Member(FLOATS, (1, "height", "width", 16), (FINITE,)),
        "timestep": Member(FLOATS, (), (FINITE, NOT_NEGATIVE)),
        "sigma": Member(("float32",), (), (FINITE, NOT_NEGATIVE)),
        "is_final": Member(("bool",), ()),
    }
)


def read_sample(
    paths: CalibrationPaths,
    manifest: Mapping[str, Any],
    image_id: int,
    step_index: int,
    schedule: tuple[Sequence[float], Sequence[float]] | None = None,
) -> dict[str, np.ndarray]:
    """Read one sample and check that it belongs to this run.

    schedule: the run's (sigmas, timesteps), which the sample must have been taken at. Raises StoreError that names the
    file when it is missing, damaged, not finite, or of another image, step, size or dtype.
    """
    path = paths.sample(image_id, step_index)
    remedy = f"run {GENERATE} with --resume to make it anew"
    arrays = read_npz(path, remedy)
    fault = SAMPLE.fault(arrays)
    if fault:
        raise StoreError(f"{path}: not a calibration sample ({fault}); {remedy}")
    found = {name: arrays[name].item() for name in ("image_id", "step_index", "is_final")}
    found |= {"shape of x": arrays["x"].shape, "dtype of x": arrays["x"].dtype.name}
    found |= {"dtype of timestep": arrays["timestep"].dtype.name}
    dtype, shape = manifest["activation_dtype"], (1, *manifest["latent_size"], 16)
    expected = {"image_id": image_id, "step_index": step_index, "is_final": step_index == manifest["num_steps"]}
    expected |= {"shape of x": shape, "dtype of x": dtype, "dtype of timestep": dtype}
    for name, values in zip(("sigma", "timestep"), schedule or (), strict=False):
        found[name], exact = arrays[name].item(), values[step_index]
        expected[name] = found[name] if abs(found[name] - exact) <= 1e-3 * exact else exact  # devices round differently
    wrong = [f"{name} {value}, expected {expected[name]}" for name, value in found.items() if value != expected[name]]
    if wrong:
        raise StoreError(f"{path}: a sample of another run ({'; '.join(wrong)}); {remedy}")
    return arrays


def saved_steps(num_steps: int, stride: int) -> list[int]:
    """Step indices that stage 1 keeps: every stride-th model input, and num_steps for the finished latent."""
    return [*range(0, num_steps, stride), num_steps]


def is_complete(
    paths: CalibrationPaths,
    manifest: Mapping[str, Any],
    image: Mapping[str, Any],
    schedule: tuple[Sequence[float], Sequence[float]],
    picture_size: tuple[int, int],
) -> bool:
    """Whether every file of an image (its entry in the plan) is on disk and what it should be."""
    if manifest["save_images"] and not is_picture(paths.image(image["image_id"]), image, picture_size):
        return False
    try:
        for step_index in saved_steps(manifest["num_steps"], manifest["stride"]):
            read_sample(paths, manifest, image["image_id"], step_index, schedule)
    except StoreError:
        return False
    return True


# A picture says what it is of, in text chunks: that makes it ours, and tells one image's picture from another's.
OUR_CHUNK = "calibration_image"
PICTURE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises for damaged files


def picture_chunks(image: Mapping[str, Any]) -> dict[str, str]:
    """The text chunks of an image's PNG."""
    return {OUR_CHUNK: str(image["image_id"]), "prompt": image["prompt"], "seed": str(image["seed"])}


def _listed_pictures(manifest: Path) -> set[str]:
    """Names of the PNG files that a manifest of any version lists."""
    try:
        images = orjson.loads(manifest.read_bytes())["images"]
        return {Path(image["filename"]).name for image in images if image["filename"]}
    except (OSError, ValueError, TypeError, KeyError):  # none, or damaged: it lists nothing
        return set()


def is_our_picture(path: Path) -> bool:
    """Whether stage 1 wrote a file (temporary ones: by their name)."""
    if path.suffix == TEMP_SUFFIX:
        return True
    try:
        with Image.open(path) as picture:
            return OUR_CHUNK in picture.text if picture.format == "PNG" else False
    except PICTURE_ERRORS:
        return False


def is_picture(path: Path, image: Mapping[str, Any], size: tuple[int, int]) -> bool:
    """Whether a file is the whole PNG of this image, size (width, height)."""
    try:
        with Image.open(path) as picture:
            if picture.format != "PNG" or picture.size != size or picture.mode != "RGB":
                return False
            picture.load()
            chunks = picture_chunks(image)
            return {key: picture.text.get(key) for key in chunks} == chunks
    except PICTURE_ERRORS:
        return False


IDENTITY_KEYS = ("weights_fingerprint", "num_steps", "cfg_scale", "negative_prompt", "latent_size", "use_t5")
IDENTITY_KEYS += ("sampler_shift", "seed_base", "activation_dtype", "batch_size")


def run_identity(manifest: Mapping[str, Any], image_ids: Iterable[int]) -> str:
    """SHA-256 over what the samples of these images follow from, wherever the model lies and however the run grew.

    Raises StoreError when the run lacks one of the images.
    """
    prompts = {image["image_id"]: image["prompt"] for image in manifest["images"]}
    used = sorted(image_ids)
    missing = [image_id for image_id in used if image_id not in prompts]
    if missing:
        raise StoreError(f"the calibration run has no image {missing[0]}; finish it with {GENERATE} --resume")
    keys = [list(v) if isinstance(v := manifest.get(key), tuple) else v for key in IDENTITY_KEYS]
    return hashlib.sha256(orjson.dumps([keys, [[image_id, prompts[image_id]] for image_id in used]])).hexdigest()


def same_run(manifest: Mapping[str, Any], made_from: Mapping[str, Any]) -> bool:
    """Whether files that note their `calibration_run` and `selected_image_ids` come from this run.

    Files that note no run (another tool's) are taken as they are.
    """
    noted, used = made_from.get("calibration_run"), made_from.get("selected_image_ids")
    if noted is None:
        return True
    known = {image["image_id"] for image in manifest["images"]}
    return bool(used) and set(used) <= known and noted == run_identity(manifest, used)


def select_images(
    manifest: Mapping[str, Any], num_images: int, before: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """num_images entries of a finished run's images, evenly over the whole run, without repeats.

    before: the image_ids that a stage under way chose already; a run that has grown since does not change them. Raises
    StoreError when the run is unfinished or has fewer images.
    """
    images = manifest["images"]
    if before is not None:
        kept = [image for image in images if image["image_id"] in set(before)]
        if len(kept) == len(before) == num_images:
            return kept
    if len(images) < manifest["num_images"]:
        raise StoreError(
            f"the calibration run has {len(images)} of {manifest['num_images']} images; "
            f"finish it with {GENERATE} --resume (TROUBLESHOOTING_GUIDE Issue 9)"
        )
    if num_images > len(images):
        raise StoreError(
            f"--num-images {num_images}: the calibration run has {len(images)} images; give --num-images {len(images)} or fewer"
        )
    return [images[round(i)] for i in np.linspace(0, len(images) - 1, num_images)]


def select_steps(manifest: Mapping[str, Any], stride: int) -> list[int]:
    """Every stride-th of the model inputs that stage 1 saved, as step indices."""
    return saved_steps(manifest["num_steps"], manifest["stride"])[:-1][::stride]


def read_manifest(root: Path) -> dict[str, Any]:
    """Read the manifest of a calibration folder. Raises StoreError, also for one of version 0.2.0 or older."""
    path = CalibrationPaths(root).manifest
    manifest = MANIFEST.read(path)
    if "weights_fingerprint" not in manifest or "batch_option" not in manifest:
        raise StoreError(
            f"{path}: of version 0.2.0 or older, which did not note the model's weights (and padded sd3-emoji's prompts "
            f"wrongly); run {GENERATE} with --force to make the run anew"
        )
    return manifest


def plan_before(record: Path, kind: JsonFormat, resume: bool, **options: Any) -> dict[str, Any] | None:
    """The plan that --resume goes on with, if there is one with these options. Raises StoreError when it is damaged."""
    if not resume or not record.exists():
        return None
    before = kind.read(record)
    return before if all(before[key] == value for key, value in options.items()) else None


def check_stage(
    paths,
    record: Path,
    kind: JsonFormat,
    plan: Mapping[str, Any],
    options: Mapping[str, str],
    resume: bool,
    force: bool,
) -> None:
    """Whether a stage may begin, go on or start over in its folder, as --resume and --force say. Writes nothing.

    record is the JSON file, of format `kind`, that says what the stage's run is (`plan`); options names the flag behind a
    key of it. Raises StoreError when the folder is used and neither flag is given, or when --resume would mix two runs.
    """
    owned = paths.owned_files()
    finished = [path for path in owned if path.suffix != TEMP_SUFFIX]
    if finished and not (resume or force):
        raise StoreError(f"{paths.root} holds a run already: --resume goes on with it, --force starts over")
    if finished and resume:
        if not record.exists():
            raise StoreError(f"{paths.root}: files without {record.name}; use --force to start over")
        before = kind.read(record)
        for key, flag in options.items():
            if before.get(key) != plan[key]:
                raise StoreError(
                    f"--resume: the run in {paths.root} has {flag} {shown(before.get(key))}, not {shown(plan[key])}; use --force"
                )
        if before.get("calibration_run") != plan["calibration_run"]:
            raise StoreError(f"--resume: {paths.root} was made from another calibration run; use --force")


def shown(value: Any) -> str:
    """A value in a message; an empty one is seen."""
    return repr(value) if value == "" else str(value)


def open_stage(paths, record: Path, plan: Mapping[str, Any], force: bool) -> None:
    """After `check_stage`: remove half-written files, with `force` all of an earlier run's, and note what the run is."""
    clear_files(paths.owned_files(), record, force)
    if not record.exists():
        write_json(record, plan)


def clear_files(owned: Sequence[Path], first: Path, everything: bool) -> None:
    """Remove temporary files, or everything, `first` first: without it the others are no run."""
    for path in sorted(owned, key=lambda path: path != first):
        if everything or path.suffix == TEMP_SUFFIX:
            remove_file(path)


def owned_bytes(paths) -> int:
    """Bytes on the disk of what a stage has written so far."""
    return sum(path.stat().st_size for path in paths.owned_files())
