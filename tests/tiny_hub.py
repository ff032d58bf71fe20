"""Make a hub cache of tiny models once, and run scripts over it in processes of their own."""

import functools
import os
import subprocess
import sys

from conftest import ROOT, made_once

MEDIUM, LARGE = "argmaxinc/mlx-stable-diffusion-3-medium", "argmaxinc/mlx-stable-diffusion-3.5-large"
SCHNELL, DEV = "argmaxinc/mlx-FLUX.1-schnell", "argmaxinc/mlx-FLUX.1-dev"


@functools.cache
def tiny_hub(base):
    """Return HF_HOME below `base`, the session's temporary folder."""

    def write(home):
        command = [sys.executable, "tests/hub_driver.py", "write", str(home)]
        subprocess.run(command, cwd=ROOT, check=True, env=environment(home))

    return made_once(base, "tiny_hub", write)


def environment(home):
    return os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def run(home, *arguments):
    """Run scripts in a process of their own: `script, *arguments, "then", script, …`."""
    command = [sys.executable, "tests/hub_driver.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(home), capture_output=True, text=True, check=False)
