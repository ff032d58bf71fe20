"""Make a run with every stage before evaluation once, for the test files that share it; check errors of one line."""

import functools
import json
import shutil
from pathlib import Path

from conftest import invoke, made_once

from calibration_store.files import file_digest
from tools.road import commands
from w4a8.model.catalog import BUNDLED_FOLDER

SMALL = ("--num-images", 3, "--num-steps", 4)


@functools.cache
def model_copy(base: Path) -> Path:
    """Return a copy of the bundled model below `base`, the session's temporary folder."""
    return made_once(base, "finished_emoji", lambda folder: shutil.copytree(BUNDLED_FOLDER, folder))


@functools.cache
def finished_run(base: Path) -> Path:
    """Return a run with every stage before evaluation, on that copy; for tests to copy in turn."""
    return made_once(base, "finished_run", lambda folder: run_stages(folder, model_copy(base)))


def run_stages(folder: Path, model: Path) -> None:
    """Run the tiny road up to learned rounding, with SMALL's images and steps, and all boundaries cached."""
    left_out = ("multitier", "export", "evaluate", "draw", "report")
    for script, *arguments in commands("tiny", folder, model=model, images=3, steps=4, stride=2, boundaries="all"):
        if not any(word in script for word in left_out):
            done = invoke(script.removesuffix(".py"), *arguments)
            assert done.exit_code == 0, done.output


def note_digests(weights: Path) -> None:
    """Let metadata.json name the files of the blocks as a test has changed them."""
    metadata = json.loads((weights / "metadata.json").read_bytes())
    metadata["block_digests"] = {block: file_digest(weights / f"{block}.npz") for block in metadata["block_digests"]}
    (weights / "metadata.json").write_text(json.dumps(metadata))


def one_line(done, message):
    """Assert that a stage ended with this message, in one line."""
    assert done.exit_code != 0 and message in done.stderr and "Traceback" not in done.output, done.output
    assert done.stderr.count("Error: ") == 1
