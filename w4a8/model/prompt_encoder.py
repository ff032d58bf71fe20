"""Check prompts against the tokenizers, and encode them to the conditioning of forward passes."""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from w4a8.backend.memory import device_memory
from w4a8.backend.progress import progress_bar
from w4a8.model.catalog import ModelError
from w4a8.model.parts import TEXT, TRANSFORMER, Pipeline


def check_prompts(pipeline: Pipeline, prompts: Sequence[str], what: str = "prompt") -> int:
    """Tokenize every prompt with the CLIP tokenizers before any work is done.

    Returns the number of prompts that are longer than the tokenizer's positions and will be cut. Raises ModelError
    that names the prompt and the character when a character is outside the vocabulary.
    """
    cut = set()
    for tokenizer in pipeline.tokenizers:
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
    """The conditioning of one forward pass: tokens (R, tokens, 4096) and pooled (R, channels), activation dtype."""

    tokens: mx.array
    pooled: mx.array


def encode_prompts(
    pipeline: Pipeline, prompts: Sequence[str], cfg_weight: float, negative_prompt: str = ""
) -> TextConditioning:
    """Encode prompts one by one, as a batch of one prompt is encoded, and stack them: conditional rows first.

    With `cfg_weight` <= 0 the unconditional rows that DiffusionKit always returns are left out.
    """
    each = []
    for prompt in prompts:
        arrays = pipeline.encode_text(prompt, cfg_weight, negative_prompt)
        rows = slice(None if cfg_weight > 0 else 1)
        each.append(TextConditioning(*(array[rows].astype(pipeline.activation_dtype) for array in arrays)))
    return stack_conditioning(each)


FEATURES_SHARE = 1 / 16  # the share of the device's memory that a group's features may take
FEATURE_WIDTH = 4096


class PromptEncoder:
    """The conditioning of a run's prompts, encoded in groups.

    The text encoders are in memory only while a group is encoded, and never together with the transformer. A prompt's
    conditioning does not depend on the other prompts of its group.
    """

    def __init__(
        self, pipeline: Pipeline, prompts: Sequence[str], cfg_weight: float, negative_prompt: str, group: int | None
    ):
        """Note the prompts; `encode` encodes them.

        prompts: in the order in which they will be used. group: the number of them that are encoded at once (None: by
        memory).
        """
        self.pipeline, self.cfg_weight, self.negative_prompt = pipeline, cfg_weight, negative_prompt
        self.prompts = list(dict.fromkeys(prompts))
        self.group = group or default_group(pipeline, cfg_weight)
        self._known: dict[str, TextConditioning] = {}

    def encode(self, prompts: Sequence[str]) -> TextConditioning:
        """Return the conditioning of some of the prompts, stacked as by `encode_prompts`: conditional rows first.

        Prompts that are not known are encoded now, together with those that follow them, up to a group.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if missing:
            start = self.prompts.index(missing[0])
            following = self.prompts[start : start + self.group]
            self._encode([*dict.fromkeys([*prompts, *following])])
        return stack_conditioning([self._known[prompt] for prompt in prompts])

    def _encode(self, prompts: Sequence[str]) -> None:
        self.pipeline.drop(TRANSFORMER)
        self._known.clear()
        with progress_bar(len(prompts), "encoding prompts", "prompt", leave=False) as bar:
            for prompt in prompts:
                self._known[prompt] = encode_prompts(self.pipeline, [prompt], self.cfg_weight, self.negative_prompt)
                bar.update()
        self.pipeline.drop(TEXT)


def default_group(pipeline: Pipeline, cfg_weight: float) -> int:
    """Return the number of prompts, at least one, whose features fit into a sixteenth of the memory."""
    tokens = pipeline.text_tokens
    rows = 2 if cfg_weight > 0 else 1
    each = rows * tokens * FEATURE_WIDTH * pipeline.activation_dtype.size
    return max(1, int(FEATURES_SHARE * device_memory() / each))


def stack_conditioning(each: Sequence[TextConditioning]) -> TextConditioning:
    """Stack the conditionings of several prompts: conditional rows first."""
    rows = range(each[0].pooled.shape[0])
    stacked = [
        mx.concatenate([array[row : row + 1] for row in rows for array in arrays])
        for arrays in ([one.tokens for one in each], [one.pooled for one in each])
    ]
    mx.eval(stacked)
    return TextConditioning(*stacked)
