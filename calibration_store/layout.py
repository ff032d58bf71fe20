"""All folders and file names of every stage, below one `--calib-dir`.

`owned_files` of a class are the files that a stage wrote, half-written temporary files included; --force removes them.
"""

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import orjson

from calibration_store.errors import OptionError, StoreError
from calibration_store.files import TEMP_SUFFIX, clear_temporaries, files_matching, read_bytes
from calibration_store.names import BLOCK_PATTERN
from calibration_store.pictures import DRAWN_CHUNK, VARIANT_CHUNK, is_our_picture, listed_pictures

SAMPLE_PATTERN = r"\d{4,}_\d{3,}\.npz"


def _sample_name(image_id: int, step_index: int) -> str:
    return f"{image_id:04d}_{step_index:03d}.npz"


def _owned(patterns: dict[Path, str]) -> list[Path]:
    return [path for folder, pattern in patterns.items() for path in files_matching(folder, pattern)]


SHOWN = 5  # folders that a message names


def runs_below(folder: Path) -> list[Path]:
    """Return the folders with a calibration run right below a folder, sorted; none where it cannot be read."""
    try:
        return sorted(path.parent for path in folder.glob("*/manifest.json"))
    except OSError:
        return []


def named(folders: Sequence[Path]) -> str:
    """Return some folders' names for a message."""
    return ", ".join(map(str, folders[:SHOWN])) + (", …" if len(folders) > SHOWN else "")


def runs_nearby(folder: Path) -> str:
    """Return "; there are …" with the runs below a folder, or else beside it, those of the most similar names first."""
    found = runs_below(folder) or [path for path in runs_below(folder.parent) if path != folder]
    found.sort(key=lambda path: -difflib.SequenceMatcher(None, path.name, folder.name).ratio())
    return f"; there are {named(found)}" if found else ""


class CalibrationPaths:
    """Paths of stage 1; `root` is the calibration folder itself."""

    def __init__(self, root: Path):
        self.root = root
        self.manifest = root / "manifest.json"
        self.samples = root / "samples"
        self.images = root / "images"
        self.history = root / "history.jsonl"

    def sample(self, image_id: int, step_index: int) -> Path:
        return self.samples / _sample_name(image_id, step_index)

    def image(self, image_id: int) -> Path:
        return self.images / f"{image_id:04d}.png"

    def owned_files(self) -> list[Path]:
        """Return the stage's files. A PNG is one of them where its text or the manifest says so.

        People keep files of their own under names such as 0001.png.
        """
        listed = listed_pictures(self.manifest)
        pictures = [
            path for path in files_matching(self.images, r"\d{4,}\.png") if path.name in listed or is_our_picture(path)
        ]
        return _owned({self.root: r"manifest\.json", self.samples: SAMPLE_PATTERN}) + pictures


class BlockCachePaths:
    """Paths of stage 2W; `calib_dir` is the folder that all stages share."""

    def __init__(self, calib_dir: Path):
        self.calib_dir = calib_dir
        self.root = calib_dir / "adaround_cache"
        self.metadata = self.root / "metadata.json"
        self.plan = self.root / "plan.json"
        self.samples = self.root / "samples"
        self.sensitivity = self.root / "sensitivity.json"  # written by stage 3W, from these samples

    def sample(self, image_id: int, step_index: int) -> Path:
        return self.samples / _sample_name(image_id, step_index)

    def owned_files(self) -> list[Path]:
        owned = _owned({self.root: r"(metadata|plan)\.json", self.samples: SAMPLE_PATTERN})
        return owned + (files_matching(self.root, r"sensitivity\.json") if owned else [])


