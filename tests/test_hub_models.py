"""Hub models at a tiny size: what the encoders cut, embedded guidance, runs of 0.8.0, checkpoints of another layout."""

import json

import mlx.core as mx
import numpy as np
import pytest
from tiny_hub import DEV, MEDIUM, SCHNELL, one_line_of, run, tiny_hub

pytestmark = pytest.mark.slow

SIZE = ("--latent-size", 8, 12)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return tiny_hub(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("model, limit, cut", [(SCHNELL, 256, 2), (DEV, 512, 1)])
def test_each_encoders_cut_is_told(hub, tmp_path, model, limit, cut):
    """CLIP cuts all three prompts at 77 tokens; T5 reads 256 tokens with FLUX.1-schnell and 512 with -dev."""
    (tmp_path / "prompts.txt").write_text("\n".join("a " * count for count in (80, 250, 600)))
    where = ("--prompts", tmp_path / "prompts.txt", "--calib-dir", tmp_path / "run", "--dry-run")
    done = run(hub, "generate_calibration_data", "--model", model, "--num-images", 3, "--num-steps", 1, *SIZE, *where)
    assert done.returncode == 0, done.stderr
    one = f"T5 reads the first {limit} tokens of {cut} prompt{'s' * (cut > 1)}."
    assert f"CLIP reads the first 77 tokens of 3 prompts; {one}" in done.stdout, done.stdout


def test_guidance_is_embedded_noted_and_moves_the_latents(hub, tmp_path):
    """3.5 is FLUX.1-dev's own; other models embed none."""
    where = ("--model", DEV, "--num-images", 1, "--num-steps", 1, *SIZE, "--no-images", "--calib-dir")
    stage = "generate_calibration_data"
    done = run(hub, stage, *where, tmp_path / "a", "then", stage, *where, tmp_path / "b", "--guidance", 1.5)
    assert done.returncode == 0 and "embedded guidance 3.5" in done.stdout and "embedded guidance 1.5" in done.stdout
    manifests = [json.loads((tmp_path / name / "manifest.json").read_bytes()) for name in "ab"]
    assert [manifest["guidance"] for manifest in manifests] == [3.5, 1.5]
    one, other = (np.load(tmp_path / name / "samples/0000_001.npz")["x"] for name in "ab")
    assert not np.array_equal(one, other)
    resumed = run(hub, stage, *where, tmp_path / "b", "--resume")
    one_line_of(resumed, "has --guidance 1.5, not 3.5")
    one_line_of(run(hub, stage, *where, tmp_path / "c", "--model", SCHNELL, "--guidance", 2), "embeds no guidance")


def test_a_run_of_080_is_refused(hub, tmp_path):
    """Its manifest has the fingerprint of the files alone; then k had no bias, and timesteps were embedded in 16 bits."""
    where = ("--calib-dir", tmp_path / "run")
    stage = ("generate_calibration_data", "--model", MEDIUM, "--num-images", 1, "--num-steps", 1, *SIZE, "--no-images")
    done = run(hub, *stage, "--no-t5", *where, "then", "note_fingerprint_of_080", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    one = ("--num-images", 1, "--stride", 1)
    for script, *options in (
        ("collect_layer_activations", *one),
        ("cache_adaround_data", *one),
        ("export_quantized_model", "--weights", "w4-rtn"),
        ("evaluate_quantization", "--variants", "w4-rtn", "--num-images", 1),
    ):
        one_line_of(run(hub, script, *where, *options), "0.8.0")
    one_line_of(run(hub, *stage, "--no-t5", *where, "--resume"), "0.8.0")


def test_checkpoints_of_another_layout_are_named(hub, tmp_path):
    given = {
        "diffusers": ("transformer.single_transformer_blocks.0.attn.to_q.weight", "holds no transformer"),
        "packed": ("double_blocks.0.img_attn.qkv.scales", "packed already"),
        "foreign": (
            "double_blocks.0.img_attn.qkv.weight",
            "not the transformer that --model names (lacks 79 arrays, double_blocks.0.",
        ),
    }
    for name, (key, message) in given.items():
        path = tmp_path / f"{name}.safetensors"
        mx.save_safetensors(str(path), {key: mx.zeros((384, 128))})
        where = ("--calib-dir", tmp_path / "run", "--num-images", 1, "--num-steps", 1, *SIZE, "--no-images")
        one_line_of(
            run(hub, "generate_calibration_data", "--model", SCHNELL, "--local-checkpoint", path, *where), message
        )
