"""CLIP's tokenizer on bytes, with the ids of every other program; DiffusionKit's own knows ASCII alone.

Byte-pair encoding as in transformers 5's CLIPTokenizer (models/clip/tokenization_clip.py), after OpenAI's
clip/simple_tokenizer.py: the text is composed (NFC), runs of white space become one space, letters become small; words
are split by WORDS; each byte of a word's UTF-8 has a printable stand-in, and the stand-ins are merged by rank.
tests/references/clip_tokens.py compares the ids with transformers'.
"""

import unicodedata
from collections.abc import Iterator, Mapping
from itertools import pairwise

import regex

from calibration_store.model_folder import BOS, EOS
from w4a8.model.diffusionkit import Tokenizer

SPECIAL = regex.compile(r"(<\|startoftext\|>|<\|endoftext\|>)")
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+")
SPACES = regex.compile(r"\p{White_Space}+")
END_OF_WORD = "</w>"


def byte_stand_ins() -> list[str]:
    """Return the printable character that stands for each of the 256 bytes: itself, or the next above U+00FF."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


STAND_INS = byte_stand_ins()


class ClipTokenizer(Tokenizer):
    """DiffusionKit's tokenizer with CLIP's own ids. What the vocabulary lacks becomes the end token, CLIP's unknown."""

    def __init__(self, ranks: Mapping[tuple[str, str], int], vocabulary: Mapping[str, int], pad_with_eos: bool = False):
        """ranks: the rank of each merge, {pair of tokens: rank}. vocabulary: {token: id}."""
        super().__init__(ranks, vocabulary, pad_with_eos)
        self._ids: dict[str, list[int | None]] = {}

    def tokenize(self, text: str | list[str], prepend_bos: bool = True, append_eos: bool = True) -> list:
        """Return the ids of a text, at most `max_length` with both ends, or a list of ids for each of several texts."""
        if isinstance(text, list):
            return [self.tokenize(one, prepend_bos, append_eos) for one in text]
        inner = self.ids(text)[: self.max_length - prepend_bos - append_eos]
        return [self.bos_token] * prepend_bos + inner + [self.eos_token] * append_eos

    def ids(self, text: str) -> list[int]:
        """Return the ids of a whole text, without its ends and however long it is."""
        return [
            self.eos_token if index is None else index for word in self.words(text) for index in self.word_ids(word)
        ]

    def unknown_words(self, text: str) -> list[str]:
        """Return the words of a text that the vocabulary lacks, or lacks a part of, as they were written to ids."""
        return [word for word in self.words(text) if None in self.word_ids(word)]

    def words(self, text: str) -> Iterator[str]:
        """Split a text into words: runs of letters, single digits, runs of other characters; special tokens whole."""
        for number, part in enumerate(SPECIAL.split(text)):
            if number % 2:
                yield part
                continue
            composed = SPACES.sub(" ", unicodedata.normalize("NFC", part))
            yield from WORDS.findall("".join(letter.lower() for letter in composed))  # not str.lower: it knows ς

    def word_ids(self, word: str) -> list[int | None]:
        """Return the ids of a word; None for a part that the vocabulary lacks."""
        if word not in self._ids:
            if word in (BOS, EOS):
                self._ids[word] = [self.vocab[word]]
            else:
                symbols = "".join(STAND_INS[byte] for byte in word.encode("utf-8", "replace"))
                self._ids[word] = [self.vocab.get(part) for part in self.merged(symbols)]
        return self._ids[word]

    def merged(self, symbols: str) -> list[str]:
        """Merge the pair of the lowest rank, everywhere, until no pair has a rank."""
        parts = [*symbols[:-1], symbols[-1] + END_OF_WORD]
        while len(parts) > 1:
            pair = min(pairwise(parts), key=lambda pair: self.bpe_ranks.get(pair, len(self.bpe_ranks)))
            if pair not in self.bpe_ranks:
                break
            found: list[str] = []
            for part in parts:
                if found and (found[-1], part) == pair:
                    found[-1] += part
                else:
                    found.append(part)
            parts = found
        return parts
