"""Stage 4: is the image still the same? The model with original and with quantized weights and activations.

Reads   the model, and what the variants name: adaround_weights/ (3W), activations/quant_config*.json (3A, 3A')
Writes  evaluation/metrics.json, grid.png, error_over_steps.png; runs/ holds images and latents of each variant

python evaluate_quantization.py --calib-dir calibration_data/demo --num-steps 20

Same prompts, same seeds; prompts that the calibration did not use. A variant is a weight part, an activation part, or
both with a plus: w4-adaround+a8. Quantized activations are simulated (quantized and dequantized in floating point):
the figures are about quality, never about speed.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli_options import (
    Interrupted,
    calib_dir_option,
    draw_builtin_prompts,
    progress_bar,
    read_prompt_file,
    resume_command,
    save_figure,
    stage_command,
)

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np

    from calibration_store import EvaluationPaths
    from diffusion import DiffusionPipeline, ModelInfo

WEIGHT_PART = re.compile(r"w(?P<bits>[2-68])-(?:(?P<method>adaround)|(?P<nearest>rtn)(?:-g(?P<group>0|32|64|128))?)")
ACTIVATION_PART = re.compile(r"(?P<kind>multitier|a(?P<bits>[2-8])(-(?P<way>learned|dynamic|dynamic-unshifted))?)")
VOCABULARY = (
    "fp, w4-rtn, w4-rtn-g0 (2, 3, 4, 5, 6 or 8 bits, groups of 32, 64, 128 or 0: what MLX runs natively), w4-adaround, a8 (any bits), a8-learned, a8-dynamic, "
    "a8-dynamic-unshifted, multitier, and products such as w4-adaround+a8"
)
MADE_ANEW = {  # what to run for a file of another run
    "metadata.json": "run cache_adaround_data.py and optimize_adaround.py with --force",
    "quant_config.json": "run collect_layer_activations.py --force, then analyze_activations.py",
    "quant_config_multitier.json": "run collect_layer_activations.py --force, then analyze_activations_multitier.py",
}
LOW_PSNR = 30.0  # dB: images below are counted
BOOTSTRAP = 2000
GRID_ROWS, GRID_CELL = 8, 96


class GateFailure(click.ClickException):
    """--min-psnr or --max-step-error is not met."""

    exit_code = 1


@dataclass(frozen=True)
class Variant:
    """A row of the result: how weights and activations are quantized; None leaves them as they are."""

    name: str
    weights: dict[str, str | None] | None
    activations: dict[str, str | None] | None


def parse_variant(name: str) -> Variant:
    """Raises UsageError for a name outside the vocabulary."""
    if name == "fp":
        return Variant(name, None, None)
    found: dict[str, dict] = {}
    for part in name.split("+"):
        for kind, pattern in (("weights", WEIGHT_PART), ("activations", ACTIVATION_PART)):
            match = pattern.fullmatch(part)
            if match and kind not in found:
                found[kind] = match.groupdict()
                break
        else:
            raise click.UsageError(f"--variants: {name!r} is not known; there are {VOCABULARY}")
    return Variant(name, found.get("weights"), found.get("activations"))


# --- what is run --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Prompts, seeds and sampling: the same for every variant."""

    weights_fingerprint: str | None
    dtype: str
    use_t5: bool
    latent_size: tuple[int, int]
    prompts: list[str]
    num_steps: int
    cfg_weight: float
    negative_prompt: str
    seed: int
    batch_size: int
    versions: dict[str, str] = field(default_factory=dict)

    def identity(self, quantization: "Quantization") -> str:
        """SHA-256 over everything that a variant's images follow from, the content of its files included."""
        from dataclasses import asdict

        import orjson

        group = quantization.group_size if quantization.variant.weights else None
        parts = [asdict(self), quantization.variant.name, group, quantization.scale_is]
        parts += [hashlib.sha256(path.read_bytes()).hexdigest() for path in quantization.sources]
        return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def choose_prompts(
    manifest: dict[str, Any], captions: Path | None, given: list[str] | None, count: int, seed: int
) -> tuple[list[str], int]:
    """(prompts, how many of them the calibration used); by default ones that it did not use."""
    used = {image["prompt"] for image in manifest["images"]}
    if given is not None:
        prompts = given[:count]
        if len(given) < count:
            click.echo(f"{len(given)} prompts in the file: {len(given)} images instead of {count}.")
        elif len(given) > count:
            click.echo(f"{count} of {len(given)} prompts used: raise --num-images for more.")
    else:
        prompts = [prompt for prompt in draw_builtin_prompts(captions, seed) if prompt not in used][:count]
        if len(prompts) < count:
            raise click.UsageError(
                f"--num-images {count}: there are {len(prompts)} prompts; give --num-images {len(prompts)} or fewer"
            )
    return prompts, sum(prompt in used for prompt in prompts)


