"""Load the models of tests/clients/models.py in diffusers, and compare its velocities with ours.

    .venv-clients/bin/python tests/clients/in_diffusers.py /tmp/clients/m4 /tmp/clients/f1 …

It prints ‖v − v_ours‖ / ‖v_ours‖ for the GGUF file and for the original checkpoint, in float32, and the same between
diffusers' own two. Nothing of the toolkit is imported.
"""

import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
from safetensors.torch import load_file, save_file

SD3 = {"_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16,
       "attention_head_dim": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 192}  # fmt: skip
FLUX = {"_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "num_layers": 1, "num_single_layers": 1,
        "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
        "axes_dims_rope": [16, 56, 56]}  # fmt: skip
CONFIGS = {
    "m4": SD3 | {"num_layers": 4, "num_attention_heads": 4, "caption_projection_dim": 256},
    "l2": SD3 | {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128, "qk_norm": "rms_norm"},
    "f1": FLUX | {"guidance_embeds": False},
    "d1": FLUX | {"guidance_embeds": True},
}


def load(folder: Path, file: str, config: dict) -> torch.nn.Module:
    """Load a file as diffusers loads single files, with the sizes from a config folder; every tensor must have a place."""
    home = folder / "config/transformer"
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.json").write_text(json.dumps(config))
    kind = getattr(diffusers, config["_class_name"])
    options = {"config": str(folder / "config"), "subfolder": "transformer", "torch_dtype": torch.float32}
    path = folder / file
    if file.endswith(".gguf"):
        options["quantization_config"] = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    else:  # the transformer alone, in float32
        arrays = {key: array.float() for key, array in load_file(path).items() if "first_stage_model" not in key}
        path = folder / "transformer.safetensors"
        save_file(arrays, path)
    return kind.from_single_file(str(path), **options).eval()


def velocity(model: torch.nn.Module, given: np.lib.npyio.NpzFile, flux: bool) -> np.ndarray:
    """Return the velocity (1, h, w, 16) at the inputs of ours.npz."""
    latent = torch.from_numpy(given["latent"]).permute(0, 3, 1, 2)
    _, _, height, width = latent.shape
    common = {
        "encoder_hidden_states": torch.from_numpy(given["text"]),
        "pooled_projections": torch.from_numpy(given["pooled"]),
    }
    timestep = torch.tensor([float(given["timestep"])])
    with torch.no_grad():
        if not flux:
            found = model(hidden_states=latent, timestep=timestep, **common).sample
            return found.permute(0, 2, 3, 1).numpy()
        rows, columns = height // 2, width // 2
        tokens = latent.reshape(1, 16, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, rows * columns, 64)
        ids = torch.zeros(rows, columns, 3)
        ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)[None]
        guidance = torch.tensor([float(given["guidance"])]) if model.config.guidance_embeds else None
        places = {"img_ids": ids.reshape(-1, 3), "txt_ids": torch.zeros(given["text"].shape[1], 3)}
        found = model(hidden_states=tokens, timestep=timestep / 1000, guidance=guidance, **common, **places).sample
        patches = found.reshape(1, rows, columns, 16, 2, 2).permute(0, 1, 4, 2, 5, 3)
        return patches.reshape(1, height, width, 16).numpy()


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return ‖found − expected‖ / ‖expected‖."""
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


def main() -> None:
    """Print a row for each folder; end with 1 where diffusers and ours differ by more than 5e-4."""
    print(f"diffusers {diffusers.__version__}, torch {torch.__version__}, float32")
    print(f"{'model':12} {'GGUF, to ours':>14} {'original, to ours':>18} {'GGUF to original, in diffusers':>31}")
    worst = 0.0
    for folder in map(Path, sys.argv[1:]):
        config = CONFIGS[folder.name.split("-")[0]]
        flux = config["_class_name"].startswith("Flux")
        with np.load(folder / "ours.npz") as given:
            found = {
                file: velocity(load(folder, file, config), given, flux)
                for file in ("model.gguf", "original.safetensors")
            }
            ours = [error(found["model.gguf"], given["gguf"]), error(found["original.safetensors"], given["original"])]
        print(f"{folder.name:12} {ours[0]:14.6f} {ours[1]:18.6f} {error(*found.values()):31.4f}")
        worst = max(worst, *ours)
    sys.exit(worst > 5e-4)


if __name__ == "__main__":
    main()
