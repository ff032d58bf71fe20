"""Quantized weights of a model: their origin, the modules that they belong to, and how they are put in place.

Stage 3W trains them, stage 4 measures them and stage 5 exports them, as the same objects.
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
from mlx.utils import tree_flatten

from calibration_store.errors import OptionError, StoreError
from calibration_store.names import block_of
from calibration_store.rest_weights import read_migration, read_rest
from calibration_store.weights import WEIGHTS_METADATA, read_quantized_block, weight_paths
from w4a8.backend.parallel import on_every_core
from w4a8.model.layers import Layer, model_layers
from w4a8.model.parts import TRANSFORMER, Pipeline
from w4a8.quantized.layer import QuantizedLayer

GROUPS_OF_THE_REST = 64  # group size of OtherLayers


@dataclass(frozen=True)
class OtherLayers:
    """Layers that are quantized beside the blocks' attention and MLP layers: adaLN and embedders, or all linear ones.

    They are rounded to nearest in groups of 64.
    """

    bits: int
    all_linears: bool = False

    def includes(self, path: str, module: nn.Module) -> bool:
        """Return whether a module, which is none of the blocks' attention and MLP layers, is quantized."""
        if self.all_linears:
            return isinstance(module, nn.Linear)
        table = isinstance(module, nn.Embedding)
        return table or (isinstance(module, nn.Linear) and re.search("adaLN|embedder", path) is not None)


class Weights(ABC):
    """Quantized weights of a model.

    They follow from the files `sources`; `made_from` pairs such files with their notes of the run they were made from.
    """

    bits: int
    group_size: int
    other_layers: OtherLayers | None
    sources: Sequence[Path]
    made_from: Sequence[tuple[Path, Mapping[str, Any]]]
    remedy: str  # the commands to run where the files are of another run
    excluded: Sequence[str] = ()  # names of layers that keep the model's weights

    @property
    def uniform(self) -> bool:
        """Return whether every layer has the same bits."""
        return True

    def bits_of(self, layer: str) -> int:
        """Return the bits of a layer's codes."""
        return self.bits

    def multipliers(self) -> dict[str, np.ndarray]:
        """Return what the inputs of layers are divided by in this model (`--migrate`), (inputs,) by layer; here nothing."""
        return {}

    @abstractmethod
    def check(self, variant: str, layers: Mapping[str, Layer]) -> None:
        """Raise a UserError that names the variant unless the weights are of this model, and of all of its layers."""

    @abstractmethod
    def in_place(self, pipeline: Pipeline) -> AbstractContextManager[None]:
        """Put the weights into the pipeline's transformer until the block ends."""


class Codes(Weights):
    """Weights that are made from the original model's, a layer at a time."""

    def rest(self) -> dict[str, np.ndarray]:
        """Return the parameters beside the codes that were trained, {path in the model: float16 array}; here none."""
        return {}

    @abstractmethod
    def quantized(self, layers: Mapping[str, Layer]) -> Iterator[tuple[str, QuantizedLayer]]:
        """Yield (name, quantized layer) of every layer in turn."""

    @contextlib.contextmanager
    def in_place(self, pipeline: Pipeline) -> Iterator[None]:
        """Replace the original weights, a layer at a time, until the block ends.

        Two models are never in memory: the original is dropped at the end, and read again when it is used.
        """
        try:
            put_in_place(pipeline.mmdit, self)
            yield
        finally:
            pipeline.drop(TRANSFORMER)


@dataclass(frozen=True)
class NearestWeights(Codes):
    """Weights that are rounded to nearest, from the model alone."""

    bits: int
    group_size: int
    other_layers: OtherLayers | None = None
    sources: Sequence[Path] = ()
    made_from: Sequence[tuple[Path, Mapping[str, Any]]] = ()
    remedy: str = ""

    def check(self, variant: str, layers: Mapping[str, Layer]) -> None:
        """Raise OptionError where the groups do not divide a layer's inputs."""
        for name, layer in layers.items():
            width = layer.shape[1]
            if self.group_size and width % self.group_size:
                raise OptionError(f"{variant}: groups of {self.group_size} do not divide the {width} inputs of {name}")

    def quantized(self, layers: Mapping[str, Layer]) -> Iterator[tuple[str, QuantizedLayer]]:
        """Yield (name, quantized layer) of every layer. Dense float32 copies of one block are in memory at a time."""
        for _, names in itertools.groupby(layers, lambda name: layers[name].block):
            dense = {name: np.array(layers[name].weight.astype(mx.float32)) for name in names}
            nearest = on_every_core(
                lambda weight: QuantizedLayer.nearest(weight, self.bits, self.group_size), dense.values()
            )
            yield from zip(dense, nearest, strict=True)