class ActivationPaths:
    """Paths of stages 2A, 3A and 3A'; `calib_dir` is the folder that all stages share."""

    def __init__(self, calib_dir: Path):
        self.calib_dir = calib_dir
        self.root = calib_dir / "activations"
        self.statistics = self.root / "layer_statistics.json"
        self.timestep_stats = self.root / "timestep_stats"
        self.partials = self.root / "partial"
        self.collection = self.partials / "collection.json"
        self.quant_config = self.root / "quant_config.json"
        self.temporal_analysis = self.root / "layer_temporal_analysis.json"
        self.multitier_config = self.root / "quant_config_multitier.json"
        self.multitier_temporal_analysis = self.root / "layer_temporal_analysis_multitier.json"

    def step_arrays(self, key: str) -> Path:
        return self.timestep_stats / f"step_{key}.npz"

    def step_index(self, key: str) -> Path:
        return self.timestep_stats / f"step_{key}_index.json"

    def partial(self, image_id: int, step_index: int) -> Path:
        return self.partials / _sample_name(image_id, step_index)

    def owned_files(self) -> list[Path]:
        """Return the files of stage 2A, and those that the analyzers made from them, which are stale without them."""
        patterns = {
            self.root: r"layer_statistics\.json",
            self.timestep_stats: r"step_\d+(\.npz|_index\.json)",
            self.partials: rf"{SAMPLE_PATTERN}|collection\.json",
        }
        owned = _owned(patterns)
        return owned + (analysis_files(self) if owned else [])


ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, beside a LoRA
WRITTEN_BESIDE = {"layer_temporal_analysis.json", "layer_temporal_analysis_multitier.json"}
WRITTEN_BESIDE |= {"scale_over_sigma.png", "scale_map.png", "shift_map.png", "bit_map.png"}


DEFAULT_CONFIGS = ("quant_config.json", "quant_config_multitier.json")


def beside_config(config: Path, name: str) -> Path:
    """Return the path of a file that an analyzer writes beside a config: one with another name lends it to the file."""
    return config.parent / (name if config.name in DEFAULT_CONFIGS else f"{config.stem}_{name}")


def clear_analysis_temporaries(config: Path) -> None:
    """Remove the half-written files that a kill of an analyzer left beside a config."""
    beside = (beside_config(config, name).name for name in WRITTEN_BESIDE)
    clear_temporaries(config.parent, "|".join(map(re.escape, (config.name, *beside))))


def analysis_files(paths: ActivationPaths) -> list[Path]:
    """Return the files that stages 3A and 3A' made from the statistics in this folder.

    The metadata of a config name its run and the files that were written beside it; another tool's name neither.
    """
    found = []
    for config in (paths.quant_config, paths.multitier_config):
        try:
            metadata = orjson.loads(read_bytes(config, "", limit=2**31))["metadata"]
            if not metadata["calibration_run"]:
                continue
            names = set(metadata.get("written_with", [])) & WRITTEN_BESIDE
            files = [config, *(paths.root / name for name in sorted(names))]
        except (StoreError, ValueError, TypeError, KeyError, RecursionError):  # absent, or another tool's
            continue
        found += [path for path in files if path.is_file()]
    return found


class WeightPaths:
    """Paths of stage 3W; `calib_dir` is the folder that all stages share.

    A second run, with groups of another size, has a folder of its own, adaround_weights_gN/ (`weights.weight_paths`).
    """

    def __init__(self, calib_dir: Path, group_size: int | None = None):
        """group_size: of a second run's folder; None: adaround_weights/."""
        self.calib_dir = calib_dir
        self.root = calib_dir / ("adaround_weights" if group_size is None else f"adaround_weights_g{group_size}")
        self.metadata = self.root / "metadata.json"
        self.plan = self.root / "plan.json"
        self.checkpoint = self.root / "checkpoint.npz"
        self.end_to_end_losses = self.root / "end_to_end_losses.json"
        self.rest = self.root / "rest.npz"
        self.migration = self.root / "migration.npz"

    def block(self, block: str) -> Path:
        return self.root / f"{block}.npz"

    def checkpoint_of(self, block: str) -> Path:
        """Return the checkpoint of one block, for several processes that train blocks at the same time."""
        return self.root / f"checkpoint_{block}.npz"

    def losses(self, block: str) -> Path:
        return self.root / f"{block}_losses.json"

    def boundary(self, block: str) -> "BoundaryPaths":
        """Return the folder of a block's outputs for every sample; it exists while the block's neighbours train."""
        return BoundaryPaths(self.root / "boundaries" / block)

    @property
    def boundaries(self) -> list["BoundaryPaths"]:
        """Return the boundary folders that exist, sorted by name; those of 0.8.0 may end in `_quantized`."""
        folder = self.root / "boundaries"
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        return [BoundaryPaths(folder / name) for name in names if re.fullmatch(rf"{BLOCK_PATTERN}(_quantized)?", name)]

    def owned_files(self) -> list[Path]:
        names = r"(metadata|plan|end_to_end_losses)\.json"
        names += rf"|(rest|migration)\.npz|checkpoint(_{BLOCK_PATTERN})?\.npz|{BLOCK_PATTERN}(\.npz|_losses\.json)"
        return files_matching(self.root, names) + [path for each in self.boundaries for path in each.owned_files()]


