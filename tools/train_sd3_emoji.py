"""How models/sd3-emoji was made: a small text-to-image model with SD3's architecture, trained from scratch on emoji.

python tools/train_sd3_emoji.py prepare package data           package: npm's emoji-datasource-google 16.0.0, unpacked
python tools/train_sd3_emoji.py train data run                 about 8 minutes on one H200
python tools/train_sd3_emoji.py bundle data run/weights.safetensors models/my-emoji

The modules have the names of DiffusionKit's MLX classes, so that their weights load there. Shapes: B images at once,
channels first; images (B, 3, 64, 64) within -1 … 1, latents (B, 16, 16, 16), token ids (B, 16).
"""

import contextlib
import itertools
import json
import math
import re
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from calibration_store import StoreError, atomic_file
from cli_options import StageCommand, progress_bar

DATA_FILE, TOKENIZER_FILE, WEIGHTS_FILE = "emoji.npz", "tokenizer.json", "weights.safetensors"
START, END = "<|startoftext|>", "<|endoftext|>"
CAPTIONS_PER_IMAGE = 4
PARTS = ("mmdit", "clip_l", "clip_g", "decoder", "encoder")
SKIN_TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium dark skin tone",
    "1F3FF": "dark skin tone",
}
CONFIG = json.loads((ROOT / "models/sd3-emoji/config.json").read_text())  # the sizes; `latent_format` is measured anew
CHANNELS, LATENT_CHANNELS = CONFIG["vae"]["block_out_channels"], CONFIG["mmdit"]["vae_latent_dim"]
HIDDEN, HEADS, PATCH = (CONFIG["mmdit"][key] for key in ("hidden_size", "num_heads", "patch_size"))
POSITIONS = CONFIG["mmdit"]["max_latent_resolution"]  # each way, in the table of position embeddings
TEXT_CHANNELS = CONFIG["mmdit"]["pooled_text_embed_dim"]
MAX_TOKENS = CONFIG["clip_l"]["max_length"]
END_TOKEN = CONFIG["clip_l"]["vocab_size"] - 1  # CLIP pools at the largest id: the end token moves behind all others


class CommandGroup(StageCommand, click.Group):
    """Subcommands whose errors are one line, like the stages'."""


@contextlib.contextmanager
def reading(path: Path, source: str) -> Iterator[None]:
    """Turn whatever is wrong with an input file into one line; `source` says where it comes from."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or error
        raise StoreError(f"cannot read {path}: {reason} ({source})") from None


# --- data ---------------------------------------------------------------------------------------------------


def clean_caption(name: str) -> str:
    """Lower-case words and digits, one space between them."""
    return " ".join(re.sub(r"[^a-z0-9]", " ", name.lower()).split())


def captioned_files(entries: Sequence[dict]) -> Iterator[tuple[str, list[str]]]:
    """File name and sorted captions of every emoji and skin tone that Google drew."""
    for entry in entries:
        if not entry.get("has_img_google"):
            continue
        names = [entry["name"] or entry["short_name"], *entry["short_names"]]
        captions = sorted({clean_caption(name) for name in names} - {""})
        yield entry["image"], captions
        for code, variation in entry.get("skin_variations", {}).items():
            tones = dict.fromkeys(SKIN_TONES[part] for part in code.split("-") if part in SKIN_TONES)
            if variation.get("has_img_google"):
                yield variation["image"], [f"{caption} {' and '.join(tones)}" for caption in captions]


def read_image(path: Path) -> np.ndarray:
    """A PNG on white, (64, 64, 3) uint8."""
    from PIL import Image

    size = tuple(CONFIG["image_size"])
    with Image.open(path) as file:
        picture = file.convert("RGBA").resize(size, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", size, "white")
    canvas.alpha_composite(picture)
    return np.asarray(canvas.convert("RGB"))


def train_tokenizer(captions: Sequence[str]):
    """Byte-pair encoding of at most 2,048 tokens, words ending in `</w>` as CLIP's do.

    The trainer numbers letters at word ends in random order, and numbers decide between pairs equally frequent. As
    "special" tokens they have fixed numbers; special they must not stay, or every letter would be a word.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    letters = sorted({letter for caption in captions for letter in caption} - {" "})
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = [START, END, *letters, *(f"{letter}</w>" for letter in letters)]
    trainer = trainers.BpeTrainer(
        vocab_size=END_TOKEN, special_tokens=tokens, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    return Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | {"added_tokens": []}))


