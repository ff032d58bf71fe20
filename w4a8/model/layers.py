"""What a block is, and what a layer is: names, modules, dense weights, how to run one on its own.

A kind of block is a class: the multimodal blocks of SD3 and FLUX, and FLUX's unified ones.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from calibration_store.names import MULTIMODAL, UNIFIED, block_of, input_owner, is_post_gelu, layer_role

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("fc1", "fc2")


@dataclass(frozen=True)
class Layer:
    """A linear layer of a block: y = x·Wᵀ + b, W (out, in)."""

    name: str  # mm0.img.attn.q_proj
    parent: nn.Module
    key: str  # of the layer in its parent

    @property
    def module(self) -> nn.Module:
        return self.parent[self.key]

    @property
    def block(self) -> str:
        return block_of(self.name)

    @property
    def role(self) -> str:
        """attn.q_proj … mlp.fc2"""
        return layer_role(self.name)

    @property
    def input_owner(self) -> str:
        """The layer that stands for this one's input: q, k and v of a stream are given the same array."""
        return input_owner(self.name)

    @property
    def is_post_gelu(self) -> bool:
        return is_post_gelu(self.name)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the dense weight."""
        out, width = self.module.weight.shape
        return (out, width * 32 // self.module.bits) if self.is_packed else (out, width)

    @property
    def is_packed(self) -> bool:
        return isinstance(self.module, nn.QuantizedLinear)

    @property
    def weight(self) -> mx.array:
        """The dense weight (out, in); a packed one is unpacked."""
        module = self.module
        if not self.is_packed:
            return module.weight
        return mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)

    @property
    def bias(self) -> mx.array | None:
        return self.module.get("bias")


@dataclass(frozen=True)
class Block(ABC):
    """A transformer block in its list. Subclasses say which streams it has."""

    prefix: ClassVar[str]
    attribute: ClassVar[str]  # of the model: the list of these blocks

    blocks: list
    index: int

    @property
    def name(self) -> str:
        return f"{self.prefix}{self.index}"

    @property
    def module(self) -> nn.Module:
        return self.blocks[self.index]

    @property
    @abstractmethod
    def streams(self) -> dict[str, nn.Module]:
        """What layers' names begin with -> the transformer block of a stream."""

    @property
    def layers(self) -> list[Layer]:
        """In the order of the forward pass of each stream.

        The last multimodal block of SD3 has no text o_proj (an Identity stands there) and no text mlp: they are left out.
        """
        return [
            Layer(f"{prefix}.{part}.{key}", getattr(stream, part), key)
            for prefix, stream in self.streams.items()
            for part, keys in (("attn", ATTENTION_LINEARS), ("mlp", MLP_LINEARS))
            for key in keys
            if key in getattr(stream, part, {}) and not isinstance(getattr(stream, part)[key], nn.Identity)
        ]

    def run(self, tokens: Sequence[mx.array], modulation_input: mx.array, **position: Any) -> list[mx.array]:
        """The block on its own: token arrays (R, tokens, 1, hidden) -> the same, as many as it gives.

        modulation_input (R, 1, 1, hidden), pooled text plus timestep embedding, feeds the block's adaLN; every row may
        be of another prompt and step. position: FLUX's positional_encodings.
        """
        for stream in self.streams.values():
            stream["_modulation_params"] = {0.0: stream.adaLN_modulation(modulation_input)}
        given = self.module(*tokens, mx.zeros((1,)), **position)
        return [output for output in (given if isinstance(given, tuple) else (given,)) if output is not None]


class MultimodalBlock(Block):
    """Image and text tokens in streams of their own, joined in attention; the last one of SD3 gives no text."""

    prefix, attribute = MULTIMODAL, "multimodal_transformer_blocks"

    @property
    def streams(self) -> dict[str, nn.Module]:
        return {
            f"{self.name}.img": self.module.image_transformer_block,
            f"{self.name}.txt": self.module.text_transformer_block,
        }


class UnifiedBlock(Block):
    """One stream of all tokens (FLUX)."""

    prefix, attribute = UNIFIED, "unified_transformer_blocks"

    @property
    def streams(self) -> dict[str, nn.Module]:
        return {self.name: self.module.transformer_block}


BLOCK_KINDS: tuple[type[Block], ...] = (MultimodalBlock, UnifiedBlock)


def model_blocks(mmdit: nn.Module) -> dict[str, Block]:
    """Every block by its name, in the order of the forward pass."""
    blocks = (
        kind(blocks, index)
        for kind in BLOCK_KINDS
        for blocks in [mmdit.get(kind.attribute, [])]
        for index in range(len(blocks))
    )
    return {block.name: block for block in blocks}


def model_layers(mmdit: nn.Module) -> dict[str, Layer]:
    """Every linear layer of the blocks by its name, in the order of the forward pass of each stream."""
    return {layer.name: layer for block in model_blocks(mmdit).values() for layer in block.layers}


def run_final_layer(mmdit: nn.Module, tokens: mx.array, modulation_input: mx.array) -> mx.array:
    """Image tokens of the last block -> the velocity, one patch a token (R, tokens, 1, patch² · 16)."""
    mmdit.final_layer["_modulation_params"] = {0.0: mmdit.final_layer.adaLN_modulation(modulation_input)}
    return mmdit.final_layer(tokens, mx.zeros((1,)))
