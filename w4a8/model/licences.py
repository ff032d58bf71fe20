"""The original models on the Hugging Face hub, and their licences, for what exports say of themselves."""

from dataclasses import dataclass

from calibration_store.model_folder import BUNDLED_MODEL
from w4a8.model.catalog import ModelInfo
from w4a8.model.families import MODELS


@dataclass(frozen=True)
class Licence:
    """A licence as the hub's model cards name one."""

    id: str
    name: str | None = None
    link: str | None = None


UNKNOWN = Licence("other", "of-the-original-model")


def licence_of(info: ModelInfo) -> Licence:
    """Return the licence of a model's weights; of a folder that is not ours it is not known."""
    if info.version == BUNDLED_MODEL:
        return Licence("apache-2.0")
    return UNKNOWN if info.hub_id is None else Licence(*MODELS[info.hub_id].licence)


def original_of(info: ModelInfo) -> str | None:
    """Return the repository of the original model; None for a model folder without one."""
    return None if info.hub_id is None else MODELS[info.hub_id].original