def encode_caption(tokenizer, caption: str) -> list[int]:
    """Start token, the caption, and end tokens up to 16."""
    ids = [tokenizer.token_to_id(START), *tokenizer.encode(caption).ids[: MAX_TOKENS - 2]]
    return ids + [END_TOKEN] * (MAX_TOKENS - len(ids))


@dataclass(frozen=True)
class Dataset:
    """N images and what they are called, on the device that trains."""

    images: Tensor  # (N, 3, 64, 64) float32
    tokens: Tensor  # (captions, 16) int64, the captions of the first image first
    caption_counts: Tensor  # (N,) int64
    empty: Tensor  # (16,) int64, the tokens of no caption at all

    @classmethod
    def load(cls, path: Path, device: str) -> "Dataset":
        with reading(path, "`prepare` writes it"), np.load(path) as arrays:
            images = torch.tensor(arrays["images"], device=device).permute(0, 3, 1, 2).float() / 127.5 - 1
            names = ("tokens", "caption_counts", "empty")
            return cls(images, *(torch.tensor(arrays[name], dtype=torch.long, device=device) for name in names))

    def draw_images(self, count: int) -> Tensor:
        """Indices of `count` images, (count,)."""
        return torch.randint(len(self.images), (count,), device=self.images.device)

    def draw_tokens(self, index: Tensor) -> Tensor:
        """One of the captions of each image at random, one in ten left empty for guidance: (B,) -> (B, 16)."""
        first = self.caption_counts.cumsum(0) - self.caption_counts
        counts = self.caption_counts[index]
        chosen = first[index] + (torch.rand(index.shape, device=index.device) * counts).long()
        is_empty = torch.rand(index.shape, device=index.device) < 0.1
        return torch.where(is_empty[:, None], self.empty, self.tokens[chosen])


# --- VAE ----------------------------------------------------------------------------------------------------


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
    """Images -> mean and log variance of their latents, both (B, 16, 16, 16)."""

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
    """Latents -> images. The up blocks are kept in DiffusionKit's order and run from the last to the first."""

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


# --- text encoders and transformer --------------------------------------------------------------------------


