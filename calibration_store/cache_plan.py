"""plan.json: the description of a block cache (2W) that is under way."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from calibration_store.block_cache import ALL, CACHE_FORMAT, CACHE_SCRIPT, ENDS, Boundaries
from calibration_store.errors import OptionError
from calibration_store.schema import Digest, Images, Index, JsonFormat, Name, Steps


class _CachePlan(TypedDict):
    format: Literal["adaround_cache_v2"]
    calibration_run: Digest
    num_images: Images
    stride: Steps
    blocks: str | None
    selected_image_ids: list[Index]
    key_timesteps: list[Index]


class CachePlan(_CachePlan, total=False):
    """The entries of plan.json. Files of versions before 0.7 have no `boundaries`: they stand for "all"."""

    boundaries: Boundaries
    w4a8_version: Name


CACHE_PLAN = JsonFormat(CACHE_FORMAT, CachePlan, CACHE_SCRIPT)


def choose_boundaries(given: str | None, blocks: str | None, before: Mapping[str, Any] | None) -> str:
    """Return what a cache stores: "all" or "ends".

    The option --boundaries decides where it is `given`, else the plan `before`, which --resume goes on with. Else it is
    the ends where all blocks are cached (`blocks` is None). Raises OptionError for the ends of a part of the blocks.
    """
    if given == ENDS and blocks is not None:
        raise OptionError("--boundaries ends is of all blocks: leave --blocks out, or say --boundaries all")
    if given is not None:
        return given
    return before.get("boundaries", ALL) if before is not None else ENDS if blocks is None else ALL


def plan_cache(selection: Mapping[str, Any], blocks: str | None, boundaries: str) -> dict[str, Any]:
    """Return the content of plan.json.

    selection: the plan of images and steps (w4a8.passes). blocks: as `--blocks` was given.
    """
    last = ("selected_image_ids", "key_timesteps")
    named = None if blocks is None else ",".join(sorted(set(blocks.replace(" ", "").split(","))))
    first = {key: value for key, value in selection.items() if key not in last}
    plan = {"format": CACHE_FORMAT, **first, "boundaries": boundaries, "blocks": named}
    return plan | {key: selection[key] for key in last}


def read_plan(path: Path) -> dict[str, Any]:
    """Read a cache's plan.json; one of a version before 0.7 gets `boundaries` "all". Raises StoreError."""
    return {"boundaries": ALL} | CACHE_PLAN.read(path)
