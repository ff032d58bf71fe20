"""Define the VAE."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import CHANNELS, CONFIG, LATENT_CHANNELS


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(CONFIG["vae"]["resnet_groups"], channels)


class Attention(nn.Module):
    """Self-attention with one head over the pixels of (B, channels, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.group_norm = group_norm(channels)
        self.query_proj = nn.Linear(channels, channels)
        self.key_proj = nn.Linear(channels, channels)
        self.value_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]
        mixed = F.scaled_dot_product_attention(self.query_proj(pixels), self.key_proj(pixels), self.value_proj(pixels))[
            :, 0
        ]
        return x + self.out_proj(mixed).transpose(1, 2).reshape(x.shape)


class ResnetBlock(nn.Module):
    """Two convolutions around a shortcut, (B, inputs, h, w) -> (B, outputs, h, w)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1 = group_norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = group_norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Linear(inputs, outputs) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + y


class ScaleBlock(nn.Module):
    """Some ResnetBlocks, then half the size (`scale` "down"), twice the size ("up") or the same (None)."""

    def __init__(self, inputs: int, outputs: int, depth: int, scale: str | None):
        super().__init__()
        self.scale = scale
        self.resnets = nn.Sequential(*(ResnetBlock(inputs if i == 0 else outputs, outputs) for i in range(depth)))
        if scale == "down":
            self.downsample = nn.Conv2d(outputs, outputs, 3, stride=2)
        if scale == "up":
            self.upsample = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets(x)
        if self.scale == "down":
            return self.downsample(F.pad(x, (0, 1, 0, 1)))
        if self.scale == "up":
            return self.upsample(F.interpolate(x, scale_factor=2, mode="nearest"))
        return x


def middle_blocks(channels: int) -> nn.Sequential:
    return nn.Sequential(ResnetBlock(channels, channels), Attention(channels), ResnetBlock(channels, channels))


class Encoder(nn.Module):
    """The encoder: images -> mean and log variance of their latents, both (B, 16, 16, 16)."""

    def __init__(self):
        super().__init__()
        depth, last = CONFIG["vae"]["encoder_layers_per_block"], len(CHANNELS) - 1
        self.conv_in = nn.Conv2d(3, CHANNELS[0], 3, padding=1)
        pairs = itertools.pairwise([CHANNELS[0], *CHANNELS])
        self.down_blocks = nn.Sequential(
            *(ScaleBlock(a, b, depth, "down" if i < last else None) for i, (a, b) in enumerate(pairs))
        )
        self.mid_blocks = middle_blocks(CHANNELS[-1])
        self.conv_norm_out = group_norm(CHANNELS[-1])
        self.conv_out = nn.Conv2d(CHANNELS[-1], 2 * LATENT_CHANNELS, 3, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.mid_blocks(self.down_blocks(self.conv_in(images)))
        return self.conv_out(F.silu(self.conv_norm_out(x))).chunk(2, 1)


class Decoder(nn.Module):
    """The decoder: latents -> images. The up blocks have DiffusionKit's order, and run from the last to the first."""

    def __init__(self):
        super().__init__()
        depth, last = CONFIG["vae"]["decoder_layers_per_block"], len(CHANNELS) - 1
        self.conv_in = nn.Conv2d(LATENT_CHANNELS, CHANNELS[-1], 3, padding=1)
        self.mid_blocks = middle_blocks(CHANNELS[-1])
        pairs = itertools.pairwise([CHANNELS[-1], *reversed(CHANNELS)])
        blocks = [ScaleBlock(a, b, depth, "up" if i < last else None) for i, (a, b) in enumerate(pairs)]
        self.up_blocks = nn.ModuleList(reversed(blocks))
        self.conv_norm_out = group_norm(CHANNELS[0])
        self.conv_out = nn.Conv2d(CHANNELS[0], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid_blocks(self.conv_in(latents))
        for block in reversed(self.up_blocks):
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoEncoder(nn.Module):
    """The VAE; calling it gives the loss of a batch of images: values, edges and a little KL divergence."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()

    def forward(self, images: Tensor) -> Tensor:
        mean, log_variance = self.encoder(images)
        log_variance = log_variance.clamp(-30, 20)
        error = self.decoder(mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)) - images
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        return error.abs().mean() + 0.5 * edges + 1e-4 * divergence
