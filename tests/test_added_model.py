"""A model is added by one file: that of docs/adding-a-model.md runs through the stages."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from tiny_hub import one_line_of


@pytest.mark.slow
def test_a_model_is_added_by_one_file(tmp_path):
    """The file of docs/adding-a-model.md, a random checkpoint of its shapes, and every stage over it; then broken files."""
    text = (ROOT / "docs/adding-a-model.md").read_text()
    (tmp_path / "toy.toml").write_text(re.search(r"```toml\n(.*?)```", text, re.DOTALL)[1])
    own = {
        "W4A8_MODELS": str(tmp_path),
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    made = (
        "from pathlib import Path; from benchmarks.random_model import write_checkpoint, write_text_encoders;"
        "home = Path('hub'); write_text_encoders(home); write_checkpoint(home, 'me/toy')"
    )

    def python(*words):
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=tmp_path, env=os.environ | own, capture_output=True, text=True, check=False)

    assert python("-c", made).returncode == 0
    where = ("--calib-dir", tmp_path / "run")
    for script, *options in (
        ("generate_calibration_data", "--model", "me/toy", "--no-t5", "--num-images", 2, "--no-images"),
        ("collect_layer_activations", "--num-images", 2, "--stride", 3),
        ("analyze_activations",),
        ("cache_adaround_data", "--num-images", 2, "--stride", 2),
        ("optimize_adaround", "--iters", 10, "--batch-size", 2, "--unit", "block", "--no-tune-rest"),
        ("export_quantized_model",),
    ):
        done = python(ROOT / f"{script}.py", *where, *options)
        assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "run/manifest.json").read_bytes())
    assert [manifest[key] for key in ("num_steps", "cfg_scale", "sampler_shift", "latent_size")] == [
        6,
        3.0,
        2.0,
        [8, 8],
    ]
    assert (tmp_path / "run/adaround_weights/mm2.npz").exists()
    checkpoint = next((tmp_path / "hub").rglob("toy.safetensors"))
    known = python(
        "-c", f"from w4a8.model.catalog import describe_model; print(describe_model({str(checkpoint)!r}).hub_id)"
    )
    assert known.stdout.strip() == "me/toy", known.stderr
    for old, new, message in (
        ('base = "sd3-medium"', 'base = "sd4"', "toy.toml: base 'sd4' is none of"),
        ("num_steps = 6", "", "toy.toml: Object missing required field `num_steps`"),
        ("num_steps = 6", "num_steps = 6\ncolour = 1", "toy.toml: Object contains unknown field `colour`"),
        ("num_heads = 2", "heads = 2", "toy.toml: "),
        ('title = "Toy"', "title = Toy", "toy.toml: "),
        ("[[models]]", "[models]", "toy.toml: models is no table in the base"),
        ("depth_multimodal = 3", 'depth_multimodal = "3"', "toy.toml: Expected"),
        ('id = "me/toy"', 'id = "argmaxinc/mlx-FLUX.1-dev"', "toy.toml: argmaxinc/mlx-FLUX.1-dev is declared twice"),
    ):
        good = (tmp_path / "toy.toml").read_text()
        (tmp_path / "toy.toml").write_text(good.replace(old, new))
        one_line_of(python(ROOT / "generate_calibration_data.py", *where, "--model", "me/toy"), message)
        (tmp_path / "toy.toml").write_text(good)
