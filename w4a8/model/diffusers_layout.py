"""Read the transformers of diffusers' checkpoints: diffusers' name of every parameter, and the original arrays.

The names and the order of (scale, shift) are those of diffusers' SD3Transformer2DModel and FluxTransformer2DModel, and
of its scripts/convert_sd3_to_diffusers.py and convert_flux_to_diffusers.py.
"""

import re
from collections.abc import Mapping

import mlx.core as mx

from calibration_store.errors import UserError
from w4a8.model.families import Family

MULTIMODAL_BLOCK = re.compile(r"multimodal_transformer_blocks\.(\d+)\.")


def diffusers_name(family: Family, name: str) -> str:
    """Return diffusers' name of a parameter or a module, from DiffusionKit's."""
    for ours, theirs in family.names.diffusers:
        name = name.replace(ours, theirs)
    return name


def is_swapped(family: Family, module: str, last: int) -> bool:
    """Return whether diffusers keeps (scale, shift) where the original has (shift, scale). last: the last joint block."""
    return module in {swapped.replace("{last}", str(last)) for swapped in family.names.swapped}


def last_block(names: Mapping[str, object]) -> int:
    """Return the number of the last joint block, from DiffusionKit's names."""
    return max(int(found[1]) for found in map(MULTIMODAL_BLOCK.match, names) if found)


def original_arrays(
    arrays: Mapping[str, mx.array], family: Family, originals: Mapping[str, list[str]]
) -> dict[str, mx.array]:
    """Return the arrays of diffusers' checkpoint under the original keys, lazily: q, k and v joined, halves swapped.

    originals: the original key of each array -> DiffusionKit's names of its parts, in their order. Keys that are not
    used stay, so that they can be named. Raises UserError where arrays of one key do not fit beside each other.
    """
    left, found = dict(arrays), {}
    last = last_block({name: None for names in originals.values() for name in names})
    for key, names in originals.items():
        wanted = list(dict.fromkeys(diffusers_name(family, name) for name in names))
        if not all(name in arrays for name in wanted):
            continue
        parts = [arrays[name] for name in wanted]
        for name in wanted:
            left.pop(name, None)
        try:
            whole = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        except ValueError:
            raise UserError(f"{', '.join(wanted)}: their shapes do not fit beside each other") from None
        if is_swapped(family, wanted[0].removesuffix(".weight").removesuffix(".bias"), last):
            half = whole.shape[0] // 2
            whole = mx.concatenate([whole[half:], whole[:half]])
        found[key] = whole
    return found | {key: array for key, array in left.items() if "guidance_embedder." not in key}
