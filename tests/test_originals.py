"""Our transformers are the original ones: their velocities against those of diffusers, whose biases are as large as 0.5."""

import ast
import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from mlx.utils import tree_map
from references.diffusers_transformers import GUIDANCE, HEADS, LAYERS, SIDES, TEXT, TIMESTEP, drawn
from safetensors.numpy import save_file

from calibration_store.errors import UserError
from w4a8.model.families import family_of
from w4a8.model.original_checkpoint import read_original_checkpoint
from w4a8.model.original_model import original_names, original_transformer

REFERENCES = np.load(ROOT / "tests/references/diffusers_transformers.npz")
MODELS = {
    "sd3": "argmaxinc/mlx-stable-diffusion-3-medium",
    "sd3.5-large": "argmaxinc/mlx-stable-diffusion-3.5-large",
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "flux-schnell": "argmaxinc/mlx-FLUX.1-schnell",
    "flux-dev": "argmaxinc/mlx-FLUX.1-dev",
}


def is_flux(family):
    return family.architecture == "flux"


def tiny_transformer(name, folder, change=None):
    """Read the reference's weights, in the layout of diffusers, into our transformer, float32."""
    family = family_of(MODELS[name])
    sizes = {"num_heads": HEADS, "depth_multimodal": LAYERS, "hidden_size_override": 128}
    sizes |= (
        {"depth_unified": LAYERS, "rope_axes_dim": (8, 28, 28)} if is_flux(family) else {"max_latent_resolution": 64}
    )
    sizes |= {"dual_attention_blocks": 1} if name == "sd3.5-medium" else {}
    config = dataclasses.replace(family.config, **sizes)
    guided = name == "flux-dev"
    model = original_transformer(config, original_names(config, guided), GUIDANCE if guided else None)
    arrays = {}
    for row in REFERENCES[f"{name} keys"].tolist():
        key, shape = row.split(" ", 1)
        arrays[key] = drawn(key, ast.literal_eval(shape))
        if change is not None:
            arrays[key] = change(key, arrays[key])
    save_file(arrays, folder / "diffusion_pytorch_model.safetensors")
    weights = read_original_checkpoint(folder / "diffusion_pytorch_model.safetensors", family, model)
    model.load_weights(list(weights.items()))
    model.update(tree_map(lambda array: array.astype(mx.float32), model.parameters()))
    return model, family


def velocity(model, family):
    """Return the velocity (1, h, w, 16) at the reference's inputs."""
    height, width = SIDES
    if is_flux(family):  # diffusers takes patches of 2 x 2 as tokens of (channel, row, column)
        tokens = drawn("input tokens", (1, height * width // 4, 64)).reshape(height // 2, width // 2, 16, 2, 2)
        latent = tokens.transpose(0, 3, 1, 4, 2).reshape(1, height, width, 16)
    else:
        latent = drawn("input latent", (1, 16, height, width)).transpose(0, 2, 3, 1)
    pooled = mx.array(drawn("input pooled", (1, 768 if is_flux(family) else 2048)))
    timestep = mx.array([TIMESTEP], mx.float32)
    model.cache_modulation_params(pooled, timestep)
    text = mx.array(drawn("input text", (1, TEXT, 4096)))[:, :, None]
    found = model(latent_image_embeddings=mx.array(latent), token_level_text_embeddings=text, timestep=timestep)
    return np.array(found, np.float64)


def reference(name, family):
    """Return diffusers' velocity (1, h, w, 16), float64."""
    found = REFERENCES[name].astype(np.float64)
    if not is_flux(family):
        return found.transpose(0, 2, 3, 1)
    height, width = SIDES
    return found.reshape(height // 2, width // 2, 16, 2, 2).transpose(0, 3, 1, 4, 2).reshape(1, height, width, 16)


@pytest.mark.parametrize("name", MODELS)
def test_velocity_equals_that_of_diffusers(tmp_path, name):
    model, family = tiny_transformer(name, tmp_path)
    expected, found = reference(name, family), velocity(model, family)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-4


@pytest.mark.parametrize(
    "key", ["proj_out.weight", "transformer_blocks.0.ff.net.0.proj.weight", "pos_embed.proj.weight"]
)
def test_larger_arrays_are_refused_and_not_cut(tmp_path, key):
    """A checkpoint with more channels of any layer is another model's: no corner of its arrays is taken."""

    def wider(name, array):
        return np.concatenate([array, array]) if name == key else array

    with pytest.raises(UserError, match="and that of the model"):
        tiny_transformer("sd3.5-medium", tmp_path, wider)
