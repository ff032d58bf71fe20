"""Write report/index.html, one page from whatever a calibration folder holds; the page fetches nothing."""

import math
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import click
import jinja2
import numpy as np
import orjson

from calibration_store.configs import read_config
from calibration_store.errors import StoreError
from calibration_store.evaluation import METRICS
from calibration_store.files import atomic_file, read_bytes
from calibration_store.history import read_history
from calibration_store.layout import (
    ActivationPaths,
    BlockCachePaths,
    CalibrationPaths,
    EvaluationPaths,
    QuantizedModelPaths,
    ReportPaths,
    WeightPaths,
)
from calibration_store.manifest import read_manifest, same_run
from calibration_store.model_folder import check_exported, weight_file
from calibration_store.names import block_of, layer_kind
from calibration_store.pictures import MOST_PIXELS, is_of, opened_png
from calibration_store.quantized_model import float16_bytes, read_export
from calibration_store.safetensors_header import weight_sizes
from calibration_store.sensitivity import SENSITIVITY
from calibration_store.sizes import format_bytes
from calibration_store.weights import WEIGHTS_METADATA
from w4a8 import __version__
from w4a8.backend.words import interpreter
from w4a8.report.comparison import comparison_of, other_evaluations
from w4a8.report.page_values import picture, short
from w4a8.report.run_facts import better_ways, commands, diagnosis, sizes_of_formats, stage_rows
from w4a8.report.tables import held_out_losses
from w4a8.report.variant_words import GLOSSARY

TEMPLATES = Path(__file__).parent / "page"
MOST_DRAWN, DRAWN_SIDE = 24, 256  # the largest number of the run's pictures, and their longer side in pixels
STAGES = (  # section of the page, scripts that make it, and its content, in the order of the road
    ("manifest", ("generate_calibration_data.py",), "prompts to latents"),
    ("weights", ("cache_adaround_data.py", "optimize_adaround.py"), "learned rounding"),
    ("activations", ("collect_layer_activations.py", "analyze_activations.py"), "ranges of the activations"),
    ("export", ("export_quantized_model.py",), "the model on the disk"),
    ("comparison", ("evaluate_quantization.py",), "original against quantized"),
)
SECTIONS = {  # key of the page that describe_folder returns -> the section's name
    "manifest": "the run", "drawn": "its prompts and pictures", "activations": "ranges of the activations",
    "weights": "learned rounding", "export": "the model on the disk", "comparison": "original against quantized", "others": "more evaluations",
}  # fmt: skip
GENERATOR = b'name="generator" content="report_calibration.py"'


def refuse_foreign_page(paths: ReportPaths) -> None:
    """Raise StoreError where another program wrote index.html."""
    if os.path.lexists(paths.page) and GENERATOR not in read_bytes(paths.page, "give another --output")[:2000]:
        raise StoreError(f"{paths.page}: not written by this script; give another --output, or --force")


def describe_folder(calib_dir: Path) -> dict[str, Any]:
    """Return the content of the page: {section: content} for each stage that left something, and the stages to come.

    Files of another calibration run, and a damaged export, are left out with a line. Raises StoreError for a damaged
    file.
    """
    manifest = read_manifest(calib_dir)
    title = manifest["model_version"].rstrip("/").rpartition("/")[2]  # of a folder, or a hub id
    page: dict[str, Any] = {
        "version": __version__,
        "title": title,
        "words": GLOSSARY,
        "python": interpreter(),
        "manifest": run_of(manifest),
        "drawn": drawn(calib_dir, manifest),
    }
    history = read_history(calib_dir)
    page |= {"stages": stage_rows(history), "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")}
    page["by"] = sorted({f"{line.w4a8_version} ({line.commit or 'no commit'})" for line in history})
    page["devices"] = sorted({line.device for line in history})
    activations, weights = ActivationPaths(calib_dir), WeightPaths(calib_dir)
    evaluation, export = EvaluationPaths(calib_dir / "evaluation"), QuantizedModelPaths.below(calib_dir)

    left_out: dict[str, str] = {}  # section -> why

    def of_this_run(key: str, path: Path, noted: Mapping[str, Any], any_model: bool = False) -> bool:
        of_model = any_model or noted.get("weights_fingerprint") in (None, manifest["weights_fingerprint"])
        same = of_model and same_run(manifest, noted)
        if not same:
            click.echo(f"{path}: made from another calibration run, left out", err=True)
            left_out[key] = "left out: of another run"
        return same

    if os.path.lexists(path := activations.quant_config):
        config = read_config(path, multitier=False)
        tiers = None
        if os.path.lexists(tier_path := activations.multitier_config):
            tiers = read_config(tier_path, multitier=True)
            tiers = tiers if of_this_run("tiers", tier_path, tiers.get("metadata") or {}) else None
        if of_this_run("activations", path, config.get("metadata") or {}):
            page["activations"] = ranges_of(config, tiers)
    if os.path.lexists(path := weights.metadata):
        metadata = WEIGHTS_METADATA.read(path)
        if of_this_run("weights", path, metadata):
            page["weights"] = rounding_of(metadata)
    if os.path.lexists(path := BlockCachePaths(calib_dir).sensitivity):
        sensitivity = SENSITIVITY.read(path)
        if of_this_run("sensitivity", path, sensitivity):
            page["sensitivity"] = sensitivity_of(sensitivity)
    bits = None
    if os.path.lexists(path := export.config):
        content = read_export(export.root)
        if of_this_run("export", path, content["export"]):
            if is_whole(export.root, content):
                page["export"], bits = export_of(export, content), content["export"]["weight_bits"]
            else:
                left_out["export"] = "left out: damaged"
    if os.path.lexists(path := evaluation.metrics):
        metrics = METRICS.read(path)
        if of_this_run("comparison", path, metrics, any_model=True):
            page["comparison"] = comparison_of(evaluation, metrics, bits)
    if others := other_evaluations(calib_dir, partial(of_this_run, any_model=True)):
        page["others"] = others
    page["next"] = [
        {"commands": commands(scripts, calib_dir), "what": what, "why": left_out.get(key, "not there yet")}
        for key, scripts, what in STAGES
        if key not in page
    ]
    page["better"] = better_ways(manifest, calib_dir, history)
    return page


