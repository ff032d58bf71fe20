"""What tools/train_sd3_emoji.py is made of.

The modules have the names of DiffusionKit's MLX classes, so that their weights load there. Shapes: B images at once,
channels first; images (B, 3, 64, 64) within -1 … 1, latents (B, 16, 16, 16), token ids (B, 16).
"""
