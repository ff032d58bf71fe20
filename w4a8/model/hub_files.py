"""Find files of the Hugging Face hub in its local cache, or fetch them; a file that is not there is named."""

from pathlib import Path

from huggingface_hub import constants as hub_constants
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from calibration_store.errors import UserError


class HubFileError(UserError):
    """A file of the hub is neither in the local cache nor could it be fetched."""

    def __init__(self, repository: str, name: str, reason: str):
        self.repository, self.name, self.reason = repository, name, reason
        super().__init__(f"{name} of {repository} is not in the local cache of the Hugging Face hub ({reason})")


def hub_file(repository: str, name: str, download: bool = False) -> Path:
    """Return a file of a repository in the local cache; download: fetch it where the cache lacks it.

    A cache without refs/main, which says what the newest snapshot is, is read where it holds one snapshot alone. Raises
    HubFileError.
    """
    try:
        return Path(hf_hub_download(repository, name, local_files_only=not download))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        only = only_snapshot(repository)
        if only is not None and (only / name).is_file():
            return only / name
        reason = str(error).strip().split("\n")[0][:160]
        if isinstance(error, LocalEntryNotFoundError):
            reason = what_is_cached(repository)
        raise HubFileError(repository, name, reason) from None


def only_snapshot(repository: str) -> Path | None:
    """Return the one snapshot of a repository in a cache without refs/main; None where there are several, or refs."""
    folder = _cache_folder(repository)
    snapshots = list((folder / "snapshots").glob("*")) if not (folder / "refs" / "main").exists() else []
    return snapshots[0] if len(snapshots) == 1 else None


def what_is_cached(repository: str) -> str:
    """Say what the local cache holds of a repository, for messages about a file that it lacks."""
    folder = _cache_folder(repository)
    if not any((folder / "snapshots").glob("*/*")):
        return "the cache holds none of it"
    if not (folder / "refs" / "main").exists():
        return "the cache holds several snapshots of it, and no refs/main that names one"
    return "the cache holds other files of it"


def _cache_folder(repository: str) -> Path:
    return Path(hub_constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
