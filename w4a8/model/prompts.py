"""Draw prompts from a model's captions, or from the built-in list."""

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np

from w4a8.model.prompt_files import read_prompt_file

BUILTIN_PROMPTS = Path(__file__).resolve().parents[2] / "prompts" / "builtin.csv"


def draw_builtin_prompts(captions: Path | None, seed: int) -> list[str]:
    """Read the model's own captions, or else the built-in list, in an order that `seed` decides.

    Each sequence of 12 built-in prompts takes one of every category, so that few images are already diverse.
    """
    rng = np.random.default_rng(seed)
    if captions is not None:
        prompts = read_prompt_file(captions, "captions of the model:")
        return [prompts[i] for i in rng.permutation(len(prompts))]
    by_category = defaultdict(list)
    with BUILTIN_PROMPTS.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            by_category[row["category"]].append(row["prompt"])
    shuffled = [[prompts[i] for i in rng.permutation(len(prompts))] for prompts in by_category.values()]
    shuffled = [shuffled[i] for i in rng.permutation(len(shuffled))]
    return [prompt for one_of_each in zip(*shuffled, strict=True) for prompt in one_of_each]
