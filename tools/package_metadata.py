"""Tell the build of the package what it requires. pyproject.toml names this hook; hatchling, which builds, runs it.

requirements.txt and requirements-test.txt are the only lists. MLX's builds for Linux exclude each other, and an extra cannot
take a requirement away: the lines of the CPU build become the extra `cpu`, beside `cuda12` and `cuda13`.
"""

from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

CPU_BUILD = ("mlx[cpu]", "scipy-openblas32")


class Requirements(MetadataHookInterface):
    """Read dependencies and extras from the requirements files."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Put both into the metadata of the package."""
        listed = requirements(Path(self.root) / "requirements.txt")
        cpu = [line for line in listed if line.startswith(CPU_BUILD)]
        (mlx,) = (line for line in cpu if line.startswith("mlx["))
        metadata["dependencies"] = [mlx.replace("[cpu]", ""), *(line for line in listed if line not in cpu)]
        metadata["optional-dependencies"] = {
            "cpu": cpu,
            "cuda12": [mlx.replace("[cpu]", "[cuda12]")],
            "cuda13": [mlx.replace("[cpu]", "[cuda13]")],
            "test": requirements(Path(self.root) / "requirements-test.txt"),
        }


def requirements(path: Path) -> list[str]:
    """Return the requirements in a file, without comments and without the files that it includes."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-"))]
