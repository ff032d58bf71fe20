"""Turn emoji-datasource's entries and pictures into captions, images and a tokenizer."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from config import CONFIG, END, END_TOKEN, MAX_TOKENS, START

SKIN_TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium dark skin tone",
    "1F3FF": "dark skin tone",
}


def clean_caption(name: str) -> str:
    """Return the lower-case words and digits of a name, one space between them."""
    return " ".join(re.sub(r"[^a-z0-9]", " ", name.lower()).split())


def captioned_files(entries: Sequence[dict]) -> Iterator[tuple[str, list[str]]]:
    """Yield the file name and sorted captions of every emoji and skin tone that Google drew."""
    for entry in entries:
        if not entry.get("has_img_google"):
            continue
        names = [entry["name"] or entry["short_name"], *entry["short_names"]]
        captions = sorted({clean_caption(name) for name in names} - {""})
        yield entry["image"], captions
        for code, variation in entry.get("skin_variations", {}).items():
            tones = dict.fromkeys(SKIN_TONES[part] for part in code.split("-") if part in SKIN_TONES)
            if variation.get("has_img_google"):
                yield variation["image"], [f"{caption} {' and '.join(tones)}" for caption in captions]


def read_image(path: Path) -> np.ndarray:
    """Return a PNG on white, (64, 64, 3) uint8."""
    size = tuple(CONFIG["image_size"])
    with Image.open(path) as file:
        picture = file.convert("RGBA").resize(size, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", size, "white")
    canvas.alpha_composite(picture)
    return np.asarray(canvas.convert("RGB"))


def train_tokenizer(captions: Sequence[str]):
    """Train a byte-pair encoding of at most 2,048 tokens, whose words end in `</w>` as CLIP's do.

    The trainer numbers letters at word ends in random order, and numbers decide between pairs equally frequent. As
    "special" tokens the letters have fixed numbers. They must not stay special, or every letter would be a word.
    """
    letters = sorted({letter for caption in captions for letter in caption} - {" "})
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = [START, END, *letters, *(f"{letter}</w>" for letter in letters)]
    trainer = trainers.BpeTrainer(
        vocab_size=END_TOKEN, special_tokens=tokens, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    return Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | {"added_tokens": []}))


def encode_caption(tokenizer, caption: str) -> list[int]:
    """Return the start token, the caption, and end tokens up to 16."""
    ids = [tokenizer.token_to_id(START), *tokenizer.encode(caption).ids[: MAX_TOKENS - 2]]
    return ids + [END_TOKEN] * (MAX_TOKENS - len(ids))
