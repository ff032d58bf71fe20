"""Print a line for each file of a calibration folder: name, SHA-256, and the keys inside. It shows that a change moved no byte.

python tools/folder_digest.py calibration_data/demo > before.txt
python tools/folder_digest.py calibration_data/demo | diff before.txt -
"""

import hashlib
import json
import zipfile
from pathlib import Path

import click


def digest_line(root: Path, path: Path) -> str:
    """Return a file's name, the first half of its SHA-256, and the names of its arrays or its top-level JSON keys."""
    content = path.read_bytes()
    keys: list[str] = []
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist()]
    elif path.suffix == ".json":
        keys = list(json.loads(content))
    return f"{path.relative_to(root)} {hashlib.sha256(content).hexdigest()[:32]} {','.join(keys)}".rstrip()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Print a digest of every file below FOLDER."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        click.echo(digest_line(folder, path))


if __name__ == "__main__":
    main()
