"""Read prompts from the files that people have: text, tables, JSON, Parquet, a folder of captions beside images."""

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson

from calibration_store.errors import OptionError, StoreError
from calibration_store.files import read_bytes
from w4a8.backend.lazy_imports import MissingPackage, deferred

with deferred("pyarrow"):  # a large package, which is not installed with the toolkit
    from pyarrow.parquet import read_table

PROMPT_COLUMNS = ("prompt", "caption", "text", "prompts")  # the first of these columns that a table has is read
NEGATIVE_COLUMNS = ("negative_prompt", "negative prompt", "negative")
TABLE_DELIMITERS = {".csv": ",", ".tsv": "\t"}
CAPTION_SUFFIXES = (".txt", ".caption")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif")
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of a folder of images, as `datasets` reads it
PROMPT_KINDS = "text (one prompt a line), .csv, .tsv, .jsonl, .json, .parquet, or a folder of captions beside images"
COLUMN_NAMES = "'prompt', 'caption', 'text' or 'prompts'"
MOST_FAULTS = 5  # faults that a message lists

Rows = list[Mapping[str, Any]]


def read_prompt_file(
    path: Path, what: str = "--prompts", note: Callable[[str], object] = lambda sentence: None
) -> list[str]:
    """Read the prompts of a file or a folder of captions; the kind follows from the name's ending.

    what: the option or the file's role, for messages. note: is given a sentence on what is not used. Raises OptionError,
    with every fault of the file in one line, for a file that cannot be read, is of another kind, or holds no prompt.
    """
    try:
        if os.path.isdir(path):
            return read_caption_folder(path, what, note)
        suffix = path.suffix.lower()
        if suffix in (".parquet", ".pq"):
            texts = chosen_column(path, parquet_rows(path), what, note)
        elif suffix in (".yaml", ".yml", ".gz", ".zip", ".xlsx"):
            raise OptionError(f"{what} {path}: {suffix} files are not read; give {PROMPT_KINDS}")
        else:
            content = decoded(path)
            if suffix in TABLE_DELIMITERS:
                texts = chosen_column(path, table_rows(path, content, TABLE_DELIMITERS[suffix]), what, note)
            elif suffix in (".jsonl", ".ndjson", ".json"):
                read = json_values if suffix == ".json" else json_lines
                texts = chosen_column(path, read(path, content), what, note)
            else:
                texts = content.splitlines()
    except StoreError as error:
        raise OptionError(f"{what} {error.message}") from None
    prompts = [" ".join(text.split()) for text in texts if text.strip()]
    if not prompts:
        raise OptionError(f"{what} {path}: holds no prompt")
    return prompts


def decoded(path: Path) -> str:
    """Return a file's text. Raises StoreError where it cannot be read, or is no UTF-8."""
    try:
        return read_bytes(path, "give a file").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StoreError(f"{path}: not UTF-8 text (byte {error.start})") from None


def table_rows(path: Path, text: str, delimiter: str) -> Rows:
    """Return the rows of a CSV or TSV by its first row's names. Raises StoreError for a table that is not valid."""
    try:
        rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter, strict=True) if row]
    except csv.Error as error:
        raise StoreError(f"{path}: not valid {path.suffix[1:].upper()} ({error})") from None
    names = [name.strip() for name in rows[0]] if rows else []
    found: Rows = [dict(zip(names, row, strict=False)) for row in rows[1:]]
    return [dict.fromkeys(names), *found]  # the names, where every row is short


def json_lines(path: Path, text: str) -> Rows:
    """Return the objects of a JSONL file, one a line. Raises StoreError that lists every line that is none."""
    rows: Rows = []
    faults = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(as_row(orjson.loads(line)))
            except ValueError as error:
                faults.append(f"line {number}: {error}")
    return without_faults(path, rows, faults)


def json_values(path: Path, text: str) -> Rows:
    """Return the objects of a JSON list, or of the only list in a JSON object. Raises StoreError."""
    rows: Rows = []
    faults = []
    try:
        content = orjson.loads(text)
        lists = [value for value in content.values() if isinstance(value, list)] if isinstance(content, dict) else []
        values = lists[0] if len(lists) == 1 else content
        if not isinstance(values, list):
            raise StoreError(f"{path}: not a JSON list of prompts; give {PROMPT_KINDS}")
    except ValueError as error:
        raise StoreError(f"{path}: not JSON ({error}); give {PROMPT_KINDS}") from None
    for number, value in enumerate(values, 1):
        try:
            rows.append(as_row(value))
        except ValueError as error:
            faults.append(f"entry {number}: {error}")
    return without_faults(path, rows, faults)


