"""What a quantized model is: where the quantized weights come from, which modules they belong to, and how they get there.

Stage 3W trains it, stages 4 and 5 measure and export it: the same objects.
"""

import contextlib
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from calibration_store.errors import OptionError, StoreError
from calibration_store.layout import WeightPaths
from calibration_store.names import block_of
from calibration_store.weights import WEIGHTS_METADATA, read_quantized_block
from w4a8.backend.parallel import on_every_core
from w4a8.model.layers import Layer, model_layers
from w4a8.model.parts import TRANSFORMER, Pipeline
from w4a8.quantized.layer import QuantizedLayer

GROUPS_OF_THE_REST = 64


@dataclass(frozen=True)
class OtherLayers:
    """What else is quantized, to nearest in groups of 64: adaLN and embedders, or every linear layer there is."""

    bits: int
    all_linears: bool = False

    def includes(self, path: str, module: nn.Module) -> bool:
        """Whether a module outside the blocks' layers is quantized."""
        if self.all_linears:
            return isinstance(module, nn.Linear)
        table = isinstance(module, nn.Embedding)
        return table or (isinstance(module, nn.Linear) and re.search("adaLN|embedder", path) is not None)


class Weights(ABC):
    """Quantized weights of a model; `sources` are the files they follow from, made_from what these say of their run."""

    bits: int
    group_size: int
    other_layers: OtherLayers | None
    sources: list[Path]
    made_from: list[tuple[Path, Mapping[str, Any]]]
    remedy: str  # what to run for files of another run
    excluded: Sequence[str] = ()  # layers that stay as they are

    @property
    def uniform(self) -> bool:
        """Whether every layer has the same bits."""
        return True

    def bits_of(self, layer: str) -> int:
        """Of a layer's codes."""
        return self.bits

    @abstractmethod
    def check(self, variant: str, layers: Mapping[str, Layer]) -> None:
        """Whether they are of this model, all of its layers. Raises a UserError that names the variant."""

    @abstractmethod
    def in_place(self, pipeline: Pipeline) -> AbstractContextManager[None]:
        """In the pipeline's transformer, until the block ends."""


class Codes(Weights):
    """Weights that are made from the original model's, a layer at a time."""

    @abstractmethod
    def quantized(self, layers: Mapping[str, Layer]) -> Iterator[tuple[str, QuantizedLayer]]:
        """(name, quantized layer) one after the other."""

    @contextlib.contextmanager
    def in_place(self, pipeline: Pipeline) -> Iterator[None]:
        """Layer for layer in place of the original's, which is read again afterwards: never two models in memory."""
        try:
            put_in_place(pipeline.mmdit, self)
            yield
        finally:
            pipeline.drop(TRANSFORMER)


@dataclass(frozen=True)
class NearestWeights(Codes):
    """Round-to-nearest, from the model alone."""

    bits: int
    group_size: int
    other_layers: OtherLayers | None = None
    sources: tuple = ()
    made_from: tuple = ()
    remedy: str = ""

    def check(self, variant: str, layers: Mapping[str, Layer]) -> None:
        for name, layer in layers.items():
            width = layer.shape[1]
            if self.group_size and width % self.group_size:
                raise OptionError(f"{variant}: groups of {self.group_size} do not divide the {width} inputs of {name}")

    def quantized(self, layers: Mapping[str, Layer]) -> Iterator[tuple[str, QuantizedLayer]]:
        for _, names in itertools.groupby(layers, lambda name: layers[name].block):  # a block in memory at a time
            dense = {name: np.array(layers[name].weight.astype(mx.float32)) for name in names}
            nearest = on_every_core(
                lambda weight: QuantizedLayer.nearest(weight, self.bits, self.group_size), dense.values()
            )
            yield from zip(dense, nearest, strict=True)


