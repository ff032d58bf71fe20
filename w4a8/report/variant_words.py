"""Say in words what a variant of stage 4 is, and how good its images are."""

import math
import re
from collections.abc import Mapping
from typing import Any

from w4a8.evaluation.paired import gain_words

NATIVE = "native"  # the variant of stage 4 that is the folder which stage 5 wrote
LOOKS = (  # the least PSNR in dB -> what a person sees
    (40, "nobody sees a difference"), (35, "lines move a little"), (30, "details are others"), (25, "it shows"),
    (-math.inf, "another picture of the same prompt"),
)  # fmt: skip
PART_WORDS = (  # the beginning of a part of a variant's name, without its bits -> words
    ("native", "the model on the disk"), ("w-rtn", "weights rounded to the nearest {bits}-bit code"),
    ("w-adaround", "learned {bits}-bit rounding"), ("a-token", "inputs at {bits} bits, a range for each token"),
    ("a-block", "inputs at {bits} bits in blocks of 32, as ggml multiplies"),
    ("a-learned", "inputs at {bits} bits, 3W's ranges"), ("a-dynamic", "inputs at {bits} bits, a range for each input"),
    ("multitier", "inputs at 4, 6 or 8 bits (experimental)"), ("a", "inputs at {bits} bits, the config's ranges"),
)  # fmt: skip
END_WORDS = (  # a suffix of a part -> words
    ("-g0", "a scale per channel"), ("-g32", "groups of 32"), ("-g128", "groups of 128"), ("-r8", "the rest at 8"),
    ("-all", "every linear layer"),
)  # fmt: skip

GLOSSARY = (  # words of the page
    ("fp, w4-rtn, w4-adaround, native", "the original; its weights rounded to the nearest 4-bit code; rounded as was learned; and the model on the disk, as MLX runs it: 4-bit weights, 16-bit inputs"),
    ("a8, a8-token", "inputs of the layers at 8 bits, too: with the config's ranges, or with a range of its own for every token"),
    ("PSNR", "how far pixels are from the original's, in dB: more is better"),
    ("SSIM, FLIP", "SSIM compares structure, and 1 is equal; FLIP is the difference that a viewer sees, and 0 is none"),
    ("latent, velocity", "the picture as the transformer sees it before it is decoded, and what the transformer predicts at a step: where the latent moves"),
    ("code, scale, group", "a weight's integer; what turns it back into a number; and the weights of a layer that share a scale"),
    ("guidance", "how strongly the prompt steers; every step then computes the picture with and without it"),
    ("sample, held out", "one step of one image; a tenth of the images is held out: learning does not see them, and is judged by them"),
    ("unit", "what learns at once: a block, or the whole model"),
    ("mm5.txt.mlp.fc1", "a layer: the first one of the MLP in the text half (txt; img is the image half) of block 5"),
    ("outlier channels", "channels of an input that are much wider than its others, and would cost all of them bits"),
)  # fmt: skip


def what_it_is(variant: str) -> str:
    """Return the name of a variant in words."""
    words = []
    for part in variant.split("+"):
        found = re.fullmatch(r"([wa])(\d)(.*)", part)
        kind, bits = (found[1] + found[3], found[2]) if found else (part, "")
        words.append(next((text for start, text in PART_WORDS if kind.startswith(start)), part).format(bits=bits))
        words += [text for end, text in END_WORDS if f"{end}-" in f"{kind}-"]
    return ", ".join(words)


def verdict_on(name: str | None, variants: Mapping[str, Any], exported_bits: int | None) -> str | None:
    """Return a sentence or two on the quality of one variant, beside rounding to nearest at the same bits.

    Returns None without a variant, and for one whose images all equal the original's.
    """
    if name is None or variants[name]["psnr"]["mean"] is None:
        return None
    psnr, bits = variants[name]["psnr"], exported_bits if name == NATIVE else name[1]
    looks = next(words for least, words in LOOKS if round(psnr["mean"], 1) >= least)
    what = what_it_is(name)
    said = f"{what[0].upper()}{what[1:]} ({name}): {psnr['mean']:.1f} dB on average ({looks}), "
    said += f"the worst image {psnr['worst']:.1f} dB."
    gain = variants[name].get("gain")
    over = f"w{bits}-rtn" if gain is None else gain["over"]
    nearest = variants.get(over, {"psnr": {"mean": None}})["psnr"]["mean"]
    if nearest is not None:
        said += f" Rounding to nearest alone gives {nearest:.1f} dB."
    return said + (f" The gain is {gain_words(gain)}." if gain is not None else "")
