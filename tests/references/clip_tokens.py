"""Write tests/references/clip_tokens.json.gz: 10,000 texts with the token ids of transformers' CLIPTokenizer.

The first 1,000 have those of sd3-emoji's vocabulary, too, which lacks most characters.

    pip install transformers==5.24.0
    python tests/references/clip_tokens.py bpe_simple_vocab_16e6.txt.gz        # from the repository's root

The argument is CLIP's list of merges (MIT), as the wheel of open_clip_torch 3.3.0 brings it. The reference has its
first 8,000 merges, to keep the file small; `--all` compares every one of its 48,894 merges and writes nothing.
"""

import csv
import gzip
import json
import random
import sys
import unicodedata
from pathlib import Path

from transformers import CLIPTokenizer

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
ALL_MERGES = 49152 - 256 - 2
ALPHABET = "abc dé,.!?'\"-_()[]{}0123456789ABCÉß日本語😀🚀\t\n\u00a0\u200b“”–—…½²ﬁ\x01İΣσςſK\u0301\u0130あア한🇩🇪👩‍👩‍👧\u3000\x1c\x85<|>/\\"
SPECIAL = [
    "",
    " ",
    "CAFÉ",
    "cafe\u0301",
    "naïve façade",
    "“quotes” – dashes — …",
    "日本語のテキスト",
    "emoji 😀🚀",
    "ΟΔΟΣ",
    "İstanbul",
]
SPECIAL += [
    "control \x01\x02",
    "\x00a",
    "zero\u200bwidth",
    "\u00a0nbsp\u00a0",
    "ﬁ ligature ½ ²",
    "ＡＢＣ full width",
    "ſ'ſ 'S",
    "٣٤",
]
SPECIAL += ["don't we've I'LL it'S you'RE", "<|endoftext|>", "a!<|endoftext|>b", "<|ENDOFTEXT|>", "<|startoftext|> a"]
SPECIAL += ["x" * 300, "é" * 50, "!" * 99, " ".join(["word"] * 1000)]
BLOCKS = [(32, 0x250), (0x250, 0x3000), (0x3000, 0xD7FF), (0xE000, 0x11000), (0x1F300, 0x1FAFF)]


def texts() -> list[str]:
    """Return the special cases, the built-in prompts, and random variations of both."""
    chosen = random.Random(1)
    with (ROOT / "prompts/builtin.csv").open(encoding="utf-8", newline="") as file:
        prompts = [row["prompt"] for row in csv.DictReader(file)]
    found = SPECIAL + prompts
    while len(found) < 10_000:
        kind = chosen.random()
        if kind < 0.3:
            found.append("".join(chosen.choice(ALPHABET) for _ in range(chosen.randrange(1, 60))))
        elif kind < 0.6:
            letters = list(chosen.choice(prompts))
            for _ in range(chosen.randrange(1, 5)):
                letters.insert(chosen.randrange(len(letters) + 1), chosen.choice(ALPHABET))
            found.append("".join(letters))
        elif kind < 0.8:
            some = [chr(chosen.randrange(*chosen.choice(BLOCKS))) for _ in range(chosen.randrange(1, 30))]
            found.append("".join(one for one in some if unicodedata.category(one) not in ("Cn", "Co", "Cs")))
        else:
            found.append(
                " ".join(chosen.choice(chosen.choice(prompts).split()) for _ in range(chosen.randrange(1, 30)))
            )
    return found


def vocabulary(merges: list[list[str]]) -> dict[str, int]:
    """Return {token: id} in CLIP's order: bytes, bytes at the end of a word, merges, special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    return {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def main(path: Path, number: int) -> None:
    """Write the reference, or compare with every merge."""
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : number + 1]
    merges = [line.split() for line in lines]
    tokens = vocabulary(merges)
    theirs = CLIPTokenizer(vocab=tokens, merges=[tuple(pair) for pair in merges])
    expected = theirs(texts())["input_ids"]
    if number == ALL_MERGES:
        from w4a8.model.clip_tokenizer import ClipTokenizer

        ours = ClipTokenizer({tuple(pair): rank for rank, pair in enumerate(merges)}, tokens)
        ours.max_length = sys.maxsize
        print(sum(ours.tokenize(text) != ids for text, ids in zip(texts(), expected, strict=True)), "texts differ")
        return
    bundled = ROOT / "models/sd3-emoji"
    small = [tuple(line.split()) for line in (bundled / "merges.txt").read_text().strip().split("\n")[1:]]
    emoji = CLIPTokenizer(vocab=json.loads((bundled / "vocab.json").read_text()), merges=small)
    content = {
        "merges": [" ".join(pair) for pair in merges],
        "texts": texts(),
        "ids": expected,
        "emoji_ids": emoji(texts()[:1000])["input_ids"],
    }
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    (FOLDER / "clip_tokens.json.gz").write_bytes(gzip.compress(data, mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]), ALL_MERGES if "--all" in sys.argv else 8_000)
