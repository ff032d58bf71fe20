"""What models there are, and what is known of one before its weights are read."""

import dataclasses
import glob
import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from calibration_store.errors import UserError
from calibration_store.model_folder import (
    BUNDLED_MODEL,
    captions_file,
    config_file,
    folder_files,
    read_model_config,
    weights_fingerprint,
)
from w4a8 import __version__
from w4a8.model.diffusionkit import (
    HEIGHT,
    HUB_MMDIT_CONFIGS,
    HUB_MMDIT_FILES,
    HUB_TEXT_ENCODERS,
    HUB_TEXT_FILES,
    MMDIT_CKPT,
    SHIFT,
    WIDTH,
    LocalEntryNotFoundError,
    hf_hub_download,
)
from w4a8.model.families import Family, family_of
from w4a8.model.location import Lora

BUNDLED_FOLDER = Path(__file__).resolve().parents[2] / "models" / BUNDLED_MODEL
HUB_MODELS = tuple(key for key in MMDIT_CKPT if "4bit" not in key)
HUB_VAE_DOWNSCALE = 8
DISTILLED_STEPS = 4  # what FLUX.1-schnell was distilled for


class ModelError(UserError):
    """The model cannot be had or used; the message is one line that says why and what to do."""


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model before its weights are read."""

    version: str  # as it was given: sd3-emoji, a hub id, or a local folder
    folder: Path | None  # None for a hub id
    latent_size: tuple[int, int]
    max_latent_size: int
    patch_size: int
    vae_downscale: int  # image pixels per latent, each way
    cfg_weight: float
    use_t5: bool
    sampler_shift: float
    captions: Path | None  # prompts that the model was made for, if it brings any
    base: str | None = None  # hub id of what an exported folder does not hold: text encoders, VAE
    loras: tuple[Lora, ...] = ()  # fused into the transformer's weights when they are read
    num_steps: int = 50  # Euler steps where nothing else is said
    left_out: str | None = None  # what DiffusionKit does not do of it

    @property
    def family(self) -> Family:
        """Its architecture."""
        return family_of(self.hub_id)

    @property
    def hub_id(self) -> str | None:
        """Where on the hub parts of the model come from; None for a folder that holds everything."""
        return self.base if self.folder is not None else self.version


def describe_model(name: str, loras: Sequence[Lora] = ()) -> ModelInfo:
    """Look a `--model` value up: `sd3-emoji`, a folder in its layout, or a hub id that DiffusionKit knows.

    Raises ModelError for anything else. Reads no weights and needs no network.
    """
    if loras:
        return dataclasses.replace(describe_model(name), loras=tuple(loras))
    if name in MMDIT_CKPT and name not in HUB_MODELS:
        raise ModelError(f"--model {name}: its weights are packed already; quantize the original model's")
    if name in HUB_MODELS:
        config = HUB_MMDIT_CONFIGS[name]
        return ModelInfo(
            version=name,
            folder=None,
            latent_size=(HEIGHT[name] // HUB_VAE_DOWNSCALE, WIDTH[name] // HUB_VAE_DOWNSCALE),
            max_latent_size=family_of(name).max_latent_size or config.max_latent_resolution,
            patch_size=config.patch_size,
            vae_downscale=HUB_VAE_DOWNSCALE,
            cfg_weight=family_of(name).cfg_weight,
            use_t5=True,
            sampler_shift=SHIFT[name],
            captions=None,
            num_steps=DISTILLED_STEPS if "schnell" in name else ModelInfo.num_steps,
            left_out="its guidance embedding, which DiffusionKit does not know" if "dev" in name else None,
        )
    try:
        folder = BUNDLED_FOLDER if name == BUNDLED_MODEL else Path(name).expanduser().resolve()
    except (RuntimeError, OSError, ValueError) as error:  # ~nobody, a link that leads back to itself, a null character
        raise ModelError(f"--model {name!r}: {error}") from None
    if not name or not os.path.isdir(folder):
        known = ", ".join((BUNDLED_MODEL, *HUB_MODELS))
        near = []
        with suppress(OSError):  # a name that no folder can have
            near = sorted(filter(Path.is_dir, folder.parent.glob(f"*/{glob.escape(folder.name)}"))) if name else []
        hint = f"; there is {min(str(near[0]), os.path.relpath(near[0]), key=len)}" if near else ""
        raise ModelError(f"--model {name or repr(name)}: no such folder, and not one of {known}{hint}")
    config = read_model_config(folder)
    if "base_model" in config:
        if config["base_model"] not in HUB_MODELS:
            raise ModelError(
                f"{config_file(folder)}: base_model {config['base_model']} is none of {', '.join(HUB_MODELS)}"
            )
        base = describe_model(config["base_model"])
        return dataclasses.replace(base, version=name, folder=folder, base=base.version)
    return ModelInfo(
        version=name,
        folder=folder,
        latent_size=tuple(config["latent_size"]),
        max_latent_size=config["mmdit"]["max_latent_resolution"],
        patch_size=config["mmdit"]["patch_size"],
        vae_downscale=config["vae"]["downscale"],
        cfg_weight=float(config["default_cfg_weight"]),
        use_t5=False,
        sampler_shift=float(config["sampler_shift"]),
        captions=captions_file(folder),
    )


def model_files(
    info: ModelInfo, use_t5: bool, local_checkpoint: Path | None = None, download: bool = False
) -> dict[str, Path] | None:
    """Role -> file of everything that a model's numbers come from; None for a hub model that is not in the local cache.

    download: fetch what lacks; raises what the hub's client raises.
    """
    own = folder_files(info.folder, info.base is not None) if info.folder is not None else {}
    if info.hub_id is None:
        return own
    repository = MMDIT_CKPT[info.hub_id]
    transformer, text = HUB_MMDIT_FILES[repository], HUB_TEXT_FILES[HUB_TEXT_ENCODERS]
    wanted = {part: (HUB_TEXT_ENCODERS, text[part]) for part in (*info.family.clip, *(["t5"] if use_t5 else []))}
    if local_checkpoint is None:
        wanted["mmdit"] = (repository, transformer[info.hub_id])
    if local_checkpoint is None or not info.family.vae_inside:
        wanted["vae"] = (repository, transformer["vae"])
    elsewhere = {"vae" if part == "decoder" else part for part in own}
    wanted = {role: where for role, where in wanted.items() if role not in elsewhere}
    try:
        files = {role: Path(hf_hub_download(*where, local_files_only=not download)) for role, where in wanted.items()}
    except LocalEntryNotFoundError:
        if download:
            raise
        return None
    return files | own | ({"checkpoint": local_checkpoint} if local_checkpoint else {})


def model_fingerprint(info: ModelInfo, use_t5: bool, local_checkpoint: Path | None = None) -> str | None:
    """SHA-256 over a model's files; None for a hub model that is not in the local cache.

    Raises StoreError when a file cannot be read. The names are roles: a folder, or a checkpoint, may lie anywhere.
    """
    files = model_files(info, use_t5, local_checkpoint)
    if files is None:
        return None
    fused = {f"lora {number} x {lora.scale!r}": lora.file for number, lora in enumerate(info.loras)}
    return weights_fingerprint(files | fused)


def default_dtype(half: str = "float16") -> str:
    """The 16 bits of a model on Metal and CUDA; float32 on a CPU, where only float32 products have a fast BLAS."""
    return "float32" if mx.default_device() == mx.Device(mx.cpu) else half


def choose_dtype(info: ModelInfo, given: str | None) -> str:
    """`--dtype`. Raises ModelError for 16 bits that DiffusionKit does not run this model in."""
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
