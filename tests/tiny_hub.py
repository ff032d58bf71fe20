"""Make a hub cache of tiny models once, and run scripts over it in processes of their own."""

import functools
import os
import subprocess
import sys

from conftest import ROOT, made_once

MEDIUM, LARGE = "argmaxinc/mlx-stable-diffusion-3-medium", "argmaxinc/mlx-stable-diffusion-3.5-large"
MEDIUM_35 = "stabilityai/stable-diffusion-3.5-medium"
SCHNELL, DEV = "argmaxinc/mlx-FLUX.1-schnell", "argmaxinc/mlx-FLUX.1-dev"


@functools.cache
def tiny_hub(base):
    """Return the HF_HOME of the tiny models, below `base`, the session's temporary folder."""

    def write(home):
        command = [sys.executable, "tests/hub_driver.py", "write", str(home)]
        subprocess.run(command, cwd=ROOT, check=True, env=environment(home))

    return made_once(base, "tiny_hub", write)


def environment(home):
    """Return the environment of a process that finds its models in HF_HOME `home`, and no network."""
    return os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def run(home, *arguments):
    """Run scripts in a process of their own: `script, *arguments, "then", script, …`; return the finished process."""
    command = [sys.executable, "tests/hub_driver.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(home), capture_output=True, text=True, check=False)


def one_line_of(done, message):
    assert done.returncode != 0 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
