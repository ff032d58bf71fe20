"""Describe a model before its weights are read, and find the files that it consists of."""

import dataclasses
import difflib
import glob
import hashlib
import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from calibration_store.errors import UserError
from calibration_store.layout import CalibrationPaths, QuantizedModelPaths
from calibration_store.model_folder import (
    BUNDLED_MODEL,
    captions_file,
    config_file,
    folder_files,
    read_model_config,
    weight_file,
    weights_fingerprint,
)
from w4a8 import __version__
from w4a8.model.checkpoint_contents import read_contents
from w4a8.model.diffusionkit import HUB_TEXT_ENCODERS, HUB_TEXT_FILES, MMDIT_CKPT
from w4a8.model.families import HUB_MODELS, MODELS, Family, family_of
from w4a8.model.hub_files import HubFileError, hub_file
from w4a8.model.location import Lora
from w4a8.model.model_source import WEIGHT_ENDS, lora_of, resolve_source, sampling_of

BUNDLED_FOLDER = Path(__file__).resolve().parents[2] / "models" / BUNDLED_MODEL
DEFAULT_STEPS = 50  # Euler steps of a model folder
COMPUTED = "with k's bias and float32 timesteps"  # how hub models are computed since 0.9.0, for their fingerprints


class ModelError(UserError):
    """A model cannot be obtained or used. The message is one line that says why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class _Model:
    """The facts that are known of any model before its weights are read."""

    version: str  # the value of --model: sd3-emoji, a hub id, or a local folder
    folder: Path | None  # None: every part comes from the hub
    hub_id: str | None  # the hub's model that the other parts come from; None: the folder holds every part
    latent_size: tuple[int, int]
    max_latent_size: int
    patch_size: int
    vae_downscale: int  # image pixels per latent, each way
    cfg_weight: float
    use_t5: bool
    sampler_shift: float
    captions: Path | None = None  # prompts that the model was made for, if it brings any
    checkpoint: Path | None = None  # the file, or the index, that the transformer comes from in place of the hub
    loras: tuple[Lora, ...] = ()  # fused into the transformer's weights when they are read
    num_steps: int = DEFAULT_STEPS  # 0: the checkpoint takes few steps, and does not say how many
    text_bits: int = 16  # of T5's linear layers
    guidance: float | None = None  # the guidance that the transformer is given; None: it has no embedding of one

    @property
    def family(self) -> Family:
        """Return the model's architecture."""
        return family_of(self.hub_id)

    @property
    def title(self) -> str:
        """Return the model's name for people: without the folders that it lies in."""
        if self.checkpoint is not None:
            return self.checkpoint.name
        return self.version if self.folder is None else self.folder.name


@dataclass(frozen=True, kw_only=True)
class FolderModel(_Model):
    """A folder in sd3-emoji's layout, which holds every part."""

    folder: Path


@dataclass(frozen=True, kw_only=True)
class HubModel(_Model):
    """A model that DiffusionKit knows by its hub id."""

    hub_id: str


@dataclass(frozen=True, kw_only=True)
class ExportedHubModel(HubModel):
    """A folder with the exported transformer of a hub model, whose text encoders and VAE still come from the hub."""

    folder: Path


ModelInfo = FolderModel | HubModel


def describe_model(name: str, loras: Sequence[Lora] = (), checkpoint: Path | None = None) -> ModelInfo:
    """Look a `--model` value up: `sd3-emoji`, a folder in its layout, a hub id that DiffusionKit knows, or a checkpoint.

    checkpoint: the value of --local-checkpoint, a file or a folder that the transformer of a hub's model comes from.
    Raises UserError for anything else. Reads headers of weights alone, and needs no network.
    """
    name, checkpoint = resolve_source(name, checkpoint)
    info = _describe_name(name)
    if checkpoint is not None:
        if info.folder is not None:
            raise ModelError("--local-checkpoint goes with a hub model; a model folder brings its own weights")
        asked = {k: v for k, v in vars(sampling_of(read_contents(checkpoint), name)).items() if v is not None}
        info = dataclasses.replace(info, checkpoint=checkpoint, **asked)
    return dataclasses.replace(info, loras=tuple(map(lora_of, loras)))


def with_guidance(info: ModelInfo, guidance: float | None) -> ModelInfo:
    """Return a model with a value of `--guidance`; None leaves the model's own. Raises ModelError for other models."""
    if guidance is None:
        return info
    if info.guidance is None:
        raise ModelError(
            f"--guidance {guidance:g}: {info.version} embeds no guidance; --cfg-weight is the guidance of others"
        )
    return dataclasses.replace(info, guidance=guidance)


def with_shift(info: ModelInfo, shift: float | None) -> ModelInfo:
    """Return a model with a value of `--shift`; None leaves the model's own."""
    return info if shift is None else dataclasses.replace(info, sampler_shift=shift)


