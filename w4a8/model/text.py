"""Text: what the tokenizers take, and the conditioning of a forward pass."""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from w4a8.model.catalog import ModelError
from w4a8.model.loading import Pipeline


def check_prompts(pipeline: Pipeline, prompts: Sequence[str], what: str = "prompt") -> int:
    """Tokenize every prompt with both CLIP tokenizers before any work is done.

    Returns how many prompts are longer than the tokenizer's positions and will be cut. Raises ModelError
    that names the prompt and the character when one is outside the vocabulary.
    """
    cut = set()
    for tokenizer in (pipeline.tokenizer_l, pipeline.tokenizer_g):
        unlimited = copy.copy(tokenizer)
        unlimited.max_length = sys.maxsize
        for index, prompt in enumerate(prompts):
            try:
                length = len(unlimited.tokenize(prompt))
            except KeyError as error:
                character = error.args[0].replace("</w>", "")
                number = f" {index + 1}" if len(prompts) > 1 else ""
                raise ModelError(
                    f"{what}{number} {prompt!r}: the character {character!r} is not in the tokenizer's vocabulary; "
                    "replace it"
                ) from None
            if length > tokenizer.max_length:
                cut.add(index)
    return len(cut)


@dataclass(frozen=True)
class TextConditioning:
    """Conditioning of one forward pass: tokens (R, tokens, 4096) and pooled (R, channels), activation dtype."""

    tokens: mx.array
    pooled: mx.array


def encode_prompts(
    pipeline: Pipeline, prompts: Sequence[str], cfg_weight: float, negative_prompt: str = ""
) -> TextConditioning:
    """Encode prompts one by one (as a batch of one would be) and stack them: conditional rows first.

    With `cfg_weight` <= 0 the unconditional rows that DiffusionKit always returns are left out.
    """
    rows = 2 if cfg_weight > 0 else 1
    tokens, pooled = [], []
    for prompt in prompts:
        prompt_tokens, prompt_pooled = pipeline.encode_text(prompt, cfg_weight, negative_prompt)
        tokens.append(prompt_tokens)
        pooled.append(prompt_pooled)
    stacked = [
        mx.concatenate([array[row : row + 1] for row in range(rows) for array in arrays]).astype(
            pipeline.activation_dtype
        )
        for arrays in (tokens, pooled)
    ]
    mx.eval(stacked)
    return TextConditioning(*stacked)