class TextLayer(nn.Module):
    """A causal transformer layer of CLIP, (B, tokens, channels)."""

    def __init__(self, channels: int, heads: int, activation: str):
        super().__init__()
        self.heads, self.activation = heads, activation
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        names = ("query_proj", "key_proj", "value_proj", "out_proj")
        self.attention = nn.ModuleDict({name: nn.Linear(channels, channels) for name in names})
        self.linear1 = nn.Linear(channels, 4 * channels)
        self.linear2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer_norm1(x)
        q, k, v = (
            self.attention[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("query_proj", "key_proj", "value_proj")
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.attention["out_proj"](y)
        y = self.linear1(self.layer_norm2(x))
        y = y * torch.sigmoid(1.702 * y) if self.activation == "quick_gelu" else F.gelu(y)
        return x + self.linear2(y)


class TextEncoder(nn.Module):
    """CLIP's text half: ids -> the last layer but one (B, 16, channels) and the end token, projected (B, channels)."""

    def __init__(self, config: dict):
        super().__init__()
        channels = config["model_dims"]
        self.token_embedding = nn.Embedding(config["vocab_size"], channels)
        self.position_embedding = nn.Embedding(config["max_length"], channels)
        layers = (TextLayer(channels, config["num_heads"], config["hidden_act"]) for _ in range(config["num_layers"]))
        self.layers = nn.ModuleList(layers)
        self.final_layer_norm = nn.LayerNorm(channels)
        self.text_projection = nn.Linear(channels, config["projection_dim"], bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        states = [self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]]
        for layer in self.layers:
            states.append(layer(states[-1]))
        end = tokens.argmax(-1)  # the first of the largest id
        pooled = self.final_layer_norm(states[-1])[torch.arange(len(tokens), device=tokens.device), end]
        return states[-2], self.text_projection(pooled)


class Layers(nn.Module):
    """nn.Sequential under the names that MLX gives its modules: layers.0, layers.1, …"""

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def embedder(inputs: int) -> nn.ModuleDict:
    """A vector (B, inputs) -> (B, hidden), through its entry `mlp`."""
    return nn.ModuleDict({"mlp": Layers(nn.Linear(inputs, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN))})


def zeroed(linear: nn.Linear) -> nn.Linear:
    """Start a layer at zero, so that its branch is off when training begins."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def adaptive_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm whose shift and scale come from the conditioning."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class TransformerBlock(nn.Module):
    """One stream's half of a multimodal block; `last` leaves out what comes after attention."""

    def __init__(self, last: bool = False):
        super().__init__()
        self.attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(HIDDEN, HIDDEN),
                "k_proj": nn.Linear(HIDDEN, HIDDEN, bias=False),
                "v_proj": nn.Linear(HIDDEN, HIDDEN),
            }
        )
        if not last:
            self.attn["o_proj"] = nn.Linear(HIDDEN, HIDDEN)
            self.mlp = nn.ModuleDict({"fc1": nn.Linear(HIDDEN, 4 * HIDDEN), "fc2": nn.Linear(4 * HIDDEN, HIDDEN)})
        self.modulations = 2 if last else 6
        self.adaLN_modulation = Layers(nn.SiLU(), zeroed(nn.Linear(HIDDEN, self.modulations * HIDDEN)))

    def before_attention(self, x: Tensor, condition: Tensor) -> tuple[Sequence[Tensor], list[Tensor]]:
        """x (B, tokens, hidden), condition (B, hidden) -> modulations, and queries, keys and values like x."""
        modulations = self.adaLN_modulation(condition)[:, None].chunk(self.modulations, -1)
        x = adaptive_norm(x, *modulations[:2])
        return modulations, [self.attn[name](x) for name in ("q_proj", "k_proj", "v_proj")]

    def after_attention(self, x: Tensor, mixed: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """x and what attention made of it, both (B, tokens, hidden) -> the same."""
        _, _, attention_gate, shift, scale, mlp_gate = modulations
        x = x + attention_gate * self.attn["o_proj"](mixed)
        return x + mlp_gate * self.mlp["fc2"](F.gelu(self.mlp["fc1"](adaptive_norm(x, shift, scale))))


class MultimodalBlock(nn.Module):
    """Image and text tokens with weights of their own and one attention over both; the last block drops the text."""

    def __init__(self, last: bool):
        super().__init__()
        self.last = last
        self.image_transformer_block = TransformerBlock()
        self.text_transformer_block = TransformerBlock(last)

    def forward(self, image: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        image_modulations, image_qkv = self.image_transformer_block.before_attention(image, condition)
        text_modulations, text_qkv = self.text_transformer_block.before_attention(text, condition)
        q, k, v = (
            torch.cat(pair, 1).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for pair in zip(image_qkv, text_qkv, strict=True)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        image_mixed, text_mixed = mixed.split([image.shape[1], text.shape[1]], 1)
        image = self.image_transformer_block.after_attention(image, image_mixed, image_modulations)
        if self.last:
            return image, None
        return image, self.text_transformer_block.after_attention(text, text_mixed, text_modulations)


class MMDiT(nn.Module):
    """SD3's transformer: latents, text tokens (B, tokens, 320), pooled text (B, 320), time (B,) -> velocity."""

    def __init__(self):
        super().__init__()
        depth, positions = CONFIG["mmdit"]["depth_multimodal"], nn.Embedding(POSITIONS**2, HIDDEN)
        nn.init.normal_(positions.weight, std=0.02)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(LATENT_CHANNELS, HIDDEN, PATCH, PATCH)})
        self.x_pos_embedder = nn.ModuleDict({"pos_embed": positions})
        self.y_embedder, self.t_embedder = embedder(TEXT_CHANNELS), embedder(256)
        self.context_embedder = nn.Linear(TEXT_CHANNELS, HIDDEN)
        self.multimodal_transformer_blocks = nn.ModuleList(MultimodalBlock(i == depth - 1) for i in range(depth))
        self.final_layer = nn.ModuleDict(
            {
                "linear": zeroed(nn.Linear(HIDDEN, PATCH**2 * LATENT_CHANNELS)),
                "adaLN_modulation": Layers(nn.SiLU(), zeroed(nn.Linear(HIDDEN, 2 * HIDDEN))),
            }
        )

    def embed_time(self, time: Tensor) -> Tensor:
        """Time from 0 (image) to 1000 (noise), (B,) -> (B, hidden)."""
        angles = time[:, None] * torch.exp(-math.log(10000) * torch.arange(128, device=time.device) / 128)
        return self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], -1))

    def positions(self, h: int, w: int) -> Tensor:
        """The middle of the table of positions, (h w, hidden)."""
        top, left = (POSITIONS - h) // 2, (POSITIONS - w) // 2
        table = self.x_pos_embedder["pos_embed"].weight.view(POSITIONS, POSITIONS, HIDDEN)
        return table[top : top + h, left : left + w].flatten(0, 1)

    def forward(self, latents: Tensor, text: Tensor, pooled: Tensor, time: Tensor) -> Tensor:
        condition = self.y_embedder["mlp"](pooled) + self.embed_time(time)
        patches = self.x_embedder["proj"](latents)
        h, w = patches.shape[2:]
        x, text = patches.flatten(2).transpose(1, 2) + self.positions(h, w), self.context_embedder(text)
        for block in self.multimodal_transformer_blocks:
            x, text = block(x, text, condition)
        x = adaptive_norm(x, *self.final_layer["adaLN_modulation"](condition)[:, None].chunk(2, -1))
        x = self.final_layer["linear"](x).view(-1, h, w, PATCH, PATCH, LATENT_CHANNELS)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(latents.shape)