class StoredWeights(Codes):
    """What stage 3W, or GPTQ, left in adaround_weights/; a block in memory at a time."""

    remedy = "run cache_adaround_data.py and optimize_adaround.py with --force"

    def __init__(self, calib_dir: Path, other_layers: OtherLayers | None = None):
        self.other_layers = other_layers
        self.paths = WeightPaths(calib_dir)
        self.metadata = WEIGHTS_METADATA.read(self.paths.metadata)
        self.bits: int = self.metadata["weight_bits"]
        self.activation_bits: int = self.metadata["activation_bits"]
        self.group_size: int = self.metadata["group_size"]
        self.excluded = self.metadata.get("excluded", [])
        self._bits_of = self.metadata.get("layer_bits", {})
        self.sources = [self.paths.metadata, *(self.paths.block(block) for block in self.metadata["block_names"])]
        self.made_from = [(self.paths.metadata, self.metadata)]

    @property
    def uniform(self) -> bool:
        return not self._bits_of and not self.excluded

    def bits_of(self, layer: str) -> int:
        return self._bits_of.get(layer, self.bits)

    def fields(self) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """(layer, everything that its block's file says of it)."""
        for block in self.metadata["block_names"]:
            yield from read_quantized_block(self.paths, block, self.metadata).items()

    def check(self, variant: str, layers: Mapping[str, Layer]) -> None:
        names = set()
        for name, fields in self.fields():
            names.add(name)
            if name not in layers or fields["q"].shape != layers[name].shape:
                path = self.paths.block(block_of(name))
                raise StoreError(f"{path}: {name} {fields['q'].shape} is not the model's")
        check_coverage(variant, "adaround_weights", names | set(self.excluded), layers)

    def quantized(self, layers: Mapping[str, Layer]) -> Iterator[tuple[str, QuantizedLayer]]:
        for name, fields in self.fields():
            yield name, QuantizedLayer.of_fields(fields)


def check_coverage(variant: str, where: str, names: set[str], layers: Mapping[str, Layer]) -> None:
    """Raise StoreError unless the names are those of the model's layers."""
    extra = sorted(names - layers.keys())
    if extra:
        raise StoreError(f"{variant}: its files have {extra[0]}, which this model has not")
    missing = [layer for layer in layers if layer not in names]
    if missing:
        raise StoreError(
            f"{variant}: {len(missing)} of {len(layers)} layers are missing ({where}: {missing[0]} …); "
            "make the files for the whole model"
        )


def refuse_packed(layers: Mapping[str, Layer]) -> None:
    """Raise OptionError for a model that is quantized already."""
    packed = [name for name, layer in layers.items() if layer.is_packed]
    if packed:
        raise OptionError(f"{packed[0]}: the model's weights are packed already; quantize the original model's")


@dataclass(frozen=True)
class QuantizedModule:
    """A module that is to be quantized: its path in the model, and what it becomes."""

    path: str  # multimodal_transformer_blocks.0.image_transformer_block.attn.q_proj
    module: nn.Module
    quantized: QuantizedLayer
    bits: int


def quantized_modules(mmdit: nn.Module, weights: Codes) -> Iterator[QuantizedModule]:
    """Everything that these weights quantize, one after the other: the layers of the blocks, then the rest.

    Raises OptionError for a model that is quantized already.
    """
    layers = model_layers(mmdit)
    refuse_packed(layers)
    modules = {path: module for path, module in mmdit.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    path_of = {id(module): path for path, module in modules.items()}
    in_blocks = {path_of[id(layer.module)] for layer in layers.values()}
    for name, quantized in weights.quantized(layers):
        module = layers[name].module
        yield QuantizedModule(path_of[id(module)], module, quantized, weights.bits_of(name))
    for path, module in modules.items():
        if path in in_blocks or weights.other_layers is None or not weights.other_layers.includes(path, module):
            continue
        weight = module.weight
        if weight.shape[1] % GROUPS_OF_THE_REST:
            raise OptionError(f"groups of {GROUPS_OF_THE_REST} do not divide the {weight.shape[1]} inputs of {path}")
        nearest = QuantizedLayer.nearest(np.array(weight.astype(mx.float32)), weights.other_layers.bits, GROUPS_OF_THE_REST)
        yield QuantizedModule(path, module, nearest, weights.other_layers.bits)


def put_in_place(mmdit: nn.Module, weights: Codes) -> None:
    """Replace weights (and corrected biases) by quantized ones, unpacked as the exported model unpacks them."""
    for place in quantized_modules(mmdit, weights):
        module, bias = place.module, place.quantized.deployed_bias
        dtype = module["weight"].dtype
        module["weight"] = place.quantized.packed(place.bits).dense(dtype)
        if bias is not None:
            module["bias"] = mx.array(bias).astype(dtype)
        mx.eval(module.parameters())
