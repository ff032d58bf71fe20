"""Write the velocities of diffusers' transformers, which tests/test_originals.py compares ours with.

    python tests/references/diffusers_transformers.py     # in an environment with torch and diffusers 0.42.1

Each model is SD3Transformer2DModel or FluxTransformer2DModel at a tiny size, in float32. Weights and inputs are drawn
from their names (`drawn`), so that the file holds nothing but the velocities; biases are as large as 0.5.
"""

import zlib
from pathlib import Path

import numpy as np

REFERENCE = Path(__file__).parent / "diffusers_transformers.npz"
HEADS, HEAD, LAYERS, TEXT, SIDES = 2, 64, 2, 7, (8, 12)
TIMESTEP, GUIDANCE = 610.0, 3.5
SD3 = {"sample_size": 64, "patch_size": 2, "in_channels": 16, "num_layers": LAYERS, "attention_head_dim": HEAD,
       "num_attention_heads": HEADS, "joint_attention_dim": 4096, "caption_projection_dim": HEADS * HEAD,
       "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 64}  # fmt: skip
FLUX = {"patch_size": 1, "in_channels": 64, "num_layers": LAYERS, "num_single_layers": LAYERS, "attention_head_dim": HEAD,
        "num_attention_heads": HEADS, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
        "axes_dims_rope": (8, 28, 28)}  # fmt: skip
MODELS = {  # name -> (class of diffusers, its options)
    "sd3": ("SD3Transformer2DModel", SD3),
    "sd3.5-large": ("SD3Transformer2DModel", SD3 | {"qk_norm": "rms_norm"}),
    "sd3.5-medium": ("SD3Transformer2DModel", SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}),
    "flux-schnell": ("FluxTransformer2DModel", FLUX | {"guidance_embeds": False}),
    "flux-dev": ("FluxTransformer2DModel", FLUX | {"guidance_embeds": True}),
}


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw a weight or an input from its name: biases of 0.5, norms about 1, matrices of unit gain; float32."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    values = random.standard_normal(shape)
    if name.endswith(".bias"):
        values *= 0.5
    elif name.endswith(".weight"):
        values = 1 + 0.2 * values if len(shape) == 1 else values / np.sqrt(np.prod(shape[1:]))
    return values.astype(np.float32)


def main() -> None:
    """Compute every model's velocity and write the reference."""
    import diffusers
    import torch

    found = {}
    for name, (kind, options) in MODELS.items():
        model = getattr(diffusers, kind)(**options).eval()
        state = {key: torch.from_numpy(drawn(key, tuple(array.shape))) for key, array in model.state_dict().items()}
        model.load_state_dict(state)
        height, width = SIDES
        text = torch.from_numpy(drawn("input text", (1, TEXT, 4096)))
        with torch.no_grad():
            if kind.startswith("SD3"):
                velocity = model(
                    hidden_states=torch.from_numpy(drawn("input latent", (1, 16, height, width))),
                    encoder_hidden_states=text,
                    pooled_projections=torch.from_numpy(drawn("input pooled", (1, 2048))),
                    timestep=torch.tensor([TIMESTEP]),
                ).sample
            else:
                ids = torch.zeros(height // 2, width // 2, 3)
                ids[..., 1], ids[..., 2] = torch.arange(height // 2)[:, None], torch.arange(width // 2)[None]
                velocity = model(
                    hidden_states=torch.from_numpy(drawn("input tokens", (1, height * width // 4, 64))),
                    encoder_hidden_states=text,
                    pooled_projections=torch.from_numpy(drawn("input pooled", (1, 768))),
                    timestep=torch.tensor([TIMESTEP / 1000]),
                    guidance=torch.tensor([GUIDANCE]) if options["guidance_embeds"] else None,
                    txt_ids=torch.zeros(TEXT, 3),
                    img_ids=ids.reshape(-1, 3),
                ).sample
        found[name] = velocity.numpy()
        found[f"{name} keys"] = np.array(sorted(f"{key} {tuple(array.shape)}" for key, array in state.items()))
    np.savez_compressed(REFERENCE, **found, diffusers=diffusers.__version__)
    print({name: array.shape for name, array in found.items()})


if __name__ == "__main__":
    main()
