"""The version of the toolkit in the files of a run: every one notes it, and it decides nothing.

A run that goes on keeps the version that it was begun with, so that its files stay what they are, byte for byte. Digests
that decide whether something may go on leave the version out.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calibration_store.files import open_regular

W4A8_VERSION = "w4a8_version"  # key in JSON files; manifest.json has it in `package_versions`
_ENTRY = re.compile(rb'"w4a8_version"\s*:\s*"[^"\\]*"\s*,?')
_HEAD = 2**20  # bytes of a file among which its version stands


def noted_version(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the entry with the version, as it is in a plan or in metadata; empty where that has none."""
    return {W4A8_VERSION: content[W4A8_VERSION]} if W4A8_VERSION in content else {}


def keep_version(plan: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Let the plan of a run that goes on have the version that the run was begun with; none, where none was noted."""
    if W4A8_VERSION in before:
        plan[W4A8_VERSION] = before[W4A8_VERSION]  # at its place: files stay equal, byte for byte
    else:
        plan.pop(W4A8_VERSION, None)


def without_version(content: bytes) -> bytes:
    """Return the bytes of a JSON file without the entry of the version."""
    return _ENTRY.sub(b"", content)


def content_digest(path: Path) -> str:
    """Return the SHA-256 of a file without the version that it notes. Raises StoreError when it cannot be read."""
    with open_regular(path, "make it anew", limit=None) as file:
        digest = hashlib.sha256(without_version(file.read(_HEAD)))
        while part := file.read(_HEAD):
            digest.update(part)
    return digest.hexdigest()
