"""Define the text encoders and the transformer."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import CONFIG, HEADS, HIDDEN, LATENT_CHANNELS, PATCH, POSITIONS, TEXT_CHANNELS


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
    """Return an embedder of a vector, (B, inputs) -> (B, hidden), through its entry `mlp`."""
    return nn.ModuleDict({"mlp": Layers(nn.Linear(inputs, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN))})


def zeroed(linear: nn.Linear) -> nn.Linear:
    """Start a layer at zero, so that its branch is off when training begins."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def adaptive_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply LayerNorm with shift and scale from the conditioning."""
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
        """Return modulations, and queries, keys and values like x; x (B, tokens, hidden), condition (B, hidden)."""
        modulations = self.adaLN_modulation(condition)[:, None].chunk(self.modulations, -1)
        x = adaptive_norm(x, *modulations[:2])
        return modulations, [self.attn[name](x) for name in ("q_proj", "k_proj", "v_proj")]

    def after_attention(self, x: Tensor, mixed: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """Add the gated attention and MLP to x; x and mixed (B, tokens, hidden)."""
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
        """Embed time from 0 (image) to 1000 (noise), (B,) -> (B, hidden)."""
        angles = time[:, None] * torch.exp(-math.log(10000) * torch.arange(128, device=time.device) / 128)
        return self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], -1))

    def positions(self, h: int, w: int) -> Tensor:
        """Return the middle of the table of positions, (h w, hidden)."""
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
        """Predict noise minus image from latents with sigma (B,) of noise. T5's positions are zeros, as in SD3 without T5."""
        (states_l, pooled_l), (states_g, pooled_g) = self.clip_l(tokens), self.clip_g(tokens)
        text = torch.cat([states_l, states_g], -1)
        text = torch.cat([text, torch.zeros_like(text)], 1)
        return self.mmdit(latents, text, torch.cat([pooled_l, pooled_g], -1), 1000 * sigma)

    def forward(self, latents: Tensor, tokens: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        share = sigma[:, None, None, None]
        velocity = self.velocity((1 - share) * latents + share * noise, tokens, sigma)
        return ((velocity - (noise - latents)) ** 2).mean()
