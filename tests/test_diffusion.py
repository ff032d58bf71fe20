"""w4a8.model against DiffusionKit's own code on the bundled model."""

import os
import subprocess
import sys
from contextlib import closing

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from mlx.utils import tree_flatten

from calibration_store.errors import StoreError
from w4a8.backend import blas
from w4a8.model.catalog import BUNDLED_FOLDER, ModelError, describe_model
from w4a8.model.diffusionkit import SD3T5Encoder
from w4a8.model.loading import load_pipeline, whole_model
from w4a8.model.modulation import modulation_cache
from w4a8.model.prompt_encoder import encode_prompts, say_what_is_not_read
from w4a8.model.sampling import decode_latents, euler_steps, initial_noise, sigma_schedule
from w4a8.model.t5 import T5Config, T5Encoder

SIZE = (16, 16)


def sample(pipeline, prompts, seeds, num_steps, cfg_weight):
    noise = mx.concatenate([initial_noise(seed, SIZE) for seed in seeds])
    text = encode_prompts(pipeline, prompts, cfg_weight)
    return list(euler_steps(pipeline, text, noise, num_steps, cfg_weight))


class RecordingMMDiT:
    """Stands before the transformer, notes what DiffusionKit's loop feeds it, and passes everything on."""

    def __init__(self, mmdit):
        self.mmdit, self.inputs = mmdit, []

    def __call__(self, latent_image_embeddings, **kwargs):
        self.inputs.append((latent_image_embeddings, kwargs["timestep"]))
        return self.mmdit(latent_image_embeddings=latent_image_embeddings, **kwargs)

    def __getattr__(self, name):
        return getattr(self.mmdit, name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_step_equals_diffusionkits_own_loop_bit_for_bit(dtype):
    ours, theirs = (load_pipeline(describe_model("sd3-emoji"), whole_model(dtype)) for _ in range(2))
    steps = 4 if dtype == "float32" else 2
    for image, prompt in enumerate(["rocket", "clown face", "hamster"]):  # the third runs in a used process
        states = sample(ours, [prompt], [42 + image], steps, 4.0)
        text, pooled = (a.astype(theirs.activation_dtype) for a in theirs.encode_text(prompt, 4.0, ""))
        recorder = theirs.mmdit = RecordingMMDiT(theirs.mmdit)
        final, _ = theirs.denoise_latents(text, pooled, steps, 4.0, SIZE, seed=42 + image)
        theirs.mmdit = recorder.mmdit
        assert len(recorder.inputs) == steps == len(states) - 1
        for state, (x, timestep) in zip(states, recorder.inputs, strict=False):
            assert mx.array_equal(state.x.astype(theirs.activation_dtype), x[:1])
            assert state.timestep.item() == timestep[0].item()
        assert mx.array_equal(theirs.latent_format.process_out(states[-1].x), final)
        assert states[-1].is_final and states[-1].sigma.item() == 0


@pytest.mark.slow
def test_eight_steps_equal_diffusionkits_denoise_latents(emoji):
    states = sample(emoji, ["rocket"], [42], 8, 4.0)
    final, _ = emoji.denoise_latents(*emoji.encode_text("rocket", 4.0, ""), 8, 4.0, SIZE, seed=42)
    emoji.mmdit.clear_modulation_params_cache()
    emoji.mmdit.pop("to_offload")
    assert mx.array_equal(emoji.latent_format.process_out(states[-1].x), final)


@pytest.mark.slow
@pytest.mark.all_cores
def test_a_batch_gives_the_images_of_single_runs(emoji):
    prompts, seeds = ["rocket", "clown face", "hamster"], range(3)
    batch = sample(emoji, prompts, seeds, 2, 4.0)
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        single = sample(emoji, [prompt], [seed], 2, 4.0)
        for one, many in zip(single, batch, strict=True):
            np.testing.assert_allclose(np.array(many.x[row]), np.array(one.x[0]), atol=2e-5)


@pytest.mark.slow
def test_guidance_off_is_the_conditional_half(emoji):
    """With guidance 1 the unconditional half cancels, so guidance 0 must give the same latents."""
    off, one = (sample(emoji, ["rocket"], [1], 4, cfg_weight)[-1].x for cfg_weight in (0.0, 1.0))
    np.testing.assert_allclose(np.array(off), np.array(one), atol=1e-4)
    assert encode_prompts(emoji, ["rocket"], 0.0).tokens.shape[0] == 1


@pytest.mark.slow
def test_one_step_and_other_sizes(emoji):
    assert len(sample(emoji, ["rocket"], [1], 1, 4.0)) == 2
    text = encode_prompts(emoji, ["rocket"], 4.0)
    states = list(euler_steps(emoji, text, initial_noise(0, (8, 12)), 2, 4.0))
    assert states[-1].x.shape == (1, 8, 12, 16)
    assert decode_latents(emoji, states[-1].x)[0].size == (48, 32)


def parameters(pipeline):
    return {name: np.array(array) for name, array in tree_flatten(pipeline.mmdit.parameters())}


def assert_unchanged(pipeline, before):
    after = parameters(pipeline)
    assert list(after) == list(before)
    assert all(np.array_equal(after[name], before[name]) for name in before)
    assert not any("_modulation_params" in module for _, module in pipeline.mmdit.named_modules())


def test_weights_come_back_after_the_loop_an_exception_and_a_half_run_generator(emoji):
    before = parameters(emoji)
    sample(emoji, ["rocket"], [1], 2, 4.0)
    assert_unchanged(emoji, before)

    text = encode_prompts(emoji, ["rocket"], 4.0)
    with pytest.raises(ZeroDivisionError), closing(euler_steps(emoji, text, initial_noise(0, SIZE), 4, 4.0)) as steps:
        next(steps)
        assert any("_modulation_params" in module for _, module in emoji.mmdit.named_modules())
        raise ZeroDivisionError
    assert_unchanged(emoji, before)

    wrong = mx.zeros((2, 7))
    with pytest.raises(ValueError), modulation_cache(emoji, [text.pooled, wrong], sigma_schedule(emoji, 2)[1]):
        pass
    assert_unchanged(emoji, before)


def test_noise_is_diffusionkits_and_leaves_numpys_global_state_alone(emoji):
    ours = initial_noise(7, SIZE)
    state = np.random.get_state()[1].tolist()
    initial_noise(8, SIZE)
    assert np.random.get_state()[1].tolist() == state
    assert mx.array_equal(ours, emoji.get_noise(7, emoji.get_empty_latent(*SIZE)))


def test_what_is_not_read_is_said(emoji):
    assert say_what_is_not_read(emoji, ["rocket", "swan"]) == []
    assert say_what_is_not_read(emoji, ["rocket", "a " * 40], "b " * 14) == [
        "CLIP reads the first 16 tokens of 1 prompt."
    ]
    assert say_what_is_not_read(emoji, ["a " * 15, "b " * 15], "b " * 15) == [
        "CLIP reads the first 16 tokens of 2 prompts.",
        "CLIP reads the first 16 tokens of the negative prompt.",
    ]
    lacks = "The tokenizer's vocabulary lacks 2 words of 1 prompt, which become its unknown token: '😀', 'café'."
    assert say_what_is_not_read(emoji, ["rocket", "smile 😀 cafe\u0301"]) == [lacks]


def test_t5_runs_without_metals_memory_limits():
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    encoder = SD3T5Encoder(config, low_memory_mode=False)
    tokens = mx.array([[3, 4, 5, 1]])
    got = T5Encoder(encoder)(tokens)
    x = encoder.wte(tokens)
    for layer in encoder.encoder.layers:
        x = layer(x, mask=encoder.encoder.relative_attention_bias(4, 4))
    assert mx.array_equal(got, encoder.encoder.ln(x))
    assert mx.array_equal(got, T5Encoder(encoder)(tokens))  # a second call still has its layers


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/model", "no such folder, and not one of sd3-emoji, argmaxinc/mlx-stable-diffusion-3-medium"),
        (str(ROOT / "tests"), "tests: the folder holds no model, neither a checkpoint"),
    ],
)
def test_unknown_models_are_one_line(name, message):
    with pytest.raises((ModelError, StoreError), match=message):
        describe_model(name)


