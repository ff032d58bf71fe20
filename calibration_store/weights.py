"""The weight track: block cache (2W) and learned rounding (3W)."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration_store.files import StoreError, map_npz, matching, read_json, read_npz
from calibration_store.runs import CalibrationPaths, read_manifest, run_identity

CACHE_FORMAT = "adaround_cache_v2"
WEIGHTS_FORMAT = "adaround_weights_v1"


@dataclass(frozen=True)
class BlockCachePaths:
    """Where stage 2W keeps what; `calib_dir` is the folder that all stages share."""

    calib_dir: Path

    @property
    def root(self) -> Path:
        return self.calib_dir / "adaround_cache"

    @property
    def metadata(self) -> Path:
        return self.root / "metadata.json"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    def sample(self, image_id: int, step_index: int) -> Path:
        return self.samples / f"{image_id:04d}_{step_index:03d}.npz"

    def owned_files(self) -> list[Path]:
        """Every file that stage 2W wrote, its half-written temporary files included."""
        patterns = {self.root: r"(metadata|plan)\.json", self.samples: r"\d{4,}_\d{3,}\.npz"}
        return [path for folder, pattern in patterns.items() for path in matching(folder, pattern)]


CACHE_REMEDY = "run cache_adaround_data.py with --resume to make it anew"


@dataclass(frozen=True)
class CachedBlock:
    """What one block saw and gave in one pass: tokens (R, tokens, 1, hidden) float16, mapped from the file."""

    image_id: int
    step_index: int
    inputs: tuple[np.ndarray, ...]  # (image, text) for mm blocks, (tokens,) for uni blocks
    outputs: tuple[np.ndarray, ...]  # (image, text), (image,) for the last mm block, (tokens,) for uni blocks
    modulation_input: np.ndarray  # (R, 1, 1, hidden)


def read_cache_metadata(calib_dir: Path) -> dict[str, Any]:
    """The block cache's metadata. Raises StoreError when there is none or it is of another calibration run."""
    path = BlockCachePaths(calib_dir).metadata
    metadata = read_json(path, CACHE_FORMAT, "cache_adaround_data.py")
    manifest = CalibrationPaths(calib_dir).manifest
    if manifest.exists() and metadata.get("calibration_run") not in (None, run_identity(read_manifest(calib_dir))):
        raise StoreError(
            f"{path}: made from another calibration run than {manifest}; run cache_adaround_data.py --force"
        )
    return metadata


def read_cached_block(calib_dir: Path, block: str, last: str | None = None) -> Iterator[CachedBlock]:
    """One block's inputs and outputs over all samples of the cache, without loading any other block's.

    With `last`, the inputs of `block` and the outputs of `last`: a stretch of blocks. Raises StoreError (also after the
    first samples) when a file is missing, damaged or of another run.
    """
    paths, metadata = BlockCachePaths(calib_dir), read_cache_metadata(calib_dir)
    for name in (block, last or block):
        if name not in metadata["block_names"]:
            cached = ", ".join(metadata["block_names"])
            raise StoreError(f"{paths.metadata}: block {name} is not cached (it has {cached})")
    input_keys = metadata["block_shapes"][block]["input_keys"]
    output_keys = metadata["block_shapes"][last or block]["output_keys"]
    for sample in metadata["samples"]:
        arrays = map_npz(paths.root / sample["file"], [*input_keys, *output_keys, "modulation_input"], CACHE_REMEDY)
        yield CachedBlock(
            sample["image_id"],
            sample["step_index"],
            tuple(arrays[key] for key in input_keys),
            tuple(arrays[key] for key in output_keys),
            arrays["modulation_input"],
        )


def is_cached(paths: BlockCachePaths, image_id: int, step_index: int, keys: Sequence[str]) -> bool:
    """Whether a sample of the block cache is on disk, whole, with these keys."""
    try:
        map_npz(paths.sample(image_id, step_index), keys, CACHE_REMEDY)
    except StoreError:
        return False
    return True


@dataclass(frozen=True)
class WeightPaths:
    """Where stage 3W keeps what; `calib_dir` is the folder that all stages share."""

    calib_dir: Path

    @property
    def root(self) -> Path:
        return self.calib_dir / "adaround_weights"

    @property
    def metadata(self) -> Path:
        return self.root / "metadata.json"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint.npz"

    def block(self, block: str) -> Path:
        return self.root / f"{block}.npz"

    def losses(self, block: str) -> Path:
        return self.root / f"{block}_losses.json"

    def owned_files(self) -> list[Path]:
        """Every file that stage 3W wrote, its half-written temporary files included."""
        return matching(self.root, r"(metadata|plan)\.json|checkpoint\.npz|(mm|uni)\d+(\.npz|_losses\.json)")


def read_quantized_block(paths: WeightPaths, block: str) -> dict[str, dict[str, np.ndarray]]:
    """The learned quantization of one block: {layer: {field: array}}, fields as in FORMATS.

    Raises StoreError that names the file.
    """
    remedy = "run optimize_adaround.py with --resume to make it anew"
    layers: dict[str, dict[str, np.ndarray]] = {}
    for key, array in read_npz(paths.block(block), remedy).items():
        name, _, field = key.rpartition("__")
        layers.setdefault(layer_name(name), {})[field] = array
    for name, fields in layers.items():
        if not {"q", "scale", "zero_point"} <= set(fields):
            raise StoreError(f"{paths.block(block)}: {name}: no codes, scale or zero point; {remedy}")
    return layers


def layer_name(prefix: str) -> str:
    """mm0_img_mlp_fc2 -> mm0.img.mlp.fc2 (q_proj and its like keep their underscore)."""
    return re.sub(r"_(?!proj)", ".", prefix)
