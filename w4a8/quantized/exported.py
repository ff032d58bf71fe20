"""Put the packed transformer that stage 5 exported in place of the original, for stage 4 to measure."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from calibration_store.errors import StoreError
from calibration_store.files import file_digest
from calibration_store.layout import QuantizedModelPaths, WeightPaths
from calibration_store.model_folder import check_exported
from calibration_store.quantized_model import EXPORT, read_export
from w4a8.model.folder import load_folder_transformer
from w4a8.model.layers import Layer, model_layers
from w4a8.model.packed import AUTO
from w4a8.model.parts import TRANSFORMER, Pipeline
from w4a8.quantized.activation_rules import STATIC, ActivationRule, Learned, StaticByStep
from w4a8.quantized.dynamic_rules import DYNAMIC_PER_BLOCK, DYNAMIC_PER_TOKEN, DynamicPerBlock, DynamicPerToken
from w4a8.quantized.model import StoredWeights, Weights


class ExportedWeights(Weights):
    """The weights of the exported folder quantized_model/ below the calibration folder."""

    remedy = f"run {EXPORT} with --force"
    other_layers = None

    def __init__(self, calib_dir: Path, native: str = AUTO):
        """Read the export's notes. Raises StoreError for none, or one of other learned weights; native: `--native`."""
        paths = QuantizedModelPaths.below(calib_dir)
        self.folder, self.config = paths.root, read_export(paths.root)
        note = self.config["export"]
        self.bits, self.group_size, self.way = note["weight_bits"], note["group_size"], native
        self.sources = [paths.config]  # holds the fingerprint of the weight files
        self.made_from = [(paths.config, note)]
        learned = WeightPaths(calib_dir).metadata
        known = note["adaround_weights"] is not None and learned.exists()
        if known and file_digest(learned) != note["adaround_weights"]:
            raise StoreError(f"{paths.config}: exported from other learned weights than {learned}; {self.remedy}")

        self._learned = StoredWeights(calib_dir) if known else None

    def multipliers(self) -> dict[str, np.ndarray]:
        """Return those of the learned weights that were exported. Raises StoreError where these are not there any more."""
        if not self.config["export"].get("migrated"):
            return {}
        if self._learned is None:
            raise StoreError(
                f"{self.folder}: stage 3W migrated its inputs, and migration.npz is not there: no range of a static rule fits"
            )
        return self._learned.multipliers()

    def check(self, variant: str, layers: Mapping[str, Layer]) -> None:
        """Raise StoreError unless the files are those that were exported. `made_from` names the model they are of."""
        check_exported(self.folder, self.config)

    @contextmanager
    def in_place(self, pipeline: Pipeline) -> Iterator[None]:
        """Put the exported transformer into the pipeline until the block ends; its packed layers compute natively.

        Raises StoreError where it has other layers than the pipeline's.
        """
        names = model_layers(pipeline.mmdit).keys()
        pipeline.drop(TRANSFORMER)
        exported = load_folder_transformer(
            self.folder, pipeline.activation_dtype, native=self.way, guidance=pipeline.info.guidance
        )
        if model_layers(exported).keys() != names:
            raise StoreError(f"{self.folder}: another model's layers; {self.remedy}")
        pipeline.mmdit = exported
        try:
            yield
        finally:
            pipeline.drop(TRANSFORMER)


def rule_of_export(content: Mapping[str, Any], path: Path) -> ActivationRule:
    """Make the rule that an exported model's activations.json holds. path: that file, for messages."""
    bits = content["bits"]
    if content["rule"] in (DYNAMIC_PER_TOKEN, DYNAMIC_PER_BLOCK):
        return DynamicPerToken(bits) if content["rule"] == DYNAMIC_PER_TOKEN else DynamicPerBlock(bits)

    def shift_of(entry: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {"shift": np.array(entry["shift"], np.float32)} if "shift" in entry else {}

    if content["rule"] == STATIC:
        layers = content["layers"]
        shifts = {name: mx.array(shift_of(entry)["shift"]) for name, entry in layers.items() if "shift" in entry}
        learned = Learned({name: entry["clipping_range"] for name, entry in layers.items()}, shifts, bits)
        learned.remedy = f"run {EXPORT} with --force"
        return learned
    entries = {
        content["sigma_map"][key]: {
            name: {"bits": bits, "clipping_range": entry["clipping_range"]} | shift_of(entry)
            for name, entry in layers.items()
        }
        for key, layers in content["per_timestep"].items()
    }
    by_step = StaticByStep(entries, path, {})
    by_step.remedy = f"run {EXPORT} with --force"
    return by_step