def sample(pipeline, run: Run, quantization: "Quantization", bar) -> "dict[str, np.ndarray]":
    """Images (N, H, W, 3) uint8 and the latents of every step (N, steps + 1, h, w, 16) of all prompts."""
    import numpy as np

    from diffusion import decode_latents, encode_prompts, euler_steps, initial_noise, mx

    images, latents = [], []
    with quantization.weights(pipeline):
        for begin in range(0, len(run.prompts), run.batch_size):
            prompts = run.prompts[begin : begin + run.batch_size]
            text = encode_prompts(pipeline, prompts, run.cfg_weight, run.negative_prompt)
            noise = mx.concatenate([initial_noise(run.seed + begin + i, run.latent_size) for i in range(len(prompts))])
            states = euler_steps(pipeline, text, noise.astype(pipeline.activation_dtype), run.num_steps, run.cfg_weight)
            trajectory = []
            with contextlib.closing(states):
                first = next(states)  # builds the modulation cache, which refuses live hooks
                with quantization.activations(pipeline, 2 if run.cfg_weight > 0 else 1):
                    for state in chain([first], states):
                        quantization.sigma = float(state.sigma.item())
                        trajectory.append(np.array(state.x.astype(mx.float32)))
                        if state.is_final:
                            break
                        bar.update()
            latents.append(np.stack(trajectory, axis=1))
            ids = range(begin, begin + len(prompts))
            refuse_not_finite(quantization.variant.name, latents[-1], ids)
            images += [np.asarray(image) for image in decode_latents(pipeline, state.x, ids)]
    return {"images": np.stack(images), "latents": np.concatenate(latents)}


def refuse_not_finite(variant: str, latents: "np.ndarray", ids: range) -> None:
    """Raise StoreError that names the first image and step (latents: (N, steps + 1, h, w, 16)) with NaN or infinity."""
    import numpy as np

    from calibration_store import StoreError

    bad = np.argwhere(~np.isfinite(latents).all(axis=(2, 3, 4)))
    if len(bad):
        image, step = bad[0]
        raise StoreError(f"{variant}: the latent of image {ids[image]} holds NaN or infinity after step {step}")


# --- quantization -------------------------------------------------------------------------------------------


