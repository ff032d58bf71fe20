"""The original models on the Hugging Face hub, and their licences, for what exports say of themselves."""

from dataclasses import dataclass

from calibration_store.model_folder import BUNDLED_MODEL
from w4a8.model.catalog import ModelInfo


@dataclass(frozen=True)
class Licence:
    """A licence as the hub's model cards name one."""

    id: str
    name: str | None = None
    link: str | None = None


BASES = {  # DiffusionKit's repository -> the original one
    "argmaxinc/mlx-stable-diffusion-3-medium": "stabilityai/stable-diffusion-3-medium",
    "argmaxinc/mlx-stable-diffusion-3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "argmaxinc/mlx-FLUX.1-schnell": "black-forest-labs/FLUX.1-schnell",
    "argmaxinc/mlx-FLUX.1-dev": "black-forest-labs/FLUX.1-dev",
}
STABILITY = Licence("other", "stabilityai-ai-community", "https://stability.ai/license")
LICENCES = {
    "stabilityai/stable-diffusion-3-medium": STABILITY,
    "stabilityai/stable-diffusion-3.5-large": STABILITY,
    "black-forest-labs/FLUX.1-schnell": Licence("apache-2.0"),
    "black-forest-labs/FLUX.1-dev": Licence(
        "other",
        "flux-1-dev-non-commercial-license",
        "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    ),
}
UNKNOWN = Licence("other", "of-the-original-model")


def licence_of(info: ModelInfo) -> Licence:
    """Return the licence of a model's weights; of a folder that is not ours it is not known."""
    if info.version == BUNDLED_MODEL:
        return Licence("apache-2.0")
    return LICENCES.get(BASES.get(info.hub_id or "", ""), UNKNOWN)
