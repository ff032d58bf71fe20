"""Where every stage keeps what: all folders and file names, below one `--calib-dir`."""

import re
from dataclasses import dataclass
from pathlib import Path

import orjson

from calibration_store.files import matching
from calibration_store.pictures import _listed_pictures, is_our_picture


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


@dataclass(frozen=True)
class ActivationPaths:
    """Where stage 2A keeps what; `calib_dir` is the folder that all stages share."""

    calib_dir: Path

    @property
    def root(self) -> Path:
        return self.calib_dir / "activations"

    @property
    def statistics(self) -> Path:
        return self.root / "layer_statistics.json"

    @property
    def timestep_stats(self) -> Path:
        return self.root / "timestep_stats"

    def step_arrays(self, key: str) -> Path:
        return self.timestep_stats / f"step_{key}.npz"

    def step_index(self, key: str) -> Path:
        return self.timestep_stats / f"step_{key}_index.json"

    @property
    def quant_config(self) -> Path:
        return self.root / "quant_config.json"

    @property
    def multitier_config(self) -> Path:
        return self.root / "quant_config_multitier.json"

    @property
    def temporal_analysis(self) -> Path:
        return self.root / "layer_temporal_analysis.json"

    @property
    def multitier_temporal_analysis(self) -> Path:
        return self.root / "layer_temporal_analysis_multitier.json"

    @property
    def partials(self) -> Path:
        return self.root / "partial"

    @property
    def collection(self) -> Path:
        return self.partials / "collection.json"

    def partial(self, image_id: int, step_index: int) -> Path:
        return self.partials / f"{image_id:04d}_{step_index:03d}.npz"

    def owned_files(self) -> list[Path]:
        """Every file that stage 2A wrote, its half-written temporary files included."""
        patterns = {
            self.root: r"layer_statistics\.json",
            self.timestep_stats: r"step_\d+(\.npz|_index\.json)",
            self.partials: r"\d{4,}_\d{3,}\.npz|collection\.json",
        }
        owned = [path for folder, pattern in patterns.items() for path in matching(folder, pattern)]
        return owned + (analysis_files(self) if owned else [])


WRITTEN_BESIDE = {"layer_temporal_analysis.json", "layer_temporal_analysis_multitier.json"}
WRITTEN_BESIDE |= {"scale_over_sigma.png", "scale_map.png", "shift_map.png", "bit_map.png"}


def analysis_files(paths: ActivationPaths) -> list[Path]:
    """What stages 3A and 3A' made from the statistics in this folder: without these statistics it is stale.

    A config says in its metadata which run it is of, and which files were written beside it; another tool's says nothing.
    """
    found = []
    for config in (paths.quant_config, paths.multitier_config):
        try:
            metadata = orjson.loads(config.read_bytes())["metadata"]
            if not metadata["calibration_run"]:
                continue
            names = set(metadata.get("written_with", [])) & WRITTEN_BESIDE
            files = [config, *(paths.root / name for name in sorted(names))]
        except (OSError, ValueError, TypeError, KeyError):  # there is none, or it is not ours
            continue
        found += [path for path in files if path.is_file()]
    return found


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


@dataclass(frozen=True)
class EvaluationPaths:
    """Where stage 4 keeps what; `root` is evaluation/ below the folder that all stages share, or --output."""

    root: Path

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.json"

    @property
    def grid(self) -> Path:
        return self.root / "grid.png"

    @property
    def error_plot(self) -> Path:
        return self.root / "error_over_steps.png"

    def run(self, variant: str, identity: str) -> Path:
        """The images and latents of one variant; identity says what they follow from."""
        return self.root / "runs" / f"{variant}_{identity[:16]}.npz"

    def runs_of(self, variant: str) -> list[Path]:
        """Every file of one variant, half-written temporary ones included."""
        return matching(self.root / "runs", rf"{re.escape(variant)}_[0-9a-f]{{16}}\.npz")