class Quantization:
    """One variant made real: swaps weights and quantizes inputs inside `with` blocks, and puts everything back."""

    def __init__(self, variant: Variant, calib_dir: Path, manifest: dict[str, Any], scale_is: str | None = None):
        self.variant, self.calib_dir, self.manifest, self.scale_is = variant, calib_dir, manifest, scale_is
        self.sigma = 1.0
        self._made_from: list[tuple[Path, dict[str, Any]]] = []  # files, and what they say of the run that they are of
        self.sources = self._sources()
        self._entries = self._read_activations()

    def _sources(self) -> list[Path]:
        """The files that the variant follows from. Raises StoreError when one is missing."""
        from calibration_store import WEIGHTS_METADATA, ActivationPaths, StoreError, WeightPaths

        weights, activations = self.variant.weights, self.variant.activations
        paths, configs, files = WeightPaths(self.calib_dir), ActivationPaths(self.calib_dir), []
        self.metadata = None
        self._learned = learned = bool(
            (weights and weights["method"]) or (activations and activations["way"] == "learned")
        )
        if learned or (weights and weights["group"] is None and paths.metadata.exists()):
            self.metadata = WEIGHTS_METADATA.read(paths.metadata)
        if learned:
            self._check_bits(paths)
            self._made_from.append((paths.metadata, self.metadata))
            files += [paths.block(block) for block in self.metadata["block_names"]]
        if activations and activations["way"] is None:
            multitier = activations["kind"] == "multitier"
            files.append(configs.multitier_config if multitier else configs.quant_config)
        for path in files:
            if not os.path.lexists(path):
                scripts = {
                    configs.multitier_config: "analyze_activations_multitier.py",
                    configs.quant_config: "analyze_activations.py",
                }
                raise StoreError(
                    f"{path}: not found; {self.variant.name} needs it: run {scripts.get(path, 'optimize_adaround.py')}"
                )
        return files

    def _check_bits(self, paths) -> None:
        """Whether adaround_weights/ has the bits that the variant names."""
        for part, key in ((self.variant.weights, "weight_bits"), (self.variant.activations, "activation_bits")):
            learned = part and (part.get("method") or part.get("way") == "learned")
            if learned and int(part["bits"]) != self.metadata[key]:
                raise click.UsageError(f"{self.variant.name}: {paths.root} holds {self.metadata[key]} bits")

    def _learned_layers(self) -> "Iterator[tuple[str, dict[str, np.ndarray]]]":
        """(layer, fields) of every learned layer, a block in memory at a time."""
        from calibration_store import WeightPaths, read_quantized_block

        for block in self.metadata["block_names"]:
            yield from read_quantized_block(WeightPaths(self.calib_dir), block, self.metadata).items()

    def check(self, pipeline, fingerprint: str | None) -> None:
        """Whether the variant's files are of this run and this model, all of its layers at every step.

        Raises StoreError in one line.
        """
        from calibration_store import StoreError, same_run
        from hooks import layer_slots

        name, weights = self.variant.name, self.variant.weights
        layers = {layer: parent[key].weight.shape for layer, (parent, key) in layer_slots(pipeline.mmdit).items()}
        if weights and weights["nearest"]:
            for layer, (_, width) in layers.items():
                if self.group_size and width % self.group_size:
                    raise click.UsageError(
                        f"{name}: groups of {self.group_size} do not divide the {width} inputs of {layer}"
                    )
        for path, noted in self._made_from:
            if noted.get("weights_fingerprint") not in (None, fingerprint):
                raise StoreError(
                    f"{path}: made for {noted.get('model_version')}, and this model has other weights; leave {name} out of --variants"
                )
            if not same_run(self.manifest, noted):
                raise StoreError(f"{path}: made from another calibration run; {MADE_ANEW[path.name]}")
        covered = list((self._entries or {}).items())
        if self._learned:
            covered.append(("adaround_weights", self._check_layers(layers)))
        for where, entries in covered:
            extra = [layer for layer in entries if layer not in layers]
            if extra:
                raise StoreError(
                    f"{name}: its files have {extra[0]}, which this model has not; leave it out of --variants"
                )
            missing = [layer for layer in layers if layer not in entries]
            if missing:
                where = f"sigma {where:g}" if isinstance(where, float) else where
                raise StoreError(
                    f"{name}: {len(missing)} of {len(layers)} layers are missing ({where}: {missing[0]} …); "
                    "make the files for the whole model, or leave it out of --variants"
                )
        self._check_channels(layers)

    def _check_layers(self, layers: dict[str, tuple[int, int]]) -> set[str]:
        """The names of the learned layers, whose shapes must be the model's."""
        from calibration_store import StoreError, WeightPaths

        names = set()
        for layer, fields in self._learned_layers():
            names.add(layer)
            if fields["q"].shape != layers.get(layer):
                path = WeightPaths(self.calib_dir).block(layer.split(".")[0])
                raise StoreError(f"{path}: {layer} {fields['q'].shape} is not the model's")
        return names

    def _check_channels(self, layers: dict[str, tuple[int, int]]) -> None:
        """A shift or multiplier that is not one per channel would broadcast."""
        from calibration_store import StoreError

        for sigma, entries in (self._entries or {}).items():
            for layer, entry in entries.items():
                for key in ("shift", "multipliers"):
                    if key in entry and entry[key].shape != layers[layer][1:]:
                        raise StoreError(
                            f"{self.sources[-1]}: {layer} at sigma {sigma:g}: {entry[key].size} values of {key} for "
                            f"{layers[layer][1]} channels; {MADE_ANEW.get(self.sources[-1].name, 'make it anew')}"
                        )

    @property
    def group_size(self) -> int:
        """That of the variant's name, else of the learned weights, else 64."""
        group = self.variant.weights["group"]
        return int(group) if group is not None else self.metadata["group_size"] if self.metadata else 64

    # weights

    @contextlib.contextmanager
    def weights(self, pipeline) -> Iterator[None]:
        """The variant's weights (and corrected biases) in place of the original ones."""
        from hooks import layer_slots

        if self.variant.weights is None:
            yield
            return
        layers = {name: parent[key] for name, (parent, key) in layer_slots(pipeline.mmdit).items()}
        originals = {name: (layer.weight, layer.get("bias")) for name, layer in layers.items()}
        try:
            for name, (weight, bias) in self._new_weights(layers):
                layers[name]["weight"] = weight
                if bias is not None:
                    layers[name]["bias"] = bias
            yield
        finally:
            for name, (weight, bias) in originals.items():
                layers[name]["weight"] = weight
                if bias is not None:
                    layers[name]["bias"] = bias

    def _new_weights(self, layers: dict[str, Any]) -> Iterator[tuple[str, tuple]]:
        """(layer, (weight, bias or None)) of every quantized layer, in the model's dtype."""
        import mlx.core as mx
        import numpy as np

        from quantizers import dequantize, min_max_grid, nearest_codes

        if self.variant.weights["nearest"]:
            bits = int(self.variant.weights["bits"])
            for name, layer in layers.items():
                weight = np.array(layer.weight.astype(mx.float32))
                grid = min_max_grid(weight, bits, self.group_size)
                rounded = dequantize(nearest_codes(weight, *grid, bits).astype(np.float32), *grid)
                yield name, (mx.array(rounded).astype(layer.weight.dtype), None)
            return
        for name, fields in self._learned_layers():
            dtype = layers[name].weight.dtype
            weight = dequantize(fields["q"].astype(np.float32), fields["scale"], fields["zero_point"])
            bias = mx.array(fields["bias"]).astype(dtype) if "bias" in fields else None
            yield name, (mx.array(weight).astype(dtype), bias)

    # activations

    def _read_activations(self) -> dict[float, dict[str, dict]] | None:
        """The config of the activation part: {sigma: {layer: entry}}; learned ranges hold for every sigma."""
        from calibration_store import StoreError, read_config

        activations = self.variant.activations
        if activations is None or (activations["way"] or "").startswith("dynamic"):
            return None
        if activations["way"] == "learned":
            return {0.0: self._learned_entries(int(activations["bits"]))}
        path, multitier = self.sources[-1], activations["kind"] == "multitier"
        config = read_config(path, multitier)
        metadata = config.get("metadata") or {}
        self._made_from.append((path, metadata))
        scale_is = metadata.get("scale_meaning") or self.scale_is
        entries = [entry for layers in config["per_timestep"].values() for entry in layers.values()]
        if scale_is is None and not all("clipping_range" in entry for entry in entries):
            raise StoreError(
                f"{path}: another tool's: its 'scale' may be the range or the step; say --scale-is range or --scale-is step"
            )
        # W·m has other codes than W: beside weights that were rounded without it, nothing is migrated
        migration = {} if self.variant.weights else config.get("outlier_config") or {}
        bits = None if multitier else int(activations["bits"])
        return {
            config["sigma_map"][key]: {
                layer: activation_entry(entry, migration.get(layer), bits, scale_is) for layer, entry in layers.items()
            }
            for key, layers in config["per_timestep"].items()
        }

    def _learned_entries(self, bits: int) -> dict[str, dict]:
        """The ranges that stage 3W learned."""
        entries = {}
        for name, fields in self._learned_layers():
            if "act_scale" not in fields:
                raise click.UsageError(
                    f"{self.variant.name}: the learned weights have no activation ranges (--activation-bits 0)"
                )
            entries[name] = {"clipping_range": float(fields["act_scale"]), "bits": bits}
            if "act_shift" in fields:
                entries[name]["shift"] = fields["act_shift"]
        return entries

    @contextlib.contextmanager
    def activations(self, pipeline, rows_per_image: int) -> Iterator[None]:
        """The inputs of all linear layers quantized as the variant says; `sigma` chooses the step."""
        from hooks import hooked_layers

        if self.variant.activations is None:
            yield
            return
        last: list = [None, None]

        def record(name: str, x: "mx.array") -> "mx.array":
            if last[0] is not x:  # q, k and v of a stream are given the same array
                last[:] = [x, self._quantize(name, x, rows_per_image)]
            return last[1]

        with hooked_layers(pipeline.mmdit, record):
            yield

    def _quantize(self, name: str, x: "mx.array", rows_per_image: int) -> "mx.array":
        """x̂ (R, tokens, 1, channels) in x's dtype, computed in float32."""
        import mlx.core as mx

        from quantizers import fake_quantize

        values = x.astype(mx.float32)
        if self._entries is None:
            bits = int(self.variant.activations["bits"])
            unshifted = self.variant.activations["way"] == "dynamic-unshifted"
            return fake_quantize_dynamic(
                values, bits, name.endswith(".mlp.fc2") and not unshifted, rows_per_image
            ).astype(x.dtype)
        entry = self._entries[min(self._entries, key=lambda sigma: abs(sigma - self.sigma))][name]
        shift = mx.array(entry["shift"]) if "shift" in entry else 0.0
        multipliers = mx.array(entry["multipliers"]) if "multipliers" in entry else 1.0
        centred = (values - shift) / multipliers
        return (fake_quantize(centred, entry["clipping_range"], entry["bits"]) * multipliers + shift).astype(x.dtype)