def with_text_bits(info: ModelInfo, bits: int | str) -> ModelInfo:
    """Return a model with a value of `--text-bits`. Raises ModelError for fewer than 16 bits without a T5."""
    if int(bits) != 16 and info.hub_id is None:
        what = "brings its T5 at the bits that it has" if info.use_t5 else "has no T5 text encoder"
        raise ModelError(f"--text-bits {bits}: {info.version} {what}")
    return dataclasses.replace(info, text_bits=int(bits))


def _describe_name(name: str) -> ModelInfo:
    if name in HUB_MODELS:
        return _describe_hub_model(name)
    if name in MMDIT_CKPT:
        raise ModelError(f"--model {name}: its weights are packed already; quantize the original model's")
    folder = _find_folder(name)
    config = read_model_config(folder)
    if "base_model" not in config:
        return FolderModel(
            version=name,
            folder=folder,
            hub_id=None,
            latent_size=tuple(config["latent_size"]),
            max_latent_size=config["mmdit"]["max_latent_resolution"],
            patch_size=config["mmdit"]["patch_size"],
            vae_downscale=config["vae"]["downscale"],
            cfg_weight=float(config["default_cfg_weight"]),
            use_t5="t5" in config,
            sampler_shift=float(config["sampler_shift"]),
            captions=captions_file(folder),
            num_steps=config.get("default_num_steps", DEFAULT_STEPS),
        )
    if config["base_model"] not in HUB_MODELS:
        raise ModelError(f"{config_file(folder)}: base_model {config['base_model']} is none of {', '.join(HUB_MODELS)}")
    base = _describe_hub_model(config["base_model"])
    own = {"version": name, "folder": folder, "sampler_shift": float(config.get("sampler_shift", base.sampler_shift))}
    own |= {"use_t5": config.get("use_t5", base.use_t5)}
    return ExportedHubModel(**(vars(base) | own))


def _describe_hub_model(name: str) -> HubModel:
    """Describe one of HUB_MODELS."""
    entry, family = MODELS[name], family_of(name)
    return HubModel(
        version=name,
        folder=None,
        hub_id=name,
        latent_size=entry.latent_size,
        max_latent_size=family.latents.largest or family.config.max_latent_resolution,
        patch_size=family.config.patch_size,
        vae_downscale=family.latents.downscale,
        cfg_weight=entry.cfg_weight,
        use_t5=True,
        sampler_shift=entry.shift,
        num_steps=entry.num_steps,
        guidance=entry.guidance,
    )


def _find_folder(name: str) -> Path:
    """Return the folder that a `--model` value names. Raises ModelError, with a hint, where there is none."""
    try:
        folder = BUNDLED_FOLDER if name == BUNDLED_MODEL else Path(name).expanduser().resolve()
    except (RuntimeError, OSError, ValueError) as error:  # ~nobody, a link that leads back to itself, a null character
        raise ModelError(f"--model {name!r}: {error}") from None
    if name and os.path.isdir(folder):
        refuse_calibration_folder(name, folder)
        if not (config_file(folder).exists() or weight_file(folder, "mmdit").exists()):
            raise ModelError(
                f"--model {name}: the folder holds no model, neither a checkpoint (….safetensors, its index, or transformer/ of "
                "diffusers) nor the config.json of a model folder"
            )
        return folder
    known = ", ".join((BUNDLED_MODEL, *HUB_MODELS))
    near = []
    with suppress(OSError):  # a name that no folder can have
        near = sorted(filter(Path.is_dir, folder.parent.glob(f"*/{glob.escape(folder.name)}"))) if name else []
        near += similar_paths(folder) if name and not near else []
    hint = f"; there is {min(str(near[0]), os.path.relpath(near[0]), key=len)}" if near else ""
    what = "file" if name.endswith(WEIGHT_ENDS) else "folder"
    raise ModelError(f"--model {name or repr(name)}: no such {what}, and not one of {known}{hint}")


def similar_paths(folder: Path) -> list[Path]:
    """Return existing folders that differ from a missing one by a letter or two of one part."""
    above = next(path for path in folder.parents if path.is_dir())
    missing, *rest = folder.relative_to(above).parts
    beside = [path.name for path in above.iterdir() if path.is_dir()]
    found = [above.joinpath(name, *rest) for name in difflib.get_close_matches(missing, beside, 3, 0.7)]
    return [path for path in found if path.is_dir()]


def refuse_calibration_folder(name: str, folder: Path) -> None:
    """Raise ModelError for a calibration folder, which holds no model itself, and name the 4-bit model below it."""
    if config_file(folder).exists() or not CalibrationPaths(folder).manifest.exists():
        return
    exported = QuantizedModelPaths.below(Path(name)).root
    what = (
        f"give --model {exported}"
        if exported.is_dir()
        else f"export_quantized_model.py --calib-dir {name} writes one there"
    )
    raise ModelError(f"--model {name}: a calibration folder, not a model; {what}")


