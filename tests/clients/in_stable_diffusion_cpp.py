"""Draw with stable-diffusion.cpp from a real-size export of random weights (tests/clients/models.py m24).

    .venv-clients/bin/python tests/clients/in_stable_diffusion_cpp.py /tmp/clients/m24

It writes random text encoders of the original sizes beside the export, takes the random checkpoint's VAE, and draws one
image of noise: what counts is that every tensor has a place, and that the program ends well. Nothing of the toolkit is
imported.
"""

import sys
from pathlib import Path

import gguf
import numpy as np
import stable_diffusion_cpp
from safetensors.numpy import load_file, save_file
from stable_diffusion_cpp import StableDiffusion

ENCODERS = {"clip_l": (768, 12, 768), "clip_g": (1280, 32, 1280)}  # width, layers, width of the projection
VOCABULARY, POSITIONS, STEPS, SIDE = 49408, 77, 2, 128


def random_clip(width: int, layers: int, projection: int) -> dict[str, np.ndarray]:
    """Return random float16 weights of CLIP's text encoder, under the names of transformers."""
    random = np.random.default_rng(width)

    def draw(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape, np.float32) * shape[-1] ** -0.5).astype(np.float16)

    ones, zeros = np.ones(width, np.float16), np.zeros(width, np.float16)
    arrays = {
        "text_model.embeddings.token_embedding.weight": draw(VOCABULARY, width),
        "text_model.embeddings.position_embedding.weight": draw(POSITIONS, width),
        "text_model.final_layer_norm.weight": ones, "text_model.final_layer_norm.bias": zeros,
        "text_projection.weight": draw(projection, width),
    }  # fmt: skip
    for index in range(layers):
        layer = f"text_model.encoder.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            arrays |= {f"{layer}.self_attn.{part}.weight": draw(width, width), f"{layer}.self_attn.{part}.bias": zeros}
        arrays |= {
            f"{layer}.mlp.fc1.weight": draw(4 * width, width),
            f"{layer}.mlp.fc1.bias": np.zeros(4 * width, np.float16),
        }
        arrays |= {f"{layer}.mlp.fc2.weight": draw(width, 4 * width), f"{layer}.mlp.fc2.bias": zeros}
        for norm in ("layer_norm1", "layer_norm2"):
            arrays |= {f"{layer}.{norm}.weight": ones, f"{layer}.{norm}.bias": zeros}
    return arrays


def main() -> None:
    """Write what the program needs, load, draw, and print what it was given."""
    folder = Path(sys.argv[1])
    for name, sizes in ENCODERS.items():
        if not (folder / f"{name}.safetensors").exists():
            save_file(random_clip(*sizes), folder / f"{name}.safetensors")
    prefix = "first_stage_model."
    vae = {
        key.removeprefix(prefix): array
        for key, array in load_file(folder / "original.safetensors").items()
        if key.startswith(prefix)
    }
    save_file(vae, folder / "vae.safetensors")
    tensors = gguf.GGUFReader(folder / "model.gguf").tensors
    kinds = sorted({tensor.tensor_type.name for tensor in tensors})
    counted = ", ".join(f"{sum(t.tensor_type.name == kind for t in tensors)} {kind}" for kind in kinds)
    print(
        f"stable-diffusion-cpp-python {stable_diffusion_cpp.__version__}; {len(tensors)} tensors: {counted}", flush=True
    )
    model = StableDiffusion(
        diffusion_model_path=str(folder / "model.gguf"),
        clip_l_path=str(folder / "clip_l.safetensors"),
        clip_g_path=str(folder / "clip_g.safetensors"),
        vae_path=str(folder / "vae.safetensors"),
        verbose=True,
    )
    (image,) = model.generate_image(
        prompt="a cat", width=SIDE, height=SIDE, sample_steps=STEPS, sample_method="euler", cfg_scale=1.0, seed=1
    )
    image.save(folder / "drawn.png")
    print(f"drawn: {image.size[0]} x {image.size[1]}, {STEPS} steps", flush=True)


if __name__ == "__main__":
    main()
