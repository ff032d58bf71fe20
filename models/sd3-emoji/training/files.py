"""Read files with one-line errors, and write them atomically."""

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

from calibration_store.errors import StoreError
from calibration_store.files import atomic_file


@contextlib.contextmanager
def reading(path: Path, source: str) -> Iterator[None]:
    """Turn every fault of an input file into one line; `source` says where the file comes from."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or error
        raise StoreError(f"cannot read {path}: {reason} ({source})") from None


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