class BoundaryPaths:
    """Paths of a boundary between blocks that stage 3W makes on its way; `root` is a folder of its own."""

    def __init__(self, root: Path):
        self.root = root

    def sample(self, image_id: int, step_index: int) -> Path:
        return self.root / _sample_name(image_id, step_index)

    def owned_files(self) -> list[Path]:
        return files_matching(self.root, SAMPLE_PATTERN)


class EvaluationPaths:
    """Paths of stage 4; `root` is evaluation/ below the folder that all stages share, or --output."""

    def __init__(self, root: Path):
        self.root = root
        self.metrics = root / "metrics.json"
        self.grid = root / "grid.png"
        self.error_plot = root / "error_over_steps.png"
        self.runs = root / "runs"
        self.images = root / "images"

    @classmethod
    def below(cls, calib_dir: Path) -> "EvaluationPaths":
        return cls(calib_dir / "evaluation")

    @classmethod
    def beside(cls, calib_dir: Path) -> list["EvaluationPaths"]:
        """Return the other evaluations of a calibration folder, evaluation_NAME/, by name."""
        return [cls(path.parent) for path in sorted(calib_dir.glob("evaluation_*/metrics.json"))]

    def image(self, variant: str, index: int) -> Path:
        """Return the picture that a variant drew for a prompt."""
        return self.images / variant / f"{index:04d}.png"

    def image_folders(self) -> list[tuple[Path, list[Path]]]:
        """Return every variant's folder of images, and the stage's files in it, half-written ones included."""
        folders = sorted(path for path in self.images.glob("*") if path.is_dir() and not path.is_symlink())
        found = [(folder, files_matching(folder, r"\d{4,}\.png")) for folder in folders]
        return [(folder, [path for path in files if is_our_picture(path, VARIANT_CHUNK)]) for folder, files in found]

    def refuse_foreign_images(self, variants: Sequence[str], count: int) -> None:
        """Raise StoreError where an image of a variant would take the place of a file that this stage did not write."""
        for path in (self.image(variant, index) for variant in variants for index in range(count)):
            if os.path.lexists(path) and not is_our_picture(path, VARIANT_CHUNK):
                raise StoreError(f"{path}: not written by this stage; move it, or give another --output")

    def owned_files(self) -> list[Path]:
        return files_matching(self.root, r"metrics\.json|(grid|error_over_steps)\.png")

    def run(self, variant: str, identity: str) -> Path:
        """Return the file with a variant's images and latents. identity: digest of what they follow from."""
        return self.runs / f"{variant}_{identity[:16]}.npz"

    def clear_temporaries(self) -> None:
        """Remove the half-written files of every variant that a kill left."""
        clear_temporaries(self.root, r"metrics\.json|(grid|error_over_steps)\.png")
        clear_temporaries(self.runs, r".+_[0-9a-f]{16}\.npz")
        for folder, _ in self.image_folders():
            clear_temporaries(folder, r"\d{4,}\.png")

    def runs_of(self, variant: str) -> list[Path]:
        """Return every file with images and latents of one variant, half-written temporary ones included."""
        return files_matching(self.runs, rf"{re.escape(variant)}_[0-9a-f]{{16}}\.npz")


class ReportPaths:
    """Paths of report_calibration.py; `root` is report/ below the folder that all stages share, or --output."""

    def __init__(self, root: Path):
        self.root = root
        self.page = root / "index.html"

    def clear_temporaries(self) -> None:
        """Remove the half-written files that a kill left."""
        clear_temporaries(self.root, re.escape(self.page.name))


# The hub models for which DiffusionKit has a 4-bit file, and the name of that file.
HUB_4BIT_FILES = {
    "argmaxinc/mlx-stable-diffusion-3.5-large": "sd3.5_large_4bit_quantized.safetensors",
    "argmaxinc/mlx-FLUX.1-schnell": "flux-schnell-4bit-quantized.safetensors",
}


EXPORTED = (
    r"config\.json|activations\.json|(mmdit|clip_l|clip_g|decoder)\.safetensors|vocab\.json|merges\.txt|captions\.txt|"
)
EXPORTED += "|".join(map(re.escape, HUB_4BIT_FILES.values()))
EXPORTED_GGUF = r".+-q[45]_1\.gguf"
CARD, MFLUX = r"README\.md|comparison\.png", r"0\.safetensors|model\.safetensors\.index\.json"
CARD_MARKER = "written by export_quantized_model.py; it may be edited, and is written anew with --force"


