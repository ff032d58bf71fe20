"""Read the sizes of models/sd3-emoji, and name its tokens."""

import json
from pathlib import Path

# `bundle` measures `latent_format` anew.
CONFIG = json.loads((Path(__file__).resolve().parent.parent / "config.json").read_text())
CHANNELS, LATENT_CHANNELS = CONFIG["vae"]["block_out_channels"], CONFIG["mmdit"]["vae_latent_dim"]
HIDDEN, HEADS, PATCH = (CONFIG["mmdit"][key] for key in ("hidden_size", "num_heads", "patch_size"))
POSITIONS = CONFIG["mmdit"]["max_latent_resolution"]  # each way, in the table of position embeddings
TEXT_CHANNELS = CONFIG["mmdit"]["pooled_text_embed_dim"]
MAX_TOKENS = CONFIG["clip_l"]["max_length"]
START, END = "<|startoftext|>", "<|endoftext|>"
END_TOKEN = CONFIG["clip_l"]["vocab_size"] - 1  # CLIP pools at the largest id: the end token moves behind all others
