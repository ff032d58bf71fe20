"""Name the blocks and linear layers of a transformer, reach their modules and dense weights, and run a block alone.

Each kind of block is a class: the multimodal blocks of SD3 and FLUX, and FLUX's unified ones.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from calibration_store.names import MULTIMODAL, UNIFIED, block_kind, block_of, input_owner, is_post_gelu, layer_role
from w4a8.model.diffusionkit import PositionalEncoding, unpatchify

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("fc1", "fc2")


@dataclass(frozen=True)
class Layer:
    """A linear layer of a block: y = x·Wᵀ + b, W (out, in)."""

    name: str  # mm0.img.attn.q_proj
    parent: nn.Module
    key: str  # the layer's key in its parent

    @property
    def module(self) -> nn.Module:
        """Return the module that computes the layer."""
        return self.parent[self.key]

    @property
    def block(self) -> str:
        """Return the name of the layer's block: mm0."""
        return block_of(self.name)

    @property
    def role(self) -> str:
        """Return the layer's role in its stream: attn.q_proj … mlp.fc2."""
        return layer_role(self.name)

    @property
    def input_owner(self) -> str:
        """Return the layer that stands for this one's input: q, k and v of a stream are given the same array."""
        return input_owner(self.name)

    @property
    def is_post_gelu(self) -> bool:
        """Return whether the layer's input comes out of a GELU."""
        return is_post_gelu(self.name)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (out, in) of the dense weight."""
        out, width = self.module.weight.shape
        return (out, width * 32 // self.module.bits) if self.is_packed else (out, width)

    @property
    def is_packed(self) -> bool:
        """Return whether the weight is packed codes."""
        return isinstance(self.module, nn.QuantizedLinear)

    @property
    def weight(self) -> mx.array:
        """Return the dense weight (out, in); a packed one is unpacked."""
        module = self.module
        if not self.is_packed:
            return module.weight
        return mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)

    @property
    def bias(self) -> mx.array | None:
        """Return the bias (out,), or None.

        None stands for a layer without one, and for fc2 of FLUX's unified blocks, whose bias DiffusionKit sets to 0 in
        every call.
        """
        unified = block_kind(self.block)[0] == UNIFIED
        return None if unified and self.role == "mlp.fc2" else self.module.get("bias")


@dataclass(frozen=True)
class Block(ABC):
    """A transformer block in its list. Subclasses say which streams it has."""

    prefix: ClassVar[str]  # of the names of these blocks
    attribute: ClassVar[str]  # the model's attribute that holds the list of these blocks

    mmdit: nn.Module
    blocks: list
    index: int

    @property
    def name(self) -> str:
        """Return the block's name, such as mm0 or uni0."""
        return f"{self.prefix}{self.index}"

    @property
    def module(self) -> nn.Module:
        """Return the module that computes the block."""
        return self.blocks[self.index]

    @property
    @abstractmethod
    def streams(self) -> dict[str, nn.Module]:
        """Return the transformer block of each stream by the prefix of its layers' names."""

    @property
    def layers(self) -> list[Layer]:
        """Return the linear layers in the order of the forward pass of each stream.

        The last multimodal block of SD3 has no text o_proj (an Identity stands there) and no text mlp; both are left
        out.
        """
        return [
            Layer(f"{prefix}.{part}.{key}", getattr(stream, part), key)
            for prefix, stream in self.streams.items()
            for part, keys in (("attn", ATTENTION_LINEARS), ("attn2", ATTENTION_LINEARS), ("mlp", MLP_LINEARS))
            for key in keys
            if key in stream.get(part, {}) and not isinstance(stream[part][key], nn.Identity)
        ]

    def run(self, tokens: Sequence[mx.array], modulation_input: mx.array) -> list[mx.array]:
        """Run the block on its own. Takes token arrays (R, tokens, 1, hidden), and returns those that it gives.

        modulation_input (R, 1, 1, hidden), pooled text plus timestep embedding, feeds the block's adaLN; every row may
        be of another prompt and step. Where positions are rotations, `note_latent_size` must have been called; else
        RuntimeError is raised.
        """
        for stream in self.streams.values():
            stream["_modulation_params"] = {0.0: stream.adaLN_modulation(modulation_input)}
        tokens = self.joined(tokens)
        given = self.module(*tokens, mx.zeros((1,)), positional_encodings=positions(self.mmdit, tokens))
        return [output for output in (given if isinstance(given, tuple) else (given,)) if output is not None]

    def joined(self, tokens: Sequence[mx.array]) -> Sequence[mx.array]:
        """Return the outputs of the block before in the form that this block takes."""
        return tokens