class StoredWeights(Codes):
    """Weights that stage 3W, or GPTQ, wrote to `weight_paths`. One block is in memory at a time."""

    remedy = "run cache_adaround_data.py and optimize_adaround.py with --force"

    def __init__(self, calib_dir: Path, other_layers: OtherLayers | None = None, group_size: int | None = None):
        """group_size: of the groups, where several runs are there; None: those in adaround_weights/."""
        self.other_layers = other_layers
        self.paths = weight_paths(calib_dir, group_size)
        self.metadata = WEIGHTS_METADATA.read(self.paths.metadata)
        self.bits: int = self.metadata["weight_bits"]
        self.activation_bits: int = self.metadata["activation_bits"]
        self.group_size: int = self.metadata["group_size"]
        self.excluded = self.metadata.get("excluded", [])
        self._bits_of = self.metadata.get("layer_bits", {})
        self.sources = [self.paths.metadata, *(self.paths.block(block) for block in self.metadata["block_names"])]
        self.sources += [self.paths.rest] if "rest_digest" in self.metadata else []
        self.sources += [self.paths.migration] if "migration_digest" in self.metadata else []
        self.made_from = [(self.paths.metadata, self.metadata)]

    def rest(self) -> dict[str, np.ndarray]:
        """Return the arrays of rest.npz, {} where the run trained none. Raises StoreError."""
        return read_rest(self.paths, self.metadata) if "rest_digest" in self.metadata else {}

    def multipliers(self) -> dict[str, np.ndarray]:
        """Return the arrays of migration.npz, {} where the run migrated nothing. Raises StoreError."""
        return read_migration(self.paths, self.metadata) if "migration_digest" in self.metadata else {}

    @property
    def uniform(self) -> bool:
        """Return whether every layer has the same bits."""
        return not self._bits_of and not self.excluded

    def bits_of(self, layer: str) -> int:
        """Return the bits of a layer's codes."""
        return self._bits_of.get(layer, self.bits)

    def fields(self) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """Yield (layer, all of its arrays in its block's file) of every layer."""
        for block in self.metadata["block_names"]:
            yield from read_quantized_block(self.paths, block, self.metadata).items()

    def check(self, variant: str, layers: Mapping[str, Layer]) -> None:
        """Raise StoreError unless the files hold every layer of this model, in its shape."""
        names = set()
        for name, fields in self.fields():
            names.add(name)
            if name not in layers or fields["q"].shape != layers[name].shape:
                path = self.paths.block(block_of(name))
                raise StoreError(f"{path}: {name} {fields['q'].shape} is not the model's")
        check_coverage(variant, "adaround_weights", names | set(self.excluded), layers)

    def quantized(self, layers: Mapping[str, Layer]) -> Iterator[tuple[str, QuantizedLayer]]:
        """Yield (name, quantized layer) of every layer in the files."""
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
    """A module that is to be quantized: its path in the model, and the quantized layer that replaces it."""

    path: str  # multimodal_transformer_blocks.0.image_transformer_block.attn.q_proj
    module: nn.Module
    quantized: QuantizedLayer
    bits: int


def quantized_modules(mmdit: nn.Module, weights: Codes) -> Iterator[QuantizedModule]:
    """Yield every module that these weights quantize: the layers of the blocks first, then `other_layers`.

    Before them the rest that was trained takes its place in the model, where `other_layers` may round it.
    Raises OptionError for a model that is quantized already, and where groups of 64 do not divide a module's inputs.
    """
    layers = model_layers(mmdit)
    refuse_packed(layers)
    modules = {path: module for path, module in mmdit.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    path_of = {id(module): path for path, module in modules.items()}
    in_blocks = {path_of[id(layer.module)] for layer in layers.values()}
    put_rest_in_place(mmdit, weights)
    for name, quantized in weights.quantized(layers):
        module = layers[name].module
        yield QuantizedModule(path_of[id(module)], module, quantized, weights.bits_of(name))
    other = weights.other_layers
    for path, module in modules.items():
        if path in in_blocks or other is None or not other.includes(path, module):
            continue
        weight = module.weight
        if weight.shape[1] % GROUPS_OF_THE_REST:
            raise OptionError(f"groups of {GROUPS_OF_THE_REST} do not divide the {weight.shape[1]} inputs of {path}")
        nearest = QuantizedLayer.nearest(np.array(weight.astype(mx.float32)), other.bits, GROUPS_OF_THE_REST)
        yield QuantizedModule(path, module, nearest, other.bits)


def put_rest_in_place(mmdit: nn.Module, weights: Codes) -> None:
    """Replace the parameters beside the codes by trained ones. Raises StoreError where they are another model's."""
    own = dict(tree_flatten(mmdit.parameters()))
    trained = weights.rest()
    for path, array in trained.items():
        if path not in own or own[path].shape != array.shape:
            raise StoreError(f"rest.npz: {path} {array.shape} is not the model's")
    mmdit.load_weights(
        [(path, mx.array(array).astype(own[path].dtype)) for path, array in trained.items()], strict=False
    )


def put_in_place(mmdit: nn.Module, weights: Codes) -> None:
    """Replace weights (and corrected biases) by quantized ones, unpacked as the exported model unpacks them."""
    for each in quantized_modules(mmdit, weights):
        module, bias = each.module, each.quantized.deployed_bias
        dtype = module["weight"].dtype
        module["weight"] = each.quantized.packed(each.bits).dense(dtype)
        if bias is not None:
            module["bias"] = mx.array(bias).astype(dtype)
        mx.eval(module.parameters())
