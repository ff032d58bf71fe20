"""Write the token ids that transformers' T5 tokenizer gives for 600 texts: tests/references/t5_tokens.json and spiece.model.

    pip install transformers==5.24.0 sentencepiece protobuf
    python tests/references/t5_tokens.py        # from the repository's root

The SentencePiece model is trained here, with the settings of T5's own, which no package brings. transformers 4.46.3
gives the same ids.
"""

import csv
import io
import json
import random
import tempfile
from pathlib import Path

import sentencepiece
import transformers

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
MAX_LENGTH = 64
ALPHABET = "abc dé,.!?'\"-_()[]{}0123456789ABCÉß日本語😀🚀\t\n\u00a0\u200b“”–—…½²ﬁ\x01"
SPECIAL = ["", " ", "  ", " a ", "a  b", "tab\there", "new\nline", "CAFÉ", "café", "cafe\u0301", "naïve façade"]
SPECIAL += [
    "“quotes” – dashes — …",
    "日本語のテキスト",
    "emoji 😀🚀",
    "control \x01\x02",
    "ﬁ ligature ½ ²",
    "ＡＢＣ full width",
]
SPECIAL += [
    "zero\u200bwidth",
    "\u00a0nbsp\u00a0",
    "▁under",
    "x" * 300,
    "é" * 50,
    " ".join(["word"] * 1000),
    "a\\b/c:d;e",
]


def train(texts: list[str]) -> bytes:
    """Train a Unigram model as T5's: ids 0, 1 and 2 are padding, the end and the unknown; NFKC."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=2000, model_type="unigram", pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, normalization_rule_name="nmt_nfkc", num_threads=1, hard_vocab_limit=False,
    )  # fmt: skip
    return model.getvalue()


def main() -> None:
    """Tokenize the texts, and write both files."""
    with open(ROOT / "prompts/builtin.csv", encoding="utf-8") as file:
        prompts = [row[0] for row in csv.reader(file)]
    draw = random.Random(0)
    texts = prompts[:200] + SPECIAL
    texts += ["".join(draw.choices(ALPHABET, k=draw.randint(1, 60))) for _ in range(600 - len(texts))]
    captions = (ROOT / "models/sd3-emoji/captions.txt").read_text().splitlines()
    (FOLDER / "spiece.model").write_bytes(train(prompts + captions))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "spiece.model").write_bytes((FOLDER / "spiece.model").read_bytes())
        (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 100}))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, legacy=False, model_max_length=MAX_LENGTH)
        ids = [tokenizer(text, max_length=MAX_LENGTH, truncation=True)["input_ids"] for text in texts]
    versions = {package.__name__: package.__version__ for package in (transformers, sentencepiece)}
    found = {"versions": versions, "max_length": MAX_LENGTH, "texts": texts, "ids": ids}
    (FOLDER / "t5_tokens.json").write_text(json.dumps(found, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