def test_damaged_weights_are_one_line(tmp_path):
    for file in BUNDLED_FOLDER.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "mmdit.safetensors").unlink()
    (tmp_path / "mmdit.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(StoreError, match="mmdit.safetensors: truncated or damaged"):
        load_pipeline(describe_model(str(tmp_path)), whole_model("float32"))
    (tmp_path / "mmdit.safetensors").unlink()
    with pytest.raises(ModelError, match="no mmdit.safetensors"):
        load_pipeline(describe_model(str(tmp_path)), whole_model("float32"))
    with pytest.raises(ModelError, match="--t5: sd3-emoji has no T5"):
        load_pipeline(describe_model("sd3-emoji"), whole_model("float32"), use_t5=True)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "https://hub.invalid"}, "no network: hub.invalid"),
    ],
)
def test_without_network_the_default_model_is_one_line_with_the_way_on(setting, reason):
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    environment |= {"HF_HOME": "/nonexistent"} | setting
    code = (
        "from w4a8.model.catalog import ModelError, describe_model\n"
        "from w4a8.model.loading import load_pipeline, whole_model\n"
        "info = describe_model('argmaxinc/mlx-stable-diffusion-3-medium')\n"
        "try: load_pipeline(info, whole_model('float32'))\n"
        "except ModelError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.count("\n") == 1 and run.stderr == "" and reason in run.stdout
    assert "HF_HOME" in run.stdout and "--model sd3-emoji" in run.stdout


BLAS_OF = """
import sys
if sys.argv[1] == "mlx first":
    import mlx.core
import w4a8.model.diffusionkit
import ctypes
import mlx.core as mx
import numpy as np
from w4a8.backend import blas

a, b = (np.random.default_rng(seed).standard_normal((160, 160), np.float32) for seed in (0, 1))
exact = (a[:, :, None].astype(np.float64) * b[None]).sum(1)  # without any BLAS
errors = [np.abs(product - exact).max() for product in (np.array(mx.array(a) @ mx.array(b)), a @ b, a.astype(np.float64) @ b)]
print(len(blas._OPENBLAS), hasattr(ctypes.CDLL(None), "scipy_cblas_sgemm"), max(errors) < 1e-4)
"""


@pytest.mark.skipif(not blas._is_needed(), reason="not MLX's Linux CPU build")
@pytest.mark.parametrize("order", ["w4a8 first", "mlx first"])
def test_mlx_calls_openblas_and_numpy_keeps_its_own(order):
    """OpenBLAS's symbols stay its own: NumPy's OpenBLAS would take them for its kernels and compute nonsense."""
    run = subprocess.run([sys.executable, "-c", BLAS_OF, order], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("1 False True\n", "")


@pytest.mark.skipif(not blas._is_needed(), reason="not MLX's Linux CPU build")
def test_a_slow_blas_is_said():
    code = "import importlib.util as u; found = u.find_spec; u.find_spec = lambda name: None if name == 'scipy_openblas32' else found(name)\nimport w4a8, mlx.core"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "matrix products are slow: scipy-openblas32 is not installed (Issue 15)" in run.stderr
