"""Read LoRA files: the changes of weights that each module of a file stands for, in every kind of adapter.

Kinds and formulas: LoRA (Hu et al. 2021), scale · alpha / rank · B·A; LoHa (FedPara, Hyeon-Woo et al. 2021),
(W1b·W1a) ∘ (W2b·W2a); LoKr (Edalati et al. 2022), W1 ⊗ W2; DoRA (Liu et al. 2024), the rows of W + ΔW brought to the
norms in the file; and whole differences (`diff`, `diff_b`). LoHa and LoKr are spelled as LyCORIS spells them.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
import orjson
from safetensors import safe_open

from calibration_store.errors import UserError
from calibration_store.layout import ADAPTER_CONFIG
from w4a8.model.location import Lora
from w4a8.model.weight_files import load_arrays

PREFIX = re.compile(
    r"^(?:base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|transformer\.|lora_(?:unet|transformer)_|lycoris_)*"
)
ADAPTER_NOTE = "lora_adapter_metadata"  # metadata key of a safetensors file that diffusers wrote
FLAT = str.maketrans(".", "_")  # as kohya writes module names
MOST_ALPHA = 1e6
ARRAYS = {  # kind of array -> how its key ends
    "A": r"(?:lora_A(?:\.\w+)?|lora_down|lora\.down|lora_linear_layer\.down|down)\.weight",
    "B": r"(?:lora_B(?:\.\w+)?|lora_up|lora\.up|lora_linear_layer\.up|up)\.weight",
    "bias": r"lora_B(?:\.\w+)?\.bias",
    "alpha": r"alpha",
    "diff": r"diff",
    "diff_b": r"diff_b",
    "magnitude": r"(?:dora_scale|lora_magnitude_vector(?:\.\w+)?(?:\.weight)?)",
    **{name: name for half in ("1", "2") for name in (f"lokr_w{half}", f"lokr_w{half}_a", f"lokr_w{half}_b")},
    **{name: name for half in ("1", "2") for name in (f"hada_w{half}_a", f"hada_w{half}_b")},
}
WHOLE = {"diff", "diff_b", "bias"}  # arrays that no alpha scales
PART = re.compile(r"(?P<module>.+?)\.(?:" + "|".join(f"(?P<{kind}>{end})" for kind, end in ARRAYS.items()) + ")")
# x-flux (XLabs) names the image stream's projections 1 and the text stream's 2.
XFLUX = re.compile(r"(?P<block>double_blocks\.\d+)\.processor\.(?P<what>qkv|proj)_lora(?P<stream>[12])")
XFLUX_SINGLE = re.compile(r"(?P<block>single_blocks\.\d+)\.processor\.(?P<what>qkv|proj)_lora")


@dataclass
class Adapter:
    """The arrays of one module in one spelling, {kind: array}, its alpha, and its keys in the file."""

    file: Path
    keys: list[str] = field(default_factory=list)
    arrays: dict[str, mx.array] = field(default_factory=dict)
    alpha: float | None = None
    by_root: bool = False  # use_rslora: alpha / √rank
    rank: int | None = None  # that PEFT's config notes

    @property
    def where(self) -> str:
        """The file and its first key, for messages."""
        return f"--lora {self.file}: {self.keys[0]}"

    def change(self) -> mx.array | None:
        """Return what the module's weight gains at scale 1, (rows, columns) float32, or None for a bias alone.

        Raises UserError for half a pair, rank 0, an impossible alpha, or arrays that do not go together.
        """
        given = {kind: array.astype(mx.float32) for kind, array in self.arrays.items()}
        if "diff" in given and given["diff"].ndim > 1:
            return given["diff"].reshape(given["diff"].shape[0], -1)
        if any(kind.startswith("lokr") for kind in given):
            return self._kronecker(given)
        if any(kind.startswith("hada") for kind in given):
            return self._hadamard(given)
        if "A" not in given and "B" not in given and self.bias() is not None:
            return None
        down, up = (_matrix(given.get(kind)) for kind in ("A", "B"))
        if down is None or up is None:
            raise UserError(f"{self.where} has no A and B of two dimensions each")
        if down.shape[0] == 0 or up.shape[1] == 0:
            raise UserError(f"{self.where} has rank 0")
        if up.shape[1] != down.shape[0]:
            raise UserError(f"{self.where}: {up.shape} x {down.shape} do not multiply; the file is damaged")
        return self._share(down.shape[0]) * (up @ down)

    def bias(self) -> mx.array | None:
        """Return what the module's bias gains at scale 1, (rows,) float32, or None; a norm's `diff` is such a vector."""
        found = self.arrays.get("diff_b", self.arrays.get("bias"))
        whole = self.arrays.get("diff")
        found = whole if found is None and whole is not None and whole.ndim == 1 else found
        return None if found is None else found.astype(mx.float32).reshape(-1)

    def _share(self, rank: int) -> float:
        alpha = float(rank) if self.alpha is None else self.alpha
        if not abs(alpha) <= MOST_ALPHA:
            raise UserError(f"{self.where} has an alpha of {alpha:g}; it must be a number of at most {MOST_ALPHA:g}")
        return alpha / (rank**0.5 if self.by_root else rank)

    def _kronecker(self, given: Mapping[str, mx.array]) -> mx.array:
        """Return W1 ⊗ W2; a factor may itself be a product.

        alpha counts where one is, as in LyCORIS, and where PEFT's config notes the rank that it belongs to.
        """
        share, factors = self._share(self.rank) if self.rank else 1.0, []
        for half in ("1", "2"):
            whole, a, b = (given.get(f"lokr_w{half}{end}") for end in ("", "_a", "_b"))
            if whole is None and a is not None and b is not None:
                whole, share = a @ b, self._share(b.shape[0])
            if whole is None:
                raise UserError(f"{self.where} has no lokr_w{half}")
            factors.append(whole.reshape(whole.shape[0], -1))
        return share * mx.kron(*factors)

    def _hadamard(self, given: Mapping[str, mx.array]) -> mx.array:
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        missing = [name for name in names if name not in given]
        if missing:
            raise UserError(f"{self.where} has no {missing[0]}")
        a1, b1, a2, b2 = (given[name] for name in names)
        return self._share(b1.shape[0]) * ((a1 @ b1) * (a2 @ b2))


def _matrix(array: mx.array | None) -> mx.array | None:
    """Return a matrix of a linear layer or of a convolution (out, in, height, width); None for anything else."""
    if array is None or array.ndim < 2:
        return None
    if array.ndim == 4:  # a convolution's kernel: DiffusionKit keeps (out, height, width, in)
        array = array.transpose(0, 2, 3, 1)
    return array.reshape(array.shape[0], math.prod(array.shape[1:]))


def read_adapters(lora: Lora) -> dict[str, list[Adapter]]:
    """Read a LoRA file or folder: module (dots as underscores, no prefix) -> its adapters, one for each spelling.

    Keys that are no part of an adapter come as modules of their own. Raises UserError for a file that cannot be read.
    """
    try:
        arrays = load_arrays(lora.file)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--lora {lora.file}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    spelled: dict[str, Adapter] = {}
    for key, array in arrays.items():
        matched = PART.fullmatch(key)
        module = matched["module"] if matched else key
        adapter = spelled.setdefault(module, Adapter(lora.file))
        adapter.keys.append(key)
        if matched is None:
            continue
        kind = next(name for name in ARRAYS if matched[name])
        if kind != "alpha":
            adapter.arrays[kind] = array
        elif array.size != 1:
            raise UserError(f"--lora {lora.file}: {key} has {array.size} values, not one")
        else:
            adapter.alpha = float(np.array(array.astype(mx.float32)).item())
    note_alphas(lora, spelled)
    found: dict[str, list[Adapter]] = {}
    for module, adapter in spelled.items():
        found.setdefault(plain_name(module).translate(FLAT), []).append(adapter)
    return found


def plain_name(module: str) -> str:
    """Return a module's name without the prefixes of trainers, and x-flux's names as the original ones."""
    bare = PREFIX.sub("", module)
    double, single = XFLUX.fullmatch(bare), XFLUX_SINGLE.fullmatch(bare)
    if double:
        return f"{double['block']}.{'img' if double['stream'] == '1' else 'txt'}_attn.{double['what']}"
    return f"{single['block']}.{'linear1' if single['what'] == 'qkv' else 'linear2'}" if single else bare


def note_alphas(lora: Lora, spelled: Mapping[str, Adapter]) -> None:
    """Give the adapters without an alpha of their own the one that the adapter's config notes for them.

    PEFT keeps its config beside the file, diffusers in the file's metadata: alpha for all, alpha_pattern by module,
    use_rslora for alpha / √rank. Raises UserError for a config that is none.
    """
    with safe_open(lora.file, "numpy") as file:
        noted = (file.metadata() or {}).get(ADAPTER_NOTE)
    beside = lora.file.parent / ADAPTER_CONFIG
    source = f"its note {ADAPTER_NOTE}" if noted is not None else ADAPTER_CONFIG
    try:
        text = noted if noted is not None else beside.read_text() if beside.is_file() else "{}"
        config = {key.removeprefix("transformer."): value for key, value in orjson.loads(text).items()}
        patterns = {name.translate(FLAT): float(alpha) for name, alpha in (config.get("alpha_pattern") or {}).items()}
        ranks = {name.translate(FLAT): int(rank) for name, rank in (config.get("rank_pattern") or {}).items()}
        usual, by_root = config.get("lora_alpha", config.get("alpha")), bool(config.get("use_rslora"))
        for module, adapter in spelled.items():
            flat = module.translate(FLAT)
            alpha = next((value for name, value in patterns.items() if flat.endswith(name)), usual)
            if alpha is not None and adapter.alpha is None and not adapter.arrays.keys() <= WHOLE:
                adapter.alpha, adapter.by_root = float(alpha), by_root
                adapter.rank = next((rank for name, rank in ranks.items() if flat.endswith(name)), config.get("r"))
    except (OSError, ValueError, TypeError, AttributeError):
        raise UserError(f"--lora {lora.file}: {source} is not the config of an adapter") from None
    if any(not math.isfinite(adapter.alpha) for adapter in spelled.values() if adapter.alpha is not None and noted):
        raise UserError(f"--lora {lora.file}: {source} is not the config of an adapter")
