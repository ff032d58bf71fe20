"""Write tests/references/emoji_modules.npz: velocity and image that PyTorch computes with the bundled model.

    pip install -r models/sd3-emoji/training/requirements.txt
    PYTHONPATH=models/sd3-emoji/training python tests/references/emoji_modules.py        # from the repository's root

The modules are those that models/sd3-emoji was trained with, an implementation of its own beside DiffusionKit's.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from autoencoder import Decoder
from config import TEXT_CHANNELS
from transformer import TextToImage

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
TOKENS = [[0, 1123, 2048, *[2048] * 13], [0, 900, 31, 77, 2048, *[2048] * 11]]
SIGMA = 0.7


def weights(part: str) -> dict[str, torch.Tensor]:
    """Read the float32 weights of one part of the bundled model, with channels first, as PyTorch has them."""
    tensors = load_file(ROOT / f"models/sd3-emoji/{part}.safetensors")
    tensors = {name: t.float().permute(0, 3, 1, 2) if t.ndim == 4 else t.float() for name, t in tensors.items()}
    if part == "mmdit":
        tensors["context_embedder.weight"] = tensors["context_embedder.weight"][:, :TEXT_CHANNELS]
    return tensors


def main() -> None:
    """Compute both, and write them with the inputs."""
    model, decoder = TextToImage(), Decoder()
    decoder.load_state_dict(weights("decoder"))
    for part in ("clip_l", "clip_g", "mmdit"):
        getattr(model, part).load_state_dict(weights(part))
    latents = np.random.default_rng(3).standard_normal((2, 16, 16, 16), np.float32)
    x = torch.tensor(latents).permute(0, 3, 1, 2)
    with torch.no_grad():
        velocity = model.velocity(x, torch.tensor(TOKENS), torch.tensor([SIGMA] * 2)).permute(0, 2, 3, 1)
        image = decoder(x[:1]).permute(0, 2, 3, 1)
    np.savez_compressed(
        FOLDER / "emoji_modules.npz", latents=latents, tokens=np.array(TOKENS), sigma=np.float32(SIGMA),
        velocity=velocity.numpy(), image=image.numpy(), torch=np.str_(torch.__version__),
    )  # fmt: skip


if __name__ == "__main__":
    main()