def write_page(paths: ReportPaths, page: Mapping[str, Any]) -> int:
    """Write the page atomically, and return its size in bytes."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    data = orjson.dumps(page).decode().replace("<", "\\u003c")  # so that no tag ends the script
    content = environment.get_template("index.html").render(page=page, data=data).encode()
    with atomic_file(paths.page) as file:
        file.write(content)
    return len(content)


def run_of(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (label, value) rows that describe the calibration run."""
    height, width = manifest["latent_size"]
    rows = [
        ("Model", manifest["model_version"]),
        ("Images", f"{manifest['n_completed']} of {manifest['num_images']}"),
        ("Steps", str(manifest["num_steps"])),
        ("Guidance", f"{manifest['cfg_scale']:g}" if manifest["cfg_scale"] > 0 else "none"),
        ("Latents", f"{height} × {width}"),
        ("Precision", manifest["activation_dtype"]),
        ("Seeds", f"from {manifest['seed_base']}"),
        ("Packages", ", ".join(f"{name} {version}" for name, version in manifest["package_versions"].items())),
    ]
    if manifest["negative_prompt"]:
        rows.append(("Negative prompt", manifest["negative_prompt"]))
    if manifest.get("local_checkpoint"):
        rows.append(("Checkpoint", manifest["local_checkpoint"]))
    return rows + [("LoRA", f"{lora['file']} × {lora['scale']:g}") for lora in manifest.get("loras", [])]