class QuantizedModelPaths:
    """Paths of stage 5; `root` is quantized_model/ below the folder that all stages share, or --output."""

    def __init__(self, root: Path):
        self.root = root
        self.config = root / "config.json"
        self.mflux = root / "transformer"
        self.mflux_weights = self.mflux / "0.safetensors"
        self.mflux_index = self.mflux / "model.safetensors.index.json"
        self.card = root / "README.md"
        self.comparison = root / "comparison.png"
        self.activations = root / "activations.json"

    @classmethod
    def below(cls, calib_dir: Path) -> "QuantizedModelPaths":
        return cls(calib_dir / "quantized_model")

    def gguf(self, name: str, kind: str) -> Path:
        """Return the file of a model whose packed tensors are q4_1 or q5_1."""
        return self.root / f"{name}-{kind}.gguf"

    def hub_file(self, model: str) -> Path:
        """Return the file that has the layout of DiffusionKit's 4-bit hub file, with every linear layer packed."""
        return self.root / HUB_4BIT_FILES[model]

    def owned_files(self) -> list[Path]:
        """Return the files of an export. Another model's folder may have such names, too: `is_export` tells."""
        return files_matching(self.root, EXPORTED)

    def card_files(self) -> list[Path]:
        """Return the README.md that stage 5 wrote, and its picture; of somebody else's, half-written files alone."""
        found = files_matching(self.root, CARD)
        try:
            ours = CARD_MARKER in self.card.read_text(encoding="utf-8")
        except (OSError, ValueError):
            ours = False
        return [path for path in found if ours or path.suffix == TEMP_SUFFIX]

    def mflux_files(self) -> list[Path]:
        """Return the folder transformer/ in mflux's layout; none where it holds something else."""
        ours = files_matching(self.mflux, MFLUX)
        return [self.mflux] if ours and set(ours) == set(self.mflux.iterdir()) else []

    def gguf_files(self) -> list[Path]:
        return files_matching(self.root, EXPORTED_GGUF)

    def clear_temporaries(self) -> None:
        """Remove the half-written files that a kill left."""
        clear_temporaries(self.root, f"{EXPORTED}|{EXPORTED_GGUF}|{CARD}")
        clear_temporaries(self.mflux, MFLUX)


class DrawingPaths:
    """Paths of draw_images.py below its --output, a folder, or the name of the only picture (heart.png)."""

    def __init__(self, output: Path, compared: str | None = None):
        """Store the places. compared: the name of the second model, which the first is compared with."""
        self.only = output if output.suffix.lower() == ".png" and not output.is_dir() else None
        self.root = output.parent if self.only else output
        self.comparison = self.root / "compare.png"
        last = (compared or "").rstrip("/").rpartition("/")[2]
        self.compared = re.sub(r"[^A-Za-z0-9.-]+", "-", last) or "compared"

    def image(self, index: int, compared: bool = False) -> Path:
        """Return the picture of prompt `index`. compared: by the second model, whose name it bears."""
        return self.only or self.root / f"{index:04d}{f'_{self.compared}' if compared else ''}.png"

    def clear_temporaries(self) -> None:
        """Remove the half-written files that a kill left."""
        names = re.escape(self.only.name) if self.only else r"\d{4,}(_[A-Za-z0-9.-]+)?\.png|compare\.png"
        clear_temporaries(self.root, names)

    def refuse_foreign_files(self, count: int, compared: bool) -> None:
        """Raise StoreError where one of `count` images would replace a file that draw_images.py did not write.

        compared: a second model draws, too, and a comparison is written; then, and for several images, --output must
        be a folder.
        """
        if self.only and (count > 1 or compared):
            several = "two models draw" if compared else f"{count} images are drawn"
            raise OptionError(f"--output {self.only}: one picture, and {several}; give the name of a folder")
        wanted = [
            self.image(index, other) for index in range(count) for other in ((False, True) if compared else (False,))
        ]
        for path in [*wanted, *([self.comparison] if compared else [])]:
            if os.path.lexists(path) and not is_our_picture(path, DRAWN_CHUNK):
                raise StoreError(f"{path}: not drawn by draw_images.py; move it, or give another --output")
