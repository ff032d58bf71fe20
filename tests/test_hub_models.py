"""Hub models at a tiny size: what the encoders cut, embedded guidance, runs of 0.8.0, checkpoints of another layout."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from tiny_hub import DEV, MEDIUM, SCHNELL, one_line_of, run, tiny_hub

from w4a8.model.diffusionkit import SD3T5Encoder
from w4a8.model.hub_parts import pack_t5
from w4a8.model.t5 import T5Config

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
    again = (hub, stage, *where, tmp_path / "b", "--resume")
    assert "nothing to do" in run(*again).stdout  # the run's guidance, since none is given
    one_line_of(run(*again, "--guidance", 3.5), "has --guidance 1.5, not 3.5")
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
            "not complete, it lacks 79 arrays, double_blocks.0.",
        ),
    }
    for name, (key, message) in given.items():
        path = tmp_path / f"{name}.safetensors"
        mx.save_safetensors(str(path), {key: mx.zeros((384, 128))})
        where = ("--calib-dir", tmp_path / "run", "--num-images", 1, "--num-steps", 1, *SIZE, "--no-images")
        one_line_of(
            run(hub, "generate_calibration_data", "--model", SCHNELL, "--local-checkpoint", path, *where), message
        )


def test_t5_at_fewer_bits(hub, tmp_path):
    """8 and 4 bits move the latents, 4 more than 8; the manifest notes them, and later stages and --resume follow it."""
    where = ("--model", SCHNELL, "--num-images", 1, "--num-steps", 1, *SIZE, "--no-images", "--calib-dir")
    stage = "generate_calibration_data"
    words = [word for bits in (16, 8, 4) for word in ("then", stage, *where, tmp_path / str(bits), "--text-bits", bits)]
    later = ("then", "collect_layer_activations", "--num-images", 1, "--stride", 1, "--calib-dir", tmp_path / "4")
    done = run(hub, *words[1:], *later)
    assert done.returncode == 0 and "T5 on at 8 bits" in done.stdout and "T5 on at 4 bits" in done.stdout, done.stderr
    x = {bits: np.load(tmp_path / f"{bits}/samples/0000_001.npz")["x"].astype(np.float64) for bits in (16, 8, 4)}
    moved = {bits: np.linalg.norm(x[bits] - x[16]) / np.linalg.norm(x[16]) for bits in (8, 4)}
    assert 0 < moved[8] < moved[4] < 0.5
    manifests = [json.loads((tmp_path / f"{bits}/manifest.json").read_bytes()) for bits in (16, 8)]
    assert "text_bits" not in manifests[0] and manifests[1]["text_bits"] == 8
    one_line_of(run(hub, stage, *where, tmp_path / "8", "--resume", "--text-bits", 16), "has --text-bits 8")
    one_line_of(
        run(hub, stage, "--model", "sd3-emoji", *where[2:], tmp_path / "x", "--text-bits", 8), "has no T5 text encoder"
    )
    one_line_of(
        run(hub, stage, "--model", MEDIUM, *where[2:], tmp_path / "x", "--text-bits", 8, "--no-t5"), "T5 is off"
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_layers_of_t5_are_the_nearest_codes(bits):
    """Weights are a quarter of a step from the original in the mean; layers of odd widths and the embedding stay."""
    config = T5Config(
        d_model=128, d_kv=8, num_heads=2, d_ff=192, num_layers=1, vocab_size=40, feed_forward_proj="gated-gelu"
    )
    mx.random.seed(0)  # whatever tests ran before
    model = SD3T5Encoder(config, low_memory_mode=False)
    before = {path: np.array(module.weight, np.float64) for path, module in model.named_modules() if "weight" in module}
    pack_t5(model, bits)
    modules = dict(model.named_modules())
    packed = [path for path, module in modules.items() if isinstance(module, nn.QuantizedLinear)]
    assert len(packed) == 6 and not any(path.endswith(("out_proj", "wte")) for path in packed)
    for path in packed:
        module = modules[path]
        found = np.array(mx.dequantize(module.weight, module.scales, module.biases, 64, bits), np.float64)
        step = np.repeat(np.abs(np.array(module.scales, np.float64)), 64, axis=1)
        off = np.abs(found - before[path]) / step
        assert (
            off.max() <= 1.01 and off.mean() < 0.27
        )  # MLX moves a group's grid so that 0 is a code, which clips its end
