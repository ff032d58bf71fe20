"""A checkpoint's name says how to sample with it; a lone file is told what is wrong with it."""

from pathlib import Path

import pytest
from diffusionkit.mlx import T5_MAX_LENGTH
from diffusionkit.mlx.scripts.generate_images import HEIGHT, SHIFT, WIDTH
from tiny_hub import LARGE

from calibration_store.errors import UserError
from w4a8.model.catalog import BUNDLED_FOLDER, describe_model
from w4a8.model.checkpoint_contents import Contents
from w4a8.model.diffusionkit import MMDIT_CKPT, model_io
from w4a8.model.families import FAMILIES, MODELS, family_of
from w4a8.model.model_source import Sampling, sampling_of


@pytest.mark.parametrize("title, steps, cfg_weight", [
    ("sd3.5_large_turbo.safetensors", 4, 0), ("Hyper-SD3-8steps.safetensors", 8, 0), ("flux-16-step.safetensors", 16, 0),
    ("my-flux-lightning.safetensors", 0, 0), ("flux_fast.safetensors", 0, 0), ("flux-dev.safetensors", None, None),
    ("hyperrealistic-flux.safetensors", None, None), ("flux-dev-de-distill.safetensors", None, None),
    ("breakfast.safetensors", None, None), ("epoch-10_step-500.safetensors", None, None),
    ("epoch10-step500.safetensors", None, None), ("my-sd3-2000steps.safetensors", None, None),
])  # fmt: skip
def test_names_that_say_few_steps(title, steps, cfg_weight):
    """A word inside another one, and the steps of a training, say nothing of sampling."""
    contents = Contents(Path(title), (), {}, "", None, None, title)
    assert sampling_of(contents, LARGE) == Sampling(steps, cfg_weight)


def test_a_lone_file_of_a_folder_says_what_is_wrong_with_it(tmp_path):
    """An interrupted download is told as such, and the transformer of a model folder as what it is."""
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="model.safetensors: truncated or damaged"):
        describe_model(str(tmp_path))
    with pytest.raises(UserError, match="the transformer of a model folder; give the folder"):
        describe_model(str(BUNDLED_FOLDER / "mmdit.safetensors"))
    with pytest.raises(UserError, match="no such file, and not one of"):
        describe_model(str(tmp_path / "gone.safetensors"))


def test_declared_sizes_are_those_of_diffusionkit():
    """DiffusionKit's configs, sampling shifts and file names of the models that it has, beside what the files declare."""
    for hub_id in (name for name in MMDIT_CKPT if "4bit" not in name):
        entry, theirs = MODELS[hub_id], vars(model_io._CONFIG[hub_id])
        other = {"dtype", "float16_dtype", "low_memory_mode", "upcast_multimodal_blocks", "guidance_embed"}
        declared = vars(family_of(hub_id).config)
        assert {key: declared[key] for key in theirs.keys() - other} == {
            key: theirs[key] for key in theirs.keys() - other
        }
        assert model_io._MMDIT[hub_id] == {hub_id: entry.file, "vae": entry.vae[1]}
        assert (entry.shift, entry.t5_tokens) == (SHIFT[hub_id], T5_MAX_LENGTH[hub_id])
        assert entry.latent_size == (HEIGHT[hub_id] // 8, WIDTH[hub_id] // 8)
    assert len(FAMILIES) == 4 and len(MODELS) == 6


def test_turbo_is_sampled_in_four_steps_without_guidance():
    turbo, large = describe_model("stabilityai/stable-diffusion-3.5-large-turbo"), describe_model(LARGE)
    assert (turbo.num_steps, turbo.cfg_weight, turbo.sampler_shift) == (4, 0.0, 3.0)
    assert turbo.family is large.family and (large.num_steps, large.cfg_weight) == (50, 5.0)


def test_a_title_that_begins_with_no_letter_is_no_other_model():
    """FLUX.1-dev is told by its keys, Turbo by a word: neither by the empty words around `_flux` or `(v2)`."""
    shapes = {"double_blocks.0.img_attn.qkv.weight": (9216, 3072), "img_in.weight": (3072, 64)}
    for title in ("_flux.safetensors", "模型.safetensors", "flux (v2)"):
        contents = Contents(Path(title), (), shapes, "", "original", "flux", title)
        assert contents.hub_id() == "argmaxinc/mlx-FLUX.1-schnell"
