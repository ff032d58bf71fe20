"""SD3.5-Medium's blocks (MMDiT-X): image tokens attend a second time, among themselves, with modulations of their own.

DiffusionKit lacks them. The reference is diffusers (SD3Transformer2DModel with dual_attention_layers, SD35AdaLayerNormZeroX);
tests/test_originals.py compares with its velocities.
"""

from dataclasses import dataclass

import mlx.core as mx

from w4a8.model.diffusionkit import Attention, MMDiT, MMDiTConfig, QKNorm, TransformerBlock, affine_transform

MODULATIONS = 9  # shift, scale and gate of the joint attention, of the MLP, and of the second attention


@dataclass
class TransformerSizes(MMDiTConfig):
    """DiffusionKit's config, and the number of the first blocks whose image stream attends a second time."""

    dual_attention_blocks: int = 0


class DualAttentionStream(TransformerBlock):
    """An image stream with a second attention, `attn2`."""

    def __init__(self, config: TransformerSizes):
        super().__init__(config, num_modulation_params=MODULATIONS)
        self.attn2 = Attention(config.hidden_size, config.num_heads)
        if config.use_qk_norm:
            self.qk_norm2 = QKNorm(self.per_head_dim)
        self.sdpa = mx.fast.scaled_dot_product_attention

    def pre_sdpa(self, tensor: mx.array, timestep: mx.array) -> dict[str, mx.array]:
        """Return what DiffusionKit's method does of tokens (rows, tokens, 1, hidden), and the second attention's output."""
        modulation = self._modulation_params[timestep.reshape(-1)[0].item()]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, shift2, scale2, gate2 = mx.split(
            modulation, MODULATIONS, -1
        )
        modulated, second = (
            affine_transform(tensor, shift=a, residual_scale=b, norm_module=self.norm1)
            for a, b in ((shift, scale), (shift2, scale2))
        )
        q, k, v = (self._joined(array) for array in self._heads(self.attn, self.get("qk_norm"), modulated))
        attended = self.sdpa(*self._heads(self.attn2, self.get("qk_norm2"), second), scale=self.per_head_dim**-0.5)
        return {
            "q": q, "k": k, "v": v, "modulated_pre_attention": modulated, "post_norm1_shift": shift,
            "post_norm1_residual_scale": scale, "post_attn_scale": gate, "post_norm2_shift": mlp_shift,
            "post_norm2_residual_scale": mlp_scale, "post_mlp_scale": mlp_gate,
            "second": gate2 * self.attn2.o_proj(self._joined(attended)),
        }  # fmt: skip

    def post_sdpa(self, residual: mx.array, sdpa_output: mx.array, **given: mx.array) -> mx.array:
        """Return what DiffusionKit's method does, after the second attention is added to the residual."""
        return super().post_sdpa(residual + given.pop("second"), sdpa_output, **given)

    def _heads(self, attention: Attention, norm: QKNorm | None, tokens: mx.array) -> list[mx.array]:
        """Return q, k and v, (rows, heads, tokens, channels)."""
        shape = (tokens.shape[0], -1, self.config.num_heads, self.per_head_dim)
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (layer(tokens).reshape(shape).transpose(0, 2, 1, 3) for layer in layers)
        return [*(norm(q, k) if norm is not None else (q, k)), v]

    def _joined(self, heads: mx.array) -> mx.array:
        """Return tokens (rows, tokens, 1, hidden) of heads (rows, heads, tokens, channels)."""
        return heads.transpose(0, 2, 1, 3).reshape(heads.shape[0], -1, 1, self.config.hidden_size)


def empty_transformer(config: TransformerSizes | MMDiTConfig) -> MMDiT:
    """Make DiffusionKit's transformer, with our image streams in the blocks that attend a second time."""
    model = MMDiT(config)
    for block in model.multimodal_transformer_blocks[: getattr(config, "dual_attention_blocks", 0)]:
        block.image_transformer_block = DualAttentionStream(config)
    return model
