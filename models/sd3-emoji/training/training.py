"""Hold the images on the device that trains, run the training loop, and export weights as DiffusionKit has them."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from autoencoder import AutoEncoder, Encoder
from files import reading
from transformer import TextToImage
from w4a8.cli import progress_bar


@dataclass(frozen=True)
class Dataset:
    """N images and their captions, on the device that trains."""

    images: Tensor  # (N, 3, 64, 64) float32
    tokens: Tensor  # (captions, 16) int64, the captions of the first image first
    caption_counts: Tensor  # (N,) int64
    empty: Tensor  # (16,) int64, the tokens of no caption at all

    @classmethod
    def load(cls, path: Path, device: str) -> "Dataset":
        """Read the file that `prepare` writes."""
        with reading(path, "`prepare` writes it"), np.load(path) as arrays:
            images = torch.tensor(arrays["images"], device=device).permute(0, 3, 1, 2).float() / 127.5 - 1
            names = ("tokens", "caption_counts", "empty")
            return cls(images, *(torch.tensor(arrays[name], dtype=torch.long, device=device) for name in names))

    def draw_images(self, count: int) -> Tensor:
        """Draw indices of `count` images, (count,)."""
        return torch.randint(len(self.images), (count,), device=self.images.device)

    def draw_tokens(self, index: Tensor) -> Tensor:
        """Draw one of the captions of each image, one in ten left empty for guidance: (B,) -> (B, 16)."""
        first = self.caption_counts.cumsum(0) - self.caption_counts
        counts = self.caption_counts[index]
        chosen = first[index] + (torch.rand(index.shape, device=index.device) * counts).long()
        is_empty = torch.rand(index.shape, device=index.device) < 0.1
        return torch.where(is_empty[:, None], self.empty, self.tokens[chosen])


def fit(
    model: nn.Module,
    batch_loss: Callable[[], Tensor],
    label: str,
    seconds: float,
    steps: int | None,
    *,
    peak_rate: float,
    warmup: int,
    weight_decay: float,
) -> Iterator[int]:
    """Train `model` on batches that `batch_loss` draws, for `steps` or else `seconds`; yield the number of steps done.

    The learning rate is a linear warm-up of `warmup` steps times a cosine. The first three steps, which compile, do
    not count in seconds.
    """
    device = next(model.parameters()).device.type
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=device == "cuda"
    )
    total, begin = steps or seconds, 0.0
    with progress_bar(math.ceil(total), label, "step" if steps else "s") as bar:
        for step in itertools.count():
            if step <= 3:
                if device == "cuda":
                    torch.cuda.synchronize()
                begin = time.monotonic()
            spent = min(step if steps else time.monotonic() - begin, total)
            bar.update(math.floor(spent) - bar.n)
            if spent == total:
                return
            cosine = 0.5 * (1 + math.cos(math.pi * spent / total)) + 1e-3
            optimizer.param_groups[0]["lr"] = peak_rate * min(1, (step + 1) / warmup) * cosine
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = batch_loss()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 100 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            yield step + 1


def train_autoencoder(data: Dataset, batch_size: int, use_compile: bool, seconds: float, steps: int | None):
    """Train the VAE."""
    model = AutoEncoder().to(data.images.device)
    loss = torch.compile(model) if use_compile else model

    def batch_loss() -> Tensor:
        return loss(data.images[data.draw_images(batch_size)])

    for _ in fit(model, batch_loss, "VAE", seconds, steps, peak_rate=2e-3, warmup=100, weight_decay=1e-4):
        pass
    return model


def train_text_to_image(
    data: Dataset, latents: Tensor, batch_size: int, use_compile: bool, seconds: float, steps: int | None
) -> TextToImage:
    """Train the text encoders and the transformer together; return a moving average of their weights.

    latents: (N, 16, 16, 16) with mean 0 and deviation 1.
    """
    model = TextToImage().to(latents.device)
    loss = torch.compile(model) if use_compile else model
    average = {name: weight.clone() for name, weight in model.state_dict().items()}

    def batch_loss() -> Tensor:
        index = data.draw_images(batch_size)
        sigma = torch.sigmoid(1.2 * torch.randn(batch_size, device=latents.device) + 0.2)
        return loss(latents[index], data.draw_tokens(index), sigma, torch.randn_like(latents[index]))

    for step in fit(model, batch_loss, "transformer", seconds, steps, peak_rate=1.5e-3, warmup=500, weight_decay=0.01):
        if step % 4 == 0:
            share = max(1 - 0.9985, 1 / (step / 4 + 1))
            torch._foreach_lerp_(list(average.values()), list(model.state_dict().values()), share)
    model.load_state_dict(average)
    return model


@torch.no_grad()
def encode_images(encoder: Encoder, images: Tensor) -> Tensor:
    """Return the latents' means, 256 images at a time."""
    return torch.cat([encoder(batch)[0] for batch in images.split(256)])


def exported(parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Return weights as DiffusionKit has them: `part.name`, float16, channels last in convolutions."""
    return {
        f"{part}.{name}": (weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight).half().contiguous().cpu()
        for part, module in parts.items()
        for name, weight in module.state_dict().items()
    }