def activation_entry(
    entry: dict[str, Any], migration: dict[str, Any] | None, bits: int | None, scale_is: str | None
) -> dict[str, Any]:
    """One layer's entry at one step as `_quantize` takes it; `bits` overrides the entry's.

    migration: the layer's outlier_config where its weights take part in it. A config without our `clipping_range` is clipped
    at its scale, which is a range or (scale_is "step") a step of the entry's own bits; its outliers are not migrated,
    as no range of the migrated tensor is given. A range of 0 (a layer that saw only zeros) becomes 1.
    """
    import numpy as np

    from quantizers import levels

    found: dict[str, Any] = {"bits": bits or entry["bits"]}
    if "clipping_range" not in entry:
        scale = entry["scale"] if entry.get("shifted_scale") is None else entry["shifted_scale"]
        found["clipping_range"] = (scale * levels(entry["bits"]) if scale_is == "step" else scale) or 1.0
    elif migration:
        found["clipping_range"] = entry["clipping_range"]
        found["multipliers"] = np.array(migration["multiplier_vector"], np.float32)
    else:
        found["clipping_range"] = entry.get("unmigrated_clipping_range", entry["clipping_range"])
    if entry.get("shift") is not None:
        found["shift"] = np.array(entry["shift"], np.float32)
    return found


