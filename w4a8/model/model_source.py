"""Find out which model a `--model` or `--local-checkpoint` value is: a name, a file, or a folder of another program."""

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from calibration_store.errors import OptionError, UserError
from calibration_store.layout import ADAPTER_CONFIG
from calibration_store.model_folder import CONFIG_FILE
from w4a8.model.checkpoint_contents import SHARD, Contents, read_contents
from w4a8.model.diffusionkit import MMDIT_CKPT
from w4a8.model.families import MODELS, family_of
from w4a8.model.location import Lora

WEIGHT_ENDS = (".safetensors", ".sft", ".safetensors.index.json", ".gguf")
DIFFUSERS_FILES = ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors")
KNOWN_NAMES = frozenset(name for entry in MODELS.values() for name in (entry.file, entry.vae[1], *entry.other_names))
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?:/[\w./ -]+\.safetensors)?")
LORA_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # PEFT's name, and diffusers'
# Whole words: a hyperrealistic model takes as many steps as any other, and epoch-10_step-500 says how it was trained.
FEW_STEPS = re.compile(r"(?<![a-z])(?:turbo|lightning|hyper|lcm|fast)(?![a-z])", re.IGNORECASE)
COUNTED_STEPS = re.compile(r"(?<![a-z0-9])(\d{1,2})[-_ ]?steps?(?![a-z]|[-_ ]?\d)", re.IGNORECASE)


def resolve_source(name: str, checkpoint: Path | None) -> tuple[str, Path | None]:
    """Return (a hub id or the folder's name, the checkpoint's file or None) of two options.

    `name` may itself be a checkpoint, or a folder with one; it gives what --local-checkpoint would. Raises UserError for
    two checkpoints, and for a file that holds none of our models.
    """
    if name in MODELS or name in MMDIT_CKPT or (name and not _is_foreign(Path(name).expanduser())):
        return name, None if checkpoint is None else checkpoint_of(checkpoint)
    if not name:
        return name, checkpoint
    if checkpoint is not None:
        raise OptionError("--model names a checkpoint already; leave --local-checkpoint out")
    file = checkpoint_of(Path(name).expanduser())
    return read_contents(file).hub_id(), file


def _is_foreign(path: Path) -> bool:
    """Return whether a path is a file, or a folder in the layout of another program."""
    try:
        if path.is_file():
            return True
        if not path.is_dir():
            return False
        config = path / CONFIG_FILE
        own = config.is_file() and any(word in config.read_bytes() for word in (b'"mmdit"', b'"base_model"'))
        return not own and bool(_candidates(path))
    except (OSError, ValueError):  # a name that no file can have; the message about folders names it
        return False


def checkpoint_of(path: Path) -> Path:
    """Return the absolute path of a checkpoint, which a folder holds once. Raises UserError."""
    if not path.is_dir():
        return named_path(path)
    found = _candidates(path)
    if not found:
        raise UserError(f"{path}: holds no checkpoint (….safetensors, its index, or transformer/ of diffusers)")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"{path}: holds {len(found)} checkpoints ({names}); name one of them")
    return named_path(found[0])


def named_path(path: Path) -> Path:
    """Return an absolute path under the name that was given: the links of the hub's cache lead to nameless files."""
    return Path(os.path.abspath(path))


def _candidates(folder: Path) -> list[Path]:
    """Return a folder's checkpoints: those with DiffusionKit's names, else diffusers', else every file with a transformer.

    A file that stands alone is returned unread, so that its own error is told.
    """
    known = [folder / name for name in sorted(KNOWN_NAMES) if (folder / name).is_file()]
    if known:
        return known
    for place in (folder / "transformer", folder):
        whole = [place / name for name in DIFFUSERS_FILES if (place / name).is_file()]
        if whole:
            return whole[:1]
    files = [file for file in sorted(folder.iterdir()) if file.name.endswith(WEIGHT_ENDS) and file.is_file()]
    indices = [file for file in files if file.name.endswith(".index.json")]
    if len(files) == 1:
        return files
    return [file for file in indices or files if not SHARD.search(file.name) and _holds_transformer(file)]


def _holds_transformer(file: Path) -> bool:
    try:
        return read_contents(file).layout is not None
    except UserError:
        return False


def lora_of(lora: Lora) -> Lora:
    """Return a LoRA whose file is there, from a file, a folder with one (PEFT's, diffusers'), or a hub id.

    A hub id, user/repository or user/repository/file.safetensors, is fetched where the local cache lacks it. Raises
    UserError where there is no such file, or where there are several.
    """
    place = lora.file
    if not place.exists() and HUB_ID.fullmatch(str(place)):
        place = _fetched_lora(str(place))
    if place.is_dir():
        named = [place / name for name in LORA_FILES if (place / name).is_file()]
        files = named[:1] or sorted(place.glob("*.safetensors"))
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "none"
            raise UserError(f"--lora {lora.file}: a folder with one .safetensors file is needed, and it holds {found}")
        place = files[0]
    if not place.is_file():
        raise UserError(f"--lora {lora.file}: no such file, folder or repository of the hub")
    return dataclasses.replace(lora, file=named_path(place))


def _fetched_lora(name: str) -> Path:
    """Return the file or the folder of a LoRA in the hub's local cache, fetched where it lacks. Raises UserError."""
    user, repository, *file = name.split("/", 2)
    patterns = file or ["*.safetensors", ADAPTER_CONFIG]
    try:
        folder = Path(snapshot_download(f"{user}/{repository}", allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"--lora {name}: no such file, and it cannot be fetched from the Hugging Face hub "
            f"({str(error).strip().splitlines()[0][:160]})"
        ) from None
    return folder / file[0] if file else folder


@dataclass(frozen=True)
class Sampling:
    """How a checkpoint wants to be sampled, by its name. None: as its model; 0 steps: few, and the name says not how many."""

    num_steps: int | None = None
    cfg_weight: float | None = None


def sampling_of(contents: Contents, hub_id: str) -> Sampling:
    """Return the sampling that a checkpoint's name or title asks for: sd3.5_large_turbo, …-8steps, …-lightning."""
    counted, few = COUNTED_STEPS.search(contents.title), FEW_STEPS.search(contents.title)
    if counted is None and few is None:
        return Sampling()
    models = family_of(hub_id).models if hub_id in MODELS else ()
    known = [entry.num_steps for entry in models if few and entry.told_by_title == few[0].lower()]
    return Sampling(int(counted[1]) if counted else (*known, 0)[0], 0.0)