def model_files(info: ModelInfo, use_t5: bool, download: bool = False) -> dict[str, Path] | None:
    """Return the file of each role (mmdit, clip_l, vae …) that a model's numbers come from.

    Parts that a checkpoint holds have no role of their own. Returns None for a hub model that is not in the local
    cache. With `download` missing files are fetched; then HubFileError is raised, and None is never returned.
    """
    own = folder_files(info.folder, info.hub_id is not None) if info.folder is not None else {}
    if info.hub_id is None:
        return own
    entry, original, text = MODELS[info.hub_id], info.family.checkpoint, HUB_TEXT_FILES[HUB_TEXT_ENCODERS]
    wanted = {part: (HUB_TEXT_ENCODERS, text[part]) for part in (*info.family.clip, *(["t5"] if use_t5 else []))}
    wanted["vae"] = entry.vae
    in_folder = {"vae" if part == "decoder" else part for part in own}
    brought: dict[str, Path] = {}
    if info.checkpoint is None:
        wanted["mmdit"] = (entry.vae[0], entry.file)
    else:
        contents = read_contents(info.checkpoint)
        in_folder |= {part for part in info.family.clip if contents.clip(part)}
        brought = checkpoint_roles(contents.files)
        del wanted["vae"]  # SD3's is in the checkpoint, or decodes alone (cached_vae): the latents do not depend on it
        if not contents.vae and not original.vae_inside:
            beside = info.checkpoint.parent / entry.vae[1]
            if beside.is_file():
                brought["vae"] = beside
            else:
                wanted["vae"] = original.vae or entry.vae
    wanted = {role: where for role, where in wanted.items() if role not in in_folder}
    try:
        files = {role: hub_file(*where, download) for role, where in wanted.items()}
    except HubFileError:
        if download:
            raise
        return None
    return files | own | brought


def cached_vae(info: ModelInfo) -> Path | None:
    """Return the file of a hub model's VAE in the local cache, for a checkpoint of SD3 without one; else None.

    The file holds the hub's whole model, so that it is not fetched for its VAE alone.
    """
    if info.checkpoint is None or not info.family.checkpoint.vae_inside or info.hub_id is None:
        return None
    for name in (info.hub_id, *(other for other in HUB_MODELS if family_of(other) is info.family)):
        with suppress(HubFileError):
            return hub_file(*MODELS[name].vae)
    return None


def checkpoint_roles(files: Sequence[Path]) -> dict[str, Path]:
    """Return {role: file} of a checkpoint's files, for its fingerprint: one file, or the parts of an index in order."""
    if len(files) == 1:
        return {"checkpoint": files[0]}
    return {f"checkpoint {number}": file for number, file in enumerate(files, 1)}


def model_fingerprint(info: ModelInfo, use_t5: bool) -> str | None:
    """Return the SHA-256 over a model's files; None for a hub model that is not in the local cache.

    Files are named by their roles, so that a folder or a checkpoint may lie anywhere. Raises StoreError when a file
    cannot be read.
    """
    files = model_files(info, use_t5)
    if files is None:
        return None
    fused = {f"lora {number} x {lora.scale!r}": lora.file for number, lora in enumerate(info.loras)}
    found = weights_fingerprint(files | fused)
    return found if info.hub_id is None else as_computed_now(found)


def as_computed_now(fingerprint_of_080: str) -> str:
    """Return the fingerprint of a hub model since 0.9.0, from the one that 0.8.0 noted of the same files."""
    return hashlib.sha256(f"{fingerprint_of_080} {COMPUTED}".encode()).hexdigest()


def refuse_080(noted: str, found: str | None) -> None:
    """Raise ModelError where a run's fingerprint is that of 0.8.0, which computed a hub model otherwise."""
    if found == as_computed_now(noted):
        raise ModelError(
            "manifest.json: the run was made by 0.8.0, which computed hub models without the bias of k and with timesteps "
            "of 16 bits; run generate_calibration_data.py with --force, and the later stages again"
        )


def default_dtype(half: str = "float16") -> str:
    """Return `half` on Metal and CUDA, and float32 on a CPU, where only float32 products have a fast BLAS."""
    return "float32" if mx.default_device() == mx.Device(mx.cpu) else half


def choose_dtype(info: ModelInfo, given: str | None) -> str:
    """Return the precision for a value of `--dtype`, or the default for None.

    Raises ModelError for a 16-bit precision that DiffusionKit does not run this model in.
    """
    half = info.family.half
    if given not in (None, "float32", half):
        raise ModelError(f"--dtype {given}: {info.version} is run in {half} or float32")
    return given or default_dtype(half)


OWN_NAME = "w4a8"  # the toolkit's among the versions of packages


def package_versions() -> dict[str, str]:
    """Return the versions of the toolkit and of the packages that decide the numbers."""
    others = {name: importlib.metadata.version(name) for name in ("mlx", "diffusionkit", "numpy")}
    return {OWN_NAME: __version__} | others


def without_own(versions: Mapping[str, str]) -> dict[str, str]:
    """Return the versions of the other packages. The toolkit's own decides nothing: a newer one goes on with any run."""
    return {name: version for name, version in versions.items() if name != OWN_NAME}
