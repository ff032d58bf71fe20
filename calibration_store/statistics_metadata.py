"""The metadata of statistics (2A) and of the configs made from them (3A), and their schedule of sigmas."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, TypedDict

import msgspec

from calibration_store.choices import Precision
from calibration_store.schema import Count, Digest, Index, Name, NotNegative, Steps, distinct
from calibration_store.version import W4A8_VERSION


class StatisticsMetadata(TypedDict, total=False):
    """The metadata of statistics, and of the configs made from them."""

    num_images: Count
    num_timesteps: Count
    total_processed: Count
    key_timesteps: list[Index]
    selected_image_ids: list[Index]
    stride: Steps
    num_steps: Steps
    cfg_weight: NotNegative
    model_version: Name
    activation_dtype: Precision
    calibration_run: Digest
    weights_fingerprint: Digest
    w4a8_version: Name  # of the toolkit that collected, or analyzed; absent before 0.9.0


HUB_OWNER = "argmaxinc/"  # of the hub models that DiffusionKit knows


def metadata_fault(metadata: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the metadata of statistics, or of a config made from them; None for sound ones."""
    try:
        msgspec.convert(metadata, StatisticsMetadata)
    except msgspec.ValidationError as error:
        return f"metadata: {error}"
    if "calibration_run" not in metadata:
        return None
    if metadata.get("model_version", "").startswith(HUB_OWNER) and W4A8_VERSION not in metadata:
        return "metadata: measured by 0.8.0, which computed hub models without the bias of k"
    ids, steps = metadata.get("selected_image_ids", []), metadata.get("key_timesteps", [])
    counts = (metadata.get("num_images"), metadata.get("num_timesteps"), metadata.get("total_processed"))
    if counts != (len(ids), len(steps), len(ids) * len(steps)):
        return f"metadata: {counts} images, steps and passes for {len(ids)} image ids and {len(steps)} steps"
    return distinct(ids, "metadata: image") or distinct(steps, "metadata: step")


def sigma_fault(sigma_map: Mapping[str, float]) -> str | None:
    """Return the fault of a schedule, {step key: sigma}, whose sigmas do not fall from at most 1; else None."""
    sigmas = [sigma_map[key] for key in sorted(sigma_map, key=int)]
    falls = all(later < earlier for earlier, later in pairwise(sigmas)) and sigmas[0] <= 1.001
    return None if falls else "sigma_map: sigmas do not fall from 1 step after step"