def drawn(calib_dir: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the number of the run's images, and prompts and pictures of at most MOST_DRAWN, evenly over the run."""
    paths, images = CalibrationPaths(calib_dir), manifest["images"]
    count = min(MOST_DRAWN, len(images))
    shown = [images[round(i * (len(images) - 1) / max(1, count - 1))] for i in range(count)]
    pictures = []
    for image in shown:
        entry = {"prompt": image["prompt"], "seed": image["seed"], "source": None}
        path = paths.image(image["image_id"])
        if manifest["save_images"]:
            with opened_png(path, "run generate_calibration_data.py with --resume", most_pixels(manifest)) as png:
                if is_of(png, image):
                    entry["source"] = picture(png.convert("RGB"), DRAWN_SIDE)
                else:
                    click.echo(f"{path}: of another image or another calibration run, left out", err=True)
        pictures.append(entry)
    return {"count": len(images), "pictures": pictures}


def most_pixels(manifest: Mapping[str, Any]) -> int:
    """Return an upper bound of the pixels of an image of this run.

    No decoder makes more than 128 × 128 pixels from one position of a latent.
    """
    height, width = manifest["latent_size"]
    return min(2**14 * height * width, MOST_PIXELS)


def ranges_of(config: Mapping[str, Any], tiers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the clipping range of every layer at every step, shifts, outlier channels, and the bits that 3A' chose.

    config: quant_config.json; tiers: quant_config_multitier.json, or None. Layers that some step lacks are left out.
    """
    steps = sorted(config["per_timestep"], key=config["sigma_map"].__getitem__, reverse=True)
    names = [name for name in config["per_timestep"][steps[0]] if all(name in config["per_timestep"][s] for s in steps)]
    migrated = config.get("outlier_config") or {}
    bits: Mapping[str, Any] = tiers["per_timestep"] if tiers else {}
    layers = []
    for name in names:
        entries = [config["per_timestep"][step][name] for step in steps]
        found = migrated.get(name, {})
        channels = found.get("outlier_indices", [])
        layers.append({
            "name": name, "block": block_of(name), "kind": layer_kind(name),
            "range": [short(entry.get("clipping_range", entry["scale"])) for entry in entries],
            "shifted": short(np.median([e["shifted_scale"] / e["scale"] for e in entries]))
            if all(e.get("shifted_scale") and e["scale"] for e in entries) else None,
            "outliers": [[channel, found["multiplier_vector"][channel]] for channel in channels],
            "bits": [bits.get(step, {}).get(name, {}).get("bits") for step in steps] if bits else [],
        })  # fmt: skip
    return {
        "steps": steps,
        "sigmas": [short(config["sigma_map"][step]) for step in steps],
        "layers": layers,
    }


def rounding_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bits of the learned weights, and the losses of every unit. metadata: of adaround_weights/."""
    units: dict[str, dict[str, Any]] = {}
    for block, entry in metadata.get("losses", {}).items():
        for number, stage in enumerate(entry["stages"]):
            name = entry["unit"] if len(entry["stages"]) == 1 else f"{block}, {number + 1}"
            losses = held_out_losses(stage) | {"end_training": stage["end_training"]}
            units[name] = {key: short(value) for key, value in losses.items()} | {
                "kept_nearest": stage["kept_nearest"], "curve": stage.get("curve", []),
            }  # fmt: skip
    facts = [("Bits", f"{metadata['weight_bits']}"), ("Group", str(metadata["group_size"] or "a scale per channel"))]
    noted = (("Unit", "unit"), ("Iterations", "iters"), ("Samples", "num_samples"))
    facts += [(label, str(metadata[key])) for label, key in noted if key in metadata]
    widths = metadata.get("layer_bits", {})
    return {
        "facts": facts,
        "units": units,
        "diagnosis": diagnosis(units),
        "layer_bits": [{"name": name, "bits": bits} for name, bits in sorted(widths.items())],
        "excluded": metadata.get("excluded", []),
    }


def sensitivity_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the SQNR of the velocity in dB with one layer alone rounded to nearest, the layers that matter most first.

    `share` is the square root of the layer's error over the largest error.
    """
    found = content["layers"]
    widths = sorted({bits for layer in found.values() for bits in layer["weights"]}, key=int)
    errors = {name: layer["weights"].get(widths[0], 0) for name, layer in found.items()}
    most = max(errors.values()) or 1
    layers = []
    for name in sorted(errors, key=errors.__getitem__, reverse=True):
        layer = found[name]
        sqnr = {bits: round(-10 * math.log10(error), 1) for bits, error in layer["weights"].items() if error}
        share = short(math.sqrt(errors[name] / most))
        layers.append({"name": name, "size": layer["size"], "share": share, "sqnr": sqnr})
    return {"widths": widths, "samples": content["num_samples"], "layers": layers}


def is_whole(folder: Path, content: Mapping[str, Any]) -> bool:
    """Return whether an export's files are those that were exported; print a line where they are not."""
    try:
        check_exported(folder, content)
    except StoreError as error:
        click.echo(f"{error.message}; left out", err=True)
        return False
    return True


def export_of(paths: QuantizedModelPaths, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return (label, value) rows on the exported folder and its files, (format, size) of other formats, and what is packed."""
    note, transformer, formats = content["export"], weight_file(paths.root, "mmdit"), list[tuple[str, str]]()
    packed = ""
    files = [path for path in paths.owned_files() if path != paths.config] + paths.gguf_files()
    rows = [
        ("Folder", str(paths.root)),
        ("Weights", f"{note['weights']}, {note['weight_bits']} bits"),
        ("Activations", note["activations"] or "not quantized"),
    ]
    if transformer.exists():
        size, whole = transformer.stat().st_size, float16_bytes(weight_sizes(transformer), content["quantization"])
        rows.append(("Transformer", f"{format_bytes(size)}, {size / whole:.2f} × its float16 ({format_bytes(whole)})"))
        formats = sizes_of_formats(weight_sizes(transformer), content["quantization"], size)
        layers = sum(dtype == "U32" for dtype, _ in weight_sizes(transformer).values())
        packed = f"{layers} linear layers are packed, and everything else stays in 16 bits."
    rows += [(path.name, format_bytes(path.stat().st_size)) for path in files]
    return {"rows": rows, "formats": formats, "packed": packed}