def fake_quantize_dynamic(x: "mx.array", bits: int, shifted: bool, rows_per_image: int) -> "mx.array":
    """x̂ with the range, and per channel the shift (min + max) / 2, of each image's own tensor (all its rows)."""
    import mlx.core as mx

    from quantizers import fake_quantize

    grouped = x.reshape(rows_per_image, -1, *x.shape[1:])  # rows of an image are r·images + i
    rows = (0, 2, 3)
    shift = (grouped.min(axis=rows, keepdims=True) + grouped.max(axis=rows, keepdims=True)) / 2 if shifted else None
    centred = grouped if shift is None else grouped - shift
    reach = mx.abs(centred).max(axis=(*rows, 4), keepdims=True)
    return fake_quantize(grouped, mx.maximum(reach, 1e-8), bits, shift).reshape(x.shape)


# --- metrics ------------------------------------------------------------------------------------------------


def image_metrics(reference: "np.ndarray", images: "np.ndarray") -> "dict[str, np.ndarray]":
    """PSNR in dB (infinite for equal images) and SSIM of each pair, (N,) float64."""
    import numpy as np
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    psnr, ssim = [], []
    for original, image in zip(reference, images, strict=True):
        equal = np.array_equal(original, image)
        psnr.append(np.inf if equal else peak_signal_noise_ratio(original, image, data_range=255))
        ssim.append(structural_similarity(original, image, channel_axis=2, data_range=255))
    return {"psnr": np.array(psnr), "ssim": np.array(ssim)}


def step_errors(reference: "np.ndarray", latents: "np.ndarray") -> "np.ndarray":
    """Relative error ‖x − x_fp‖ / ‖x_fp‖ of each image at each step: (N, steps + 1)."""
    import numpy as np

    axes = (2, 3, 4)
    difference = np.sqrt(np.square(latents.astype(np.float64) - reference).sum(axis=axes))
    return difference / np.sqrt(np.square(reference.astype(np.float64)).sum(axis=axes))


def bootstrap_interval(values: "np.ndarray", seed: int = 0) -> list[float]:
    """95 % interval of the mean over images, by resampling them."""
    import numpy as np

    picks = np.random.default_rng(seed).integers(values.size, size=(BOOTSTRAP, values.size))
    return np.quantile(values[picks].mean(axis=1), [0.025, 0.975]).tolist()


def describe_variant(run: Run, reference: "dict[str, np.ndarray]", found: "dict[str, np.ndarray]") -> dict[str, Any]:
    """A variant's entry in metrics.json. PSNR is that of the images that differ; null when all equal the original."""
    import numpy as np

    quality = image_metrics(reference["images"], found["images"])
    errors = step_errors(reference["latents"], found["latents"])
    psnr, ssim = quality["psnr"], quality["ssim"]
    order = np.argsort(psnr, kind="stable")
    different = psnr[~np.isinf(psnr)]  # images that equal the original have no finite PSNR: they are counted apart
    return {
        "psnr": summary(different) | {"interval": bootstrap_interval(different) if different.size else [None, None]},
        "ssim": summary(ssim) | {"interval": bootstrap_interval(ssim)},
        "share_below_30_db": float((psnr < LOW_PSNR).mean()),
        "equal_images": int(np.isinf(psnr).sum()),
        "step_error": {"mean": errors.mean(axis=0).tolist(), "worst": errors.max(axis=0).tolist()},
        "max_step_error": finite(errors.mean(axis=0).max()),
        "worst_prompts": [
            {"prompt": run.prompts[i], "seed": run.seed + int(i), "psnr": finite(psnr[i])} for i in order[:3]
        ],
        "images": [
            {"prompt": p, "psnr": finite(a), "ssim": float(b)} for p, a, b in zip(run.prompts, psnr, ssim, strict=True)
        ],
    }


def summary(values: "np.ndarray") -> dict[str, float | None]:
    """Mean, median and worst; None without values."""
    import numpy as np

    if not values.size:
        return dict.fromkeys(("mean", "median", "worst"))
    return {"mean": finite(values.mean()), "median": finite(np.median(values)), "worst": finite(values.min())}


def finite(value: float) -> float | None:
    """JSON has no infinity: None."""
    import math

    return float(value) if math.isfinite(value) else None


# --- output -------------------------------------------------------------------------------------------------


