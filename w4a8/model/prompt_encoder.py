"""Say what the text encoders do not read of prompts, and encode prompts to the conditioning of forward passes."""

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from w4a8.backend.memory import device_memory
from w4a8.backend.progress import progress_bar
from w4a8.model.clip_tokenizer import ClipTokenizer
from w4a8.model.lora import text_encoders_of
from w4a8.model.parts import TEXT, TRANSFORMER, Pipeline

MOST_WORDS = 8  # unknown words that a sentence lists


def say_what_is_not_read(pipeline: Pipeline, prompts: Sequence[str], negative_prompt: str = "") -> list[str]:
    """Return a sentence for everything that the text encoders do not read of the prompts; none where they read all.

    CLIP reads as many tokens as it has positions (77, both ends included), T5 256 or 512. Words that a vocabulary lacks
    become its unknown token.
    """
    texts = list(dict.fromkeys(prompts))
    return [
        *_cut_texts(pipeline, texts, lambda count: f"{count} prompt{'s' * (count > 1)}"),
        *_cut_texts(pipeline, [negative_prompt], lambda count: "the negative prompt"),
        *_unknown_words(pipeline.tokenizers, [*texts, negative_prompt]),
        *(["T5 is off, so that the LoRA's part of T5 changes nothing."] if _unused_t5(pipeline) else []),
    ]


def _unused_t5(pipeline: Pipeline) -> bool:
    """Return whether a LoRA has a part of T5 that is not in use."""
    return not pipeline.use_t5 and "t5" in text_encoders_of(pipeline.info.loras, pipeline.family)


def _cut_texts(pipeline: Pipeline, texts: Sequence[str], named: Callable[[int], str]) -> list[str]:
    """Return a sentence on the texts that an encoder cuts, if one does. named: their name, by their number."""
    clip = pipeline.tokenizers[0]
    counts = {"CLIP": (clip.max_length, sum(len(clip.ids(text)) + 2 > clip.max_length for text in texts))}
    if pipeline.use_t5:
        t5 = copy.copy(pipeline.t5_tokenizer)
        t5.max_length = sys.maxsize
        limit = pipeline.t5_tokenizer.max_length
        counts["T5"] = limit, sum(len(t5.tokenize(text)) > limit for text in texts)
    if not any(count for _, count in counts.values()):
        return []
    all_of_them = "all of them" if max(count for _, count in counts.values()) > 1 else "all of it"
    parts = [
        f"{name} reads the first {limit} tokens of {named(count)}" if count else f"{name} reads {all_of_them}"
        for name, (limit, count) in counts.items()
    ]
    return ["; ".join(parts) + "."]


def _unknown_words(tokenizers: Sequence[ClipTokenizer], texts: Sequence[str]) -> list[str]:
    """Return a sentence with the words that a vocabulary of CLIP lacks, if it lacks one."""
    found = [list(dict.fromkeys(word for each in tokenizers for word in each.unknown_words(text))) for text in texts]
    words = list(dict.fromkeys(word for some in found for word in some))
    if not words:
        return []
    listed = ", ".join(map(repr, words[:MOST_WORDS])) + (
        f" and {len(words) - MOST_WORDS} more" if words[MOST_WORDS:] else ""
    )
    where = sum(map(bool, found))
    return [
        f"The tokenizer's vocabulary lacks {len(words)} word{'s' * (len(words) > 1)} of {where} "
        f"prompt{'s' * (where > 1)}, which become its unknown token: {listed}."
    ]


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
