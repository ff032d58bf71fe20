"""Read prompts from a file, a model's captions, or the built-in list."""

import csv
import io
from collections import defaultdict
from pathlib import Path

import numpy as np

from calibration_store.errors import OptionError, StoreError
from calibration_store.files import read_bytes

BUILTIN_PROMPTS = Path(__file__).resolve().parents[2] / "prompts" / "builtin.csv"
PROMPT_COLUMNS = ("prompt", "caption")  # the first of these columns that a table has is read
TABLE_DELIMITERS = {".csv": ",", ".tsv": "\t"}
REFUSED_PROMPT_FILES = (".json", ".jsonl", ".yaml", ".yml")  # as text, each of their lines would pass for a prompt


def read_prompt_file(path: Path, what: str = "--prompts") -> list[str]:
    """Read the prompts of a table (.csv, .tsv) or of a text file (one a line; empty lines are skipped).

    what: the option or the file's role, for messages. Raises OptionError for a file that cannot be read, is of another
    kind, or holds no prompt.
    """
    suffix = path.suffix.lower()
    if suffix in REFUSED_PROMPT_FILES:
        raise OptionError(
            f"{what} {path}: {suffix} files are not read; give text (one prompt a line), .csv or .tsv "
            "(column 'prompt' or 'caption')"
        )
    try:
        text = read_bytes(path, "give a file").decode("utf-8-sig")
    except StoreError as error:
        raise OptionError(f"{what} {error.message}") from None
    except UnicodeDecodeError as error:
        raise OptionError(f"{what} {path}: not UTF-8 text (byte {error.start})") from None
    lines = (
        prompt_column(path, text, TABLE_DELIMITERS[suffix], what) if suffix in TABLE_DELIMITERS else text.splitlines()
    )
    prompts = [" ".join(line.split()) for line in lines if line.strip()]
    if not prompts:
        raise OptionError(f"{what} {path}: holds no prompt")
    return prompts


def prompt_column(path: Path, text: str, delimiter: str, what: str) -> list[str]:
    """Return the cells of the column `prompt` or, without one, `caption`; rows that end before it are left out.

    Raises OptionError for a table that is not valid, or has neither column.
    """
    try:
        rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter, strict=True) if row]
    except csv.Error as error:
        raise OptionError(f"{what} {path}: not valid {path.suffix[1:].upper()} ({error})") from None
    fields = [field.strip() for field in rows[0]] if rows else []
    names = [field.lower() for field in fields]
    column = next((names.index(name) for name in PROMPT_COLUMNS if name in names), None)
    if column is None:
        found = ", ".join(fields) or "none"
        raise OptionError(f"{what} {path}: no column 'prompt' or 'caption' (columns: {found})")
    return [row[column] for row in rows[1:] if column < len(row)]


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