class MultimodalBlock(Block):
    """A block with streams for image and text tokens that meet in attention; the last one of SD3 gives no text.

    In the first blocks of SD3.5-Medium the image stream attends a second time, by itself (attn2).
    """

    prefix, attribute = MULTIMODAL, "multimodal_transformer_blocks"

    @property
    def streams(self) -> dict[str, nn.Module]:
        """Return the image and the text stream."""
        return {
            f"{self.name}.img": self.module.image_transformer_block,
            f"{self.name}.txt": self.module.text_transformer_block,
        }


class UnifiedBlock(Block):
    """A block with one stream of all tokens (FLUX)."""

    prefix, attribute = UNIFIED, "unified_transformer_blocks"

    @property
    def streams(self) -> dict[str, nn.Module]:
        """Return the only stream."""
        return {self.name: self.module.transformer_block}

    def joined(self, tokens: Sequence[mx.array]) -> Sequence[mx.array]:
        """Join the two outputs of the last multimodal block, text tokens first."""
        return [mx.concatenate([tokens[1], tokens[0]], axis=1)] if len(tokens) == 2 else tokens


BLOCK_KINDS: tuple[type[Block], ...] = (MultimodalBlock, UnifiedBlock)


def model_blocks(mmdit: nn.Module) -> dict[str, Block]:
    """Return every block by its name, in the order of the forward pass."""
    blocks = (
        kind(mmdit, blocks, index)
        for kind in BLOCK_KINDS
        for blocks in [mmdit.get(kind.attribute, [])]
        for index in range(len(blocks))
    )
    return {block.name: block for block in blocks}


def model_layers(mmdit: nn.Module) -> dict[str, Layer]:
    """Return every linear layer of the blocks by its name, in the order of the forward pass of each stream."""
    return {layer.name: layer for block in model_blocks(mmdit).values() for layer in block.layers}


def num_weights(layers: Iterable[Layer]) -> int:
    """Return the number of weights of these layers, biases not counted."""
    return sum(out * width for out, width in (layer.shape for layer in layers))


def half_dtype(mmdit: nn.Module) -> mx.Dtype:
    """Return the 16-bit dtype that a model is run in: FLUX's is bfloat16."""
    return mx.bfloat16 if mmdit.config.depth_unified else mx.float16


def note_latent_size(mmdit: nn.Module, latent_size: Sequence[int]) -> None:
    """Note the latent size (height, width) of the tokens that blocks are run with; FLUX's positions depend on it."""
    mmdit["_latent_size"] = tuple(latent_size)


def image_token_grid(mmdit: nn.Module) -> tuple[int, int]:
    """Return the rows and columns of image tokens. Raises RuntimeError where `note_latent_size` was not called."""
    if "_latent_size" not in mmdit:
        raise RuntimeError("note_latent_size says which latent size the tokens are of; call it before blocks run alone")
    height, width = mmdit["_latent_size"]
    return height // mmdit.config.patch_size, width // mmdit.config.patch_size


def positions(mmdit: nn.Module, tokens: Sequence[mx.array]) -> mx.array | None:
    """Return FLUX's positional_encodings for a block's tokens; None where the first tokens contain their positions."""
    if mmdit.config.pos_embed_type != PositionalEncoding.PreSDPARope:
        return None
    height, width = image_token_grid(mmdit)
    text = sum(array.shape[1] for array in tokens) - height * width
    return mmdit.pre_sdpa_rope(text_sequence_length=text, latent_image_resolution=(height, width))


def joined_patches(mmdit: nn.Module, patches: mx.array, height: int, width: int) -> mx.array:
    """Join the patches of `run_final_layer` to a velocity (R, height, width, 16), as the model's own pass does."""
    if mmdit.config.patchify_via_reshape:
        return mmdit.x_embedder.unpack(patches, (height, width))
    return unpatchify(patches, mmdit.config.patch_size, height, width, mmdit.config.vae_latent_dim)


def run_final_layer(mmdit: nn.Module, tokens: mx.array, modulation_input: mx.array) -> mx.array:
    """Compute the velocity, one patch for each image token (R, tokens, 1, patch² · 16), from the last block's tokens.

    tokens (R, tokens, 1, hidden); modulation_input (R, 1, 1, hidden), as `Block.run` takes it.
    """
    if mmdit.config.depth_unified:
        height, width = image_token_grid(mmdit)
        tokens = tokens[:, -height * width :]
    mmdit.final_layer["_modulation_params"] = {0.0: mmdit.final_layer.adaLN_modulation(modulation_input)}
    return mmdit.final_layer(tokens, mx.zeros((1,)))