class TextToImage(nn.Module):
    """Both text encoders and the transformer; calling it gives the loss of rectified flow."""

    def __init__(self):
        super().__init__()
        self.clip_l, self.clip_g = TextEncoder(CONFIG["clip_l"]), TextEncoder(CONFIG["clip_g"])
        self.mmdit = MMDiT()

    def velocity(self, latents: Tensor, tokens: Tensor, sigma: Tensor) -> Tensor:
        """Latents with sigma (B,) of noise -> noise minus image. As in SD3 without T5, T5's positions are zeros."""
        (states_l, pooled_l), (states_g, pooled_g) = self.clip_l(tokens), self.clip_g(tokens)
        text = torch.cat([states_l, states_g], -1)
        text = torch.cat([text, torch.zeros_like(text)], 1)
        return self.mmdit(latents, text, torch.cat([pooled_l, pooled_g], -1), 1000 * sigma)

    def forward(self, latents: Tensor, tokens: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        share = sigma[:, None, None, None]
        velocity = self.velocity((1 - share) * latents + share * noise, tokens, sigma)
        return ((velocity - (noise - latents)) ** 2).mean()


# --- training -----------------------------------------------------------------------------------------------


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
    """Train `model` on batches that `batch_loss` draws, for `steps` or else `seconds`; yields the number of steps done.

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
    """The VAE, trained."""
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
    """The text encoders and the transformer, trained together: a moving average of their weights.

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
    """The latents' means, 256 images at a time."""
    return torch.cat([encoder(batch)[0] for batch in images.split(256)])


def exported(parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Weights as DiffusionKit has them: `part.name`, float16, channels last in convolutions."""
    return {
        f"{part}.{name}": (weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight).half().contiguous().cpu()
        for part, module in parts.items()
        for name, weight in module.state_dict().items()
    }


# --- commands -----------------------------------------------------------------------------------------------


def folder_argument(name: str):
    return click.argument(name, type=click.Path(path_type=Path, file_okay=False))


def write_file(path: Path, content: str | bytes) -> None:
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@click.group(
    cls=CommandGroup,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
def main() -> None:
    """Make a model like models/sd3-emoji: prepare the data, train, bundle the folder."""


@main.command()
@folder_argument("package")
@folder_argument("output")
def prepare(package: Path, output: Path) -> None:
    """Emoji and their names -> OUTPUT/emoji.npz and OUTPUT/tokenizer.json.

    PACKAGE is the unpacked npm package emoji-datasource-google 16.0.0.
    """
    source = "PACKAGE is npm's emoji-datasource-google 16.0.0, unpacked"
    with reading(package / "emoji.json", source):
        files = list(captioned_files(json.loads((package / "emoji.json").read_text(encoding="utf-8"))))
    images, captions = [], []
    for name, names in files:
        path = package / "img/google/64" / name
        if path.exists():
            with reading(path, source):
                images.append(read_image(path))
            captions.append(names)
    if not images:
        raise StoreError(f"{package / 'img/google/64'}: no image that emoji.json names ({source})")
    tokenizer = train_tokenizer([caption for names in captions for caption in names])
    used = [names[:CAPTIONS_PER_IMAGE] for names in captions]
    with atomic_file(output / DATA_FILE) as file:
        np.savez_compressed(
            file,
            images=np.stack(images),
            tokens=np.array([encode_caption(tokenizer, caption) for names in used for caption in names], np.int32),
            caption_counts=np.array([len(names) for names in used], np.int32),
            empty=np.array(encode_caption(tokenizer, ""), np.int32),
            captions=np.array([names[0] for names in captions]),
        )
    write_file(output / TOKENIZER_FILE, tokenizer.to_str())
    click.echo(f"wrote {output / DATA_FILE} ({len(images)} images) and {output / TOKENIZER_FILE}")


@main.command()
@folder_argument("data")
@folder_argument("output")
@click.option("--vae-seconds", type=click.FloatRange(0, min_open=True), default=100, help="Time to train the VAE.")
@click.option(
    "--transformer-seconds", type=click.FloatRange(0, min_open=True), default=360, help="Time to train the rest."
)
@click.option("--vae-steps", type=click.IntRange(1), help="Train the VAE for so many steps instead of seconds.")
@click.option(
    "--transformer-steps", type=click.IntRange(1), help="Train the rest for so many steps instead of seconds."
)
@click.option("--batch-size", type=click.IntRange(1), default=1024, help="Images in a step of the transformer.")
@click.option("--vae-batch-size", type=click.IntRange(1), default=256, help="Images in a step of the VAE.")
@click.option("--compile/--no-compile", "use_compile", default=True, help="Compile the models first.")
@click.option("--seed", type=int, default=0, help="Weights, batches and noise; with steps, a CPU gives the same bytes.")
def train(
    data: Path,
    output: Path,
    vae_seconds: float,
    transformer_seconds: float,
    vae_steps: int | None,
    transformer_steps: int | None,
    batch_size: int,
    vae_batch_size: int,
    use_compile: bool,
    seed: int,
) -> None:
    """Train on DATA, the output of `prepare` -> OUTPUT/weights.safetensors.

    Uses the GPU if PyTorch sees one. The defaults are those of models/sd3-emoji.
    """
    from safetensors.torch import save

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    torch.manual_seed(seed)
    dataset = Dataset.load(data / DATA_FILE, device)
    with atomic_file(output / WEIGHTS_FILE) as file:  # opened first: a folder that cannot be written shows at once
        vae = train_autoencoder(dataset, vae_batch_size, use_compile, vae_seconds, vae_steps)
        latents = encode_images(vae.encoder, dataset.images)
        mean, deviation = latents.mean(), latents.std()
        latents = (latents - mean) / deviation
        model = train_text_to_image(dataset, latents, batch_size, use_compile, transformer_seconds, transformer_steps)
        parts = (model.mmdit, model.clip_l, model.clip_g, vae.decoder, vae.encoder)
        statistics = {"latent_mean": mean.cpu(), "latent_deviation": deviation.cpu()}
        file.write(save(exported(dict(zip(PARTS, parts, strict=True))) | statistics))
    click.echo(f"wrote {output / WEIGHTS_FILE}")


@main.command()
@folder_argument("data")
@click.argument("weights", type=click.Path(path_type=Path, dir_okay=False))
@folder_argument("output")
def bundle(data: Path, weights: Path, output: Path) -> None:
    """WEIGHTS, the file of `train`, and DATA, the output of `prepare` -> the model folder OUTPUT."""
    from safetensors import SafetensorError
    from safetensors.numpy import load, save

    try:
        with reading(weights, "`train` writes it"):
            tensors = load(weights.read_bytes())
            mean, deviation = (float(tensors.pop(f"latent_{name}")) for name in ("mean", "deviation"))
            context = tensors["mmdit.context_embedder.weight"]
    except SafetensorError as error:
        raise StoreError(f"cannot read {weights}: {error} (`train` writes it)") from None
    with reading(data / TOKENIZER_FILE, "`prepare` writes it"):
        tokenizer = json.loads((data / TOKENIZER_FILE).read_text(encoding="utf-8"))["model"]
        vocabulary = {token: index for token, index in tokenizer["vocab"].items() if token != END} | {END: END_TOKEN}
        merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in tokenizer["merges"])])
    with reading(data / DATA_FILE, "`prepare` writes it"), np.load(data / DATA_FILE) as arrays:
        captions = sorted(set(arrays["captions"].tolist()))
    # DiffusionKit pads text features with zeros to SD3's 4,096 channels
    padding = CONFIG["mmdit"]["token_level_text_embed_dim"] - context.shape[1]
    tensors["mmdit.context_embedder.weight"] = np.pad(context, [(0, 0), (0, padding)])
    for part in PARTS:
        prefix = f"{part}."
        write_file(
            output / f"{part}.safetensors",
            save({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}),
        )
    config = CONFIG | {"latent_format": {"scale_factor": 1 / deviation, "shift_factor": mean}}
    config |= {key: {"pad_with_eos": True} for key in ("tokenizer_l", "tokenizer_g")}  # as encode_caption pads
    write_file(output / "config.json", json.dumps(config, indent=2))
    write_file(output / "vocab.json", json.dumps(vocabulary, ensure_ascii=False, indent=0))
    write_file(output / "merges.txt", merges + "\n")
    write_file(output / "captions.txt", "\n".join(captions) + "\n")
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
