"""Stage 1's run: manifest and samples; and what the stages after it check before they begin, go on or start over."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from calibration_store.files import TEMP_SUFFIX, StoreError, matching, read_json, read_npz, write_json

MANIFEST_FORMAT = "calibration_manifest_v1"
GENERATE = "generate_calibration_data.py"


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
        """Every file that stage 1 wrote here, its half-written temporary files included."""
        patterns = {
            self.root: r"manifest\.json",
            self.samples: r"\d{4,}_\d{3,}\.npz",
            self.images: r"\d{4,}\.png",
        }
        return [path for folder, pattern in patterns.items() for path in matching(folder, pattern)]


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


def read_sample(paths: CalibrationPaths, manifest: Mapping[str, Any], image_id: int, step_index: int) -> dict:
    """Read one sample and check that it belongs to this run.

    Raises StoreError that names the file when it is missing, damaged, or of another image, step, size or dtype.
    """
    path = paths.sample(image_id, step_index)
    remedy = f"run {GENERATE} with --resume to make it anew"
    arrays = read_npz(path, remedy)
    try:
        found = (int(arrays["image_id"]), int(arrays["step_index"]), arrays["x"].shape, str(arrays["x"].dtype))
        arrays["timestep"], arrays["sigma"], arrays["is_final"]
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path}: not a calibration sample ({error}); {remedy}") from None
    expected = (image_id, step_index, (1, *manifest["latent_size"], 16), manifest["activation_dtype"])
    if found != expected:
        names = ("image_id", "step_index", "shape of x", "dtype of x")
        wrong = "; ".join(f"{n} {f}, expected {e}" for n, f, e in zip(names, found, expected, strict=True) if f != e)
        raise StoreError(f"{path}: a sample of another run ({wrong}); {remedy}")
    return arrays


def saved_steps(num_steps: int, stride: int) -> list[int]:
    """Step indices that stage 1 keeps: every stride-th model input, and num_steps for the finished latent."""
    return [*range(0, num_steps, stride), num_steps]


def is_complete(paths: CalibrationPaths, manifest: Mapping[str, Any], image_id: int) -> bool:
    """Whether every file of an image is on disk and valid."""
    if manifest["save_images"] and not _is_whole_png(paths.image(image_id)):
        return False
    try:
        for step_index in saved_steps(manifest["num_steps"], manifest["stride"]):
            read_sample(paths, manifest, image_id, step_index)
    except StoreError:
        return False
    return True


def _is_whole_png(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")


def run_identity(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over what the samples follow from: two runs with the same one have the same samples."""
    keys = ("model_version", "local_checkpoint", "num_steps", "cfg_scale", "negative_prompt", "latent_size", "use_t5")
    keys += ("sampler_shift", "seed_base", "activation_dtype", "stride", "batch_size")
    prompts = [image["prompt"] for image in manifest["images"]]
    return hashlib.sha256(orjson.dumps([*(manifest.get(key) for key in keys), prompts])).hexdigest()


def select_images(manifest: Mapping[str, Any], num_images: int) -> list[dict[str, Any]]:
    """num_images entries of a finished run's images, evenly over the whole run, without repeats.

    Raises StoreError when the run is unfinished or has fewer images.
    """
    images = manifest["images"]
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
    return saved_steps(manifest["num_steps"], manifest.get("stride", 1))[:-1][::stride]


def read_manifest(root: Path) -> dict[str, Any]:
    """Read the manifest of a calibration folder. Raises StoreError, also when an entry that the stages need is not right."""
    path = CalibrationPaths(root).manifest
    manifest = read_json(path, MANIFEST_FORMAT, GENERATE)
    for content, entries in (
        (manifest, MANIFEST_ENTRIES),
        *((image, IMAGE_ENTRIES) for image in manifest.get("images", [])),
    ):
        for key, kind in entries.items():
            if not isinstance(content.get(key) if isinstance(content, dict) else None, kind):
                raise StoreError(f"{path}: no valid entry {key!r}; run {GENERATE} with --force to make the run anew")
    return manifest


MANIFEST_ENTRIES = {
    "model_version": str,
    "num_steps": int,
    "cfg_scale": (int, float),
    "latent_size": list,
    "use_t5": bool,
}
MANIFEST_ENTRIES |= {"activation_dtype": str, "num_images": int, "images": list}
IMAGE_ENTRIES = {"image_id": int, "prompt": str, "negative_prompt": str, "seed": int, "cfg_weight": (int, float)}


def read_run_sample(
    paths: CalibrationPaths, manifest: Mapping[str, Any], image_id: int, step_index: int, schedule: list[float]
) -> dict[str, np.ndarray]:
    """`read_sample`, and its timestep must be the schedule's. Raises StoreError that names the file."""
    sample = read_sample(paths, manifest, image_id, step_index)
    if float(sample["timestep"]) != schedule[step_index]:
        raise StoreError(
            f"{paths.sample(image_id, step_index)}: a sample of another run (timestep {float(sample['timestep'])}, "
            f"expected {schedule[step_index]}); run {GENERATE} with --force to make the run anew"
        )
    return sample


def check_stage(
    paths, record: Path, plan: Mapping[str, Any], options: Mapping[str, str], resume: bool, force: bool, made_by: str
) -> None:
    """Whether a stage may begin, go on or start over in its folder, as --resume and --force say. Writes nothing.

    record is the JSON file that says what the stage's run is (`plan`); options names the flag behind a key of
    it. Raises StoreError when the folder is used and neither flag is given, or when --resume would mix two runs.
    """
    owned = paths.owned_files()
    finished = [path for path in owned if path.suffix != TEMP_SUFFIX]
    if finished and not (resume or force):
        raise StoreError(f"{paths.root} holds a run already: --resume goes on with it, --force starts over")
    if finished and resume:
        if not record.exists():
            raise StoreError(f"{paths.root}: files without {record.name}; use --force to start over")
        before = read_json(record, plan["format"], made_by)
        for key, flag in options.items():
            if before.get(key) != plan[key]:
                raise StoreError(
                    f"--resume: the run in {paths.root} has {flag} {before.get(key)}, not {plan[key]}; use --force"
                )
        if before.get("calibration_run") != plan["calibration_run"]:
            raise StoreError(f"--resume: {paths.root} was made from another calibration run; use --force")


def open_stage(paths, record: Path, plan: Mapping[str, Any], force: bool) -> None:
    """After `check_stage`: remove half-written files, with `force` all of an earlier run's, and note what the run is."""
    clear_files(paths.owned_files(), record, force)
    if not record.exists():
        write_json(record, plan)


def clear_files(owned: Sequence[Path], first: Path, everything: bool) -> None:
    """Remove temporary files, or everything, `first` first: without it the others are no run."""
    for path in sorted(owned, key=lambda path: path != first):
        if everything or path.suffix == TEMP_SUFFIX:
            path.unlink()


def owned_bytes(paths) -> int:
    """Bytes on the disk of what a stage has written so far."""
    return sum(path.stat().st_size for path in paths.owned_files())