def as_row(value: Any) -> Mapping[str, Any]:
    """Return a value of JSON as a row: an object as it is, a text as a prompt. Raises ValueError for anything else."""
    if isinstance(value, str):
        return {PROMPT_COLUMNS[0]: value}
    if not isinstance(value, dict):
        raise ValueError("neither a text nor an object")
    return value


def parquet_rows(path: Path) -> Rows:
    """Return the rows of a Parquet file: the columns of texts alone. Raises StoreError."""
    content = io.BytesIO(read_bytes(path, "give a file", limit=None))
    try:
        table = read_table(content)
    except MissingPackage as error:
        raise StoreError(f"{path}: {error.message}") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise StoreError(f"{path}: not a Parquet file ({str(error).splitlines()[0][:120]})") from None
    known = [name for name in table.column_names if name.strip().lower() in (*PROMPT_COLUMNS, *NEGATIVE_COLUMNS)]
    rows: Rows = [dict.fromkeys(table.column_names), *table.select(known).to_pylist()]
    return rows


def chosen_column(path: Path, rows: Rows, what: str, note: Callable[[str], object]) -> list[str]:
    """Return the texts of the first of PROMPT_COLUMNS that a row has; rows that lack it are left out.

    Raises StoreError where no row has one of them, or where a prompt is no text.
    """
    names = {name.strip().lower(): name for row in rows for name in row}
    column = next((names[name] for name in PROMPT_COLUMNS if name in names), None)
    if column is None:
        raise StoreError(f"{path}: no column {COLUMN_NAMES} (columns: {', '.join(names.values()) or 'none'})")
    values = [row[column] for row in rows if row.get(column) is not None]
    faults = [f"prompt {number} is no text" for number, value in enumerate(values, 1) if not isinstance(value, str)]
    without_faults(path, rows, faults)
    negative = next((names[name] for name in NEGATIVE_COLUMNS if name in names), None)
    if negative is not None and any(row.get(negative) for row in rows):
        note(f"{what} {path}: its column {negative!r} is not used; --negative-prompt is for every image.")
    return values


def read_caption_folder(folder: Path, what: str, note: Callable[[str], object]) -> list[str]:
    """Read the captions beside a folder's images, by name: photo.txt beside photo.jpg, or a metadata file of all.

    Raises OptionError for a folder without captions, and one that lists every caption that cannot be read.
    """
    for name in METADATA_FILES:
        if (folder / name).exists():
            return read_prompt_file(folder / name, what, note)
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise StoreError(f"{folder}: cannot be read ({error.strerror})") from None
    images = {path.stem: path for path in files if path.suffix.lower() in IMAGE_SUFFIXES}
    captions = [path for path in files if path.suffix.lower() in CAPTION_SUFFIXES and path.stem in images]
    if not captions:
        raise StoreError(
            f"{folder}: no captions beside images ({len(images)} images, no .txt of the same name); give {PROMPT_KINDS}"
        )
    prompts, faults = [], []
    for path in captions:
        try:
            prompts.append(" ".join(decoded(path).split()))
        except StoreError as error:
            faults.append(error.message.removeprefix(f"{folder}/"))
    without_faults(folder, [], faults)
    if len(captions) < len(images):
        note(f"{what} {folder}: {len(images) - len(captions)} of {len(images)} images have no caption.")
    return [prompt for prompt in prompts if prompt]


def without_faults(path: Path, rows: Rows, faults: Iterable[str]) -> Rows:
    """Return the rows, or raise StoreError that lists the faults, the first few by themselves."""
    listed = list(faults)
    if listed:
        more = f"; and {len(listed) - MOST_FAULTS} more" if len(listed) > MOST_FAULTS else ""
        raise StoreError(f"{path}: {'; '.join(listed[:MOST_FAULTS])}{more}")
    return rows