def print_table(results: dict[str, dict]) -> None:
    """One row a variant."""
    width = max(map(len, results))
    click.echo(f"{'':{width}}  PSNR mean (95 %)       median   worst    SSIM   <30 dB  latent error")
    for name, row in results.items():
        psnr, (low, high) = row["psnr"], row["psnr"]["interval"]
        interval = f"({low:.1f} – {high:.1f})" if low is not None else ""
        cells = [
            f"{value:.1f}" if value is not None else "inf" for value in (psnr["mean"], psnr["median"], psnr["worst"])
        ]
        click.echo(
            f"{name:{width}}  {cells[0]:>6} dB {interval:15} {cells[1]:>6} {cells[2]:>7} {row['ssim']['mean']:7.4f} "
            f"{row['share_below_30_db']:8.0%} {row['step_error']['mean'][-1]:13.4f}"
        )
    if any("a" in part[0] or part == "multitier" for name in results for part in name.split("+") if part != "fp"):
        click.echo("Quantized activations are simulated: these rows say nothing about speed.")
    worst = {
        entry["prompt"]: None
        for row in results.values()
        for entry in row["worst_prompts"][:1]
        if entry["psnr"] is not None
    }
    if worst:
        click.echo("worst prompts: " + "; ".join(worst))


def draw_grid(path: Path, run: Run, reference: "np.ndarray", found: "dict[str, np.ndarray]", results: dict) -> None:
    """Write the grid: a row a prompt, the original, and each variant with its difference ×4."""
    import textwrap

    import numpy as np
    from matplotlib import font_manager
    from PIL import Image, ImageDraw, ImageFont

    from calibration_store import write_png

    rows, cell, gap, left, top = min(GRID_ROWS, len(reference)), GRID_CELL, 6, 110, 44
    columns = 1 + 2 * len(found)
    sheet = Image.new("RGB", (left + columns * (cell + gap), top + rows * (cell + gap)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 11)

    def put(row: int, column: int, pixels: "np.ndarray") -> None:
        scaled = Image.fromarray(pixels).resize((cell, cell), Image.Resampling.LANCZOS)
        sheet.paste(scaled, (left + column * (cell + gap), top + row * (cell + gap)))

    def title(column: int, text: str) -> None:
        draw.multiline_text((left + column * (cell + gap), 6), text, fill="black", font=font)

    title(0, "original")
    for row in range(rows):
        put(row, 0, reference[row])
        caption = "\n".join(textwrap.wrap(run.prompts[row], 17)[:5])
        draw.multiline_text((4, top + row * (cell + gap) + 8), caption, fill="black", font=font)
    for position, (name, images) in enumerate(found.items()):
        mean = results[name]["psnr"]["mean"]
        title(1 + 2 * position, "\n".join(textwrap.wrap(name.replace("+", " + "), 15)[:2]))
        title(2 + 2 * position, f"difference ×4\n{'inf' if mean is None else f'{mean:.1f}'} dB mean")
        for row in range(rows):
            put(row, 1 + 2 * position, images[row])
            difference = np.abs(images[row].astype(int) - reference[row].astype(int)) * 4
            put(row, 2 + 2 * position, np.clip(difference, 0, 255).astype(np.uint8))
    write_png(path, sheet)


def plot_errors(path: Path, results: dict[str, dict]) -> None:
    """Write the plot of the latents' relative error along the schedule."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, row in results.items():
        if any(row["step_error"]["mean"]):
            errors = row["step_error"]["mean"]
            axes.plot(range(1, len(errors)), errors[1:], label=name)  # all start from the same noise
    axes.set(
        xlabel="Euler step (noise on the left, image on the right)", ylabel="relative error of the latent", yscale="log"
    )
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    save_figure(figure, path)


def check_gate(results: dict[str, dict], min_psnr: float | None, max_step_error: float | None) -> None:
    """Raise GateFailure with every figure that misses its bound."""
    failing = []
    for name, row in results.items():
        mean, worst = row["psnr"]["mean"], row["max_step_error"]
        if min_psnr is not None and mean is None and worst != 0:  # black images are equal, too
            failing.append(f"{name}: every image equals the original's, but the latents do not")
        elif min_psnr is not None and mean is not None and not mean >= min_psnr:
            failing.append(f"{name}: mean PSNR {mean:.2f} dB is below --min-psnr {min_psnr:g}")
        if max_step_error is not None and not (worst is not None and worst <= max_step_error):
            shown = "not finite" if worst is None else f"{worst:.4f}"
            failing.append(f"{name}: latent error {shown} is above --max-step-error {max_step_error:g}")
    if failing:
        raise GateFailure("; ".join(failing) + " (TROUBLESHOOTING_GUIDE Issue 24)")


# --- the stage ----------------------------------------------------------------------------------------------


def default_variants(calib_dir: Path) -> list[str]:
    """Every variant that the folder has files for, at the bits that they have."""
    from calibration_store import WEIGHTS_METADATA, ActivationPaths, WeightPaths

    learned, configs = WeightPaths(calib_dir).metadata, ActivationPaths(calib_dir)
    bits = WEIGHTS_METADATA.read(learned)["weight_bits"] if learned.exists() else 4
    weights = [f"w{bits}-rtn", *([f"w{bits}-adaround"] if learned.exists() else [])]
    activations = ["a8", *(f"{name}+a8" for name in weights[1:])] if configs.quant_config.exists() else []
    return weights + activations + (["multitier"] if configs.multitier_config.exists() else [])


def plan_run(
    manifest: dict[str, Any],
    info: "ModelInfo",
    fingerprint: str | None,
    use_t5: bool,
    prompts: list[str],
    num_steps: int | None,
    cfg_weight: float | None,
    seed: int,
    batch_size: int,
) -> Run:
    """The run that every variant shares; what is not given is the calibration's."""
    from diffusion import mx, package_versions

    latent_size, default_cfg, negative = (manifest[key] for key in ("latent_size", "cfg_scale", "negative_prompt"))
    if fingerprint != manifest["weights_fingerprint"]:  # the manifest says nothing of another model
        latent_size, default_cfg, negative = info.latent_size, info.cfg_weight, ""
    cfg_weight = default_cfg if cfg_weight is None else cfg_weight
    return Run(
        weights_fingerprint=fingerprint,
        dtype=manifest["activation_dtype"],
        use_t5=use_t5,
        latent_size=tuple(latent_size),
        prompts=prompts,
        num_steps=num_steps or manifest["num_steps"],
        cfg_weight=cfg_weight,
        negative_prompt=negative if cfg_weight > 1 else "",  # DiffusionKit ignores it otherwise
        seed=seed,
        batch_size=batch_size,
        versions=package_versions() | {"device": str(mx.default_device())},
    )


def load_evaluated(
    manifest: dict[str, Any], model: str | None, local_checkpoint: Path | None
) -> "tuple[DiffusionPipeline, ModelInfo, str | None]":
    """The model to evaluate (by default the calibration's), what is known of it, and its weights' fingerprint."""
    from diffusion import check_fingerprint, describe_run_model, load_pipeline, model_fingerprint

    info, checkpoint = describe_run_model(manifest, model, local_checkpoint)
    checkpoint = checkpoint if info.folder is None else None
    use_t5 = manifest["use_t5"] if model in (None, manifest["model_version"]) else info.use_t5 and manifest["use_t5"]
    if model is None and info.folder is not None:
        check_fingerprint(manifest, info, checkpoint)
    pipeline = load_pipeline(info, manifest["activation_dtype"], use_t5, checkpoint)
    if model is None and info.folder is None:
        check_fingerprint(manifest, info, checkpoint)  # now that its files are in the cache
    return pipeline, info, model_fingerprint(info, use_t5, checkpoint)


def evaluate(
    pipeline, run: Run, paths: "EvaluationPaths", quantizations: "list[Quantization]", resume: bool
) -> "tuple[np.ndarray, dict[str, np.ndarray], dict[str, dict]]":
    """Run every variant, the original first: (original images, images and metrics of each variant).

    The original, and with --resume the others, are taken from an earlier run's file where there is one. Latents are
    in memory for two variants at a time.
    """
    images, results, original = {}, {}, None
    total = len(quantizations) * run.num_steps * -(-len(run.prompts) // run.batch_size)
    with progress_bar(total, "sampling", "step") as bar:
        for quantization in quantizations:
            name = quantization.variant.name
            bar.set_description(name)
            found = stored_or_sampled(pipeline, run, paths, quantization, resume or name == "fp", bar)
            original = found if original is None else original
            images[name] = found["images"]
            results[name] = describe_variant(run, original, found)
            bar.n = total * len(results) // len(quantizations)
    return original["images"], images, results


def stored_or_sampled(
    pipeline, run: Run, paths, quantization: "Quantization", stored: bool, bar
) -> "dict[str, np.ndarray]":
    """A variant's images and latents, from its file if that may be used, else sampled and written."""
    import numpy as np

    from calibration_store import StoreError, read_npz, remove_file, write_npz

    name, identity = quantization.variant.name, run.identity(quantization)
    path = paths.run(name, identity)
    for old in paths.runs_of(name):
        if old != path:
            remove_file(old)  # of other parameters or files, or half-written
    if stored and os.path.lexists(path):
        with contextlib.suppress(StoreError):  # damaged: made anew
            arrays = read_npz(path, "")
            if is_run(run, arrays, identity):
                return arrays
    arrays = sample(pipeline, run, quantization, bar)
    write_npz(path, arrays | {"identity": np.array(identity)})
    return arrays


def is_run(run: Run, arrays: "dict[str, np.ndarray]", identity: str) -> bool:
    """Whether arrays are the images and latents that this run gives."""
    from calibration_store import EVALUATION_RUN

    height, width = run.latent_size
    fault = EVALUATION_RUN.fault(
        arrays, images=len(run.prompts), states=run.num_steps + 1, **{"latent height": height, "latent width": width}
    )
    if fault or arrays["identity"].item() != identity:
        return False
    pictures = arrays["images"].shape[1:3]
    return pictures[0] % height == pictures[1] % width == 0 and pictures[0] // height == pictures[1] // width


@stage_command
@calib_dir_option
@click.option("--model", help="Model to evaluate, or where the calibration's is now.  [default: the calibration's]")
@click.option(
    "--local-checkpoint",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Where the calibration's checkpoint file is now.  [default: where it was]",
)
@click.option(
    "--scale-is",
    type=click.Choice(["range", "step"]),
    help="What `scale` means in another tool's config that does not say it: the clipping range, or the integer step.",
)
@click.option(
    "--prompts",
    "prompt_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text file, one prompt a line, or CSV or TSV with a column 'prompt' or 'caption'.  [default: ones that the calibration did not use]",
)
@click.option("--num-images", type=click.IntRange(min=1), default=16, help="Images per variant.")
@click.option("--num-steps", type=click.IntRange(min=1), help="Euler steps.  [default: the calibration's]")
@click.option("--cfg-weight", type=click.FloatRange(min=0), help="Guidance.  [default: the calibration's]")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31),
    default=10_000,
    help="Image i is drawn with seed + i; also orders the prompts.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, help="Images in one forward pass.")
@click.option(
    "--variants",
    help="Comma-separated, of w4-rtn, w4-adaround, a8, multitier, products such as w4-adaround+a8 (README).  [default: all that have files]",
)
@click.option("--min-psnr", type=float, help="Exit with 1 when a variant's mean PSNR is below this (dB).")
@click.option(
    "--max-step-error",
    type=click.FloatRange(min=0),
    help="Exit with 1 when a variant's mean latent error exceeds this at any step.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write to.  [default: evaluation/ below --calib-dir]",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Take over variants that an earlier call finished with the same parameters and files.",
)
def main(
    calib_dir: Path,
    model: str | None,
    local_checkpoint: Path | None,
    scale_is: str | None,
    prompt_file: Path | None,
    num_images: int,
    num_steps: int | None,
    cfg_weight: float | None,
    seed: int,
    batch_size: int,
    variants: str | None,
    min_psnr: float | None,
    max_step_error: float | None,
    output: Path | None,
    resume: bool,
) -> None:
    """Stage 4: same prompts, same seeds, original against quantized."""
    from calibration_store import EVALUATION_FORMAT, EvaluationPaths, locked_folder, read_manifest, shown, write_json

    manifest = read_manifest(calib_dir)
    names = [name.strip() for name in variants.split(",")] if variants is not None else default_variants(calib_dir)
    quantizations = [
        Quantization(parse_variant(name), calib_dir, manifest, scale_is) for name in dict.fromkeys(["fp", *names])
    ]
    import skimage.metrics  # noqa: F401  (now: Ctrl-C during an import ends the process without a word on what is kept)
    from matplotlib import pyplot  # noqa: F401

    from diffusion import check_prompts

    given_prompts = read_prompt_file(prompt_file) if prompt_file else None
    pipeline, info, fingerprint = load_evaluated(manifest, model, local_checkpoint)
    prompts, overlap = choose_prompts(manifest, info.captions, given_prompts, num_images, seed)
    run = plan_run(manifest, info, fingerprint, pipeline.use_t5, prompts, num_steps, cfg_weight, seed, batch_size)
    paths = EvaluationPaths(output or calib_dir / "evaluation")
    negative = f", negative prompt {shown(run.negative_prompt)}" if run.negative_prompt else ""
    click.echo(
        f"{info.version}: {len(prompts)} images, {run.num_steps} steps, guidance {run.cfg_weight:g}{negative}, seeds from {seed}; "
        f"{overlap} of the prompts were used in calibration"
    )
    cut = check_prompts(pipeline, prompts, "prompt")
    cut += check_prompts(pipeline, [run.negative_prompt], "negative prompt")
    if cut:
        click.echo(f"{cut} prompts are longer than the text encoder's positions: their ends are ignored.")
    for quantization in quantizations:
        quantization.check(pipeline, fingerprint)
    with locked_folder(paths.root):
        try:
            original, images, results = evaluate(pipeline, run, paths, quantizations, resume)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted: finished variants are kept in {paths.root}; go on with: {resume_command()}"
            ) from None
        if "fp" not in names:
            del images["fp"], results["fp"]
        parameters = {"prompts": prompts, "overlap_with_calibration": overlap, "num_steps": run.num_steps}
        parameters |= {
            "cfg_weight": run.cfg_weight,
            "negative_prompt": run.negative_prompt,
            "seed": seed,
            "model_version": info.version,
            "weights_fingerprint": fingerprint,
            "dtype": run.dtype,
        }
        draw_grid(paths.grid, run, original, images, results)
        plot_errors(paths.error_plot, results)
        write_json(
            paths.metrics, {"format": EVALUATION_FORMAT, **parameters, "low_psnr": LOW_PSNR, "variants": results}
        )
    click.echo(f"wrote {paths.metrics}, {paths.grid}, {paths.error_plot}")
    print_table(results)
    check_gate(results, min_psnr, max_step_error)


if __name__ == "__main__":
    main()
