"""The section of the report that compares the original's images with those of every variant."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from calibration_store.evaluation import METRICS, read_images
from calibration_store.layout import EvaluationPaths
from calibration_store.pictures import MOST_PIXELS, opened_png
from w4a8.report.page_values import picture, short, shorts
from w4a8.report.run_facts import effects_of, equal_variants
from w4a8.report.variant_words import NATIVE, verdict_on, what_it_is

PICTURE_BYTES = 13e6  # a limit for the pictures of the comparison; the least damaged ones are left out first


def comparison_of(paths: EvaluationPaths, metrics: Mapping[str, Any], exported_bits: int | None) -> dict[str, Any]:
    """Return the table of stage 4, and for every variant its images beside the original's, the most damaged first."""
    count, variants = len(metrics["prompts"]), metrics["variants"]
    originals, pairs = pairs_of(paths, variants, count)
    preferred = (NATIVE, *(name for name in variants if "adaround" in name))
    first = next((name for name in preferred if name in variants), None)
    return {
        "verdict": verdict_on(first, variants, exported_bits), "equal": equal_variants(variants), "errors": error_plot(paths), "rows": variant_rows(variants), "prompts": metrics["prompts"],
        "seed": metrics["seed"], "steps": metrics["num_steps"], "first": first, "originals": originals, "pairs": pairs,
        "effects": effects_of(metrics.get("step_effects")), "all": len(pairs) * count, "shown": sum(map(len, pairs.values())),
    }  # fmt: skip


def variant_rows(variants: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the table of variants. variants: their entries in metrics.json."""
    return [
        {
            "name": name,
            "what": what_it_is(name),
            "psnr": shorts(found["psnr"]),
            "ssim": short(found["ssim"]["mean"]),
            "flip": short(found["flip"]["mean"]),
            "gain": found.get("gain"),
            "above": found["share_above_40_db"],
            "below": found["share_below_30_db"],
        }
        for name, found in variants.items()
    ]


def other_evaluations(
    calib_dir: Path, of_this_run: Callable[[str, Path, Mapping[str, Any]], bool]
) -> list[dict[str, Any]]:
    """Return the tables of the evaluations beside evaluation/, such as those of `--config`: evaluation_NAME/.

    of_this_run: tells whether an evaluation (section, path, content) is of the folder's run.
    """
    found = []
    for paths in EvaluationPaths.beside(calib_dir):
        metrics = METRICS.read(paths.metrics)
        if of_this_run("comparison", paths.metrics, metrics):
            images, steps = len(metrics["prompts"]), metrics["num_steps"]
            rows = variant_rows(metrics["variants"])
            found.append({
                "folder": paths.root.name, "images": images, "steps": steps, "rows": rows, "config": metrics.get("config"),
            })  # fmt: skip
    return found


def error_plot(paths: EvaluationPaths) -> str | None:
    """Return stage 4's plot of the latents' errors over the steps as a data URL; None where it is not there."""
    if not paths.error_plot.is_file():
        return None
    with opened_png(paths.error_plot, "run evaluate_quantization.py", most_pixels=MOST_PIXELS) as png:
        return picture(png.convert("RGB"))


def pairs_of(
    paths: EvaluationPaths, variants: Mapping[str, Any], count: int
) -> tuple[dict[str, str], dict[str, list[dict[str, Any]]]]:
    """Return the pictures of the comparison within PICTURE_BYTES: {image: the original's}, and {variant: its pictures}.

    The worst picture of every variant comes first, then the second worst of every variant, and so on. variants: their
    entries in metrics.json; count: the number of images. A variant whose file is not there is left out, and all of them
    without the original's file.
    """
    original = read_images(paths, "fp", count)
    if original is None:
        return {}, {}
    read = {name: read_images(paths, name, count) for name in variants}
    images = {name: found for name, found in read.items() if found is not None}
    orders = {
        name: np.argsort(
            [math.inf if image["psnr"] is None else image["psnr"] for image in variants[name]["images"]], kind="stable"
        )
        for name in images
    }
    sources: dict[int, str] = {}
    pairs: dict[str, list[dict[str, Any]]] = {name: [] for name in images}
    left = PICTURE_BYTES
    for rank in range(count):
        for name in images:
            index = int(orders[name][rank])
            if index not in sources and left > 0:
                sources[index] = picture(Image.fromarray(original[index]))
                left -= len(sources[index])
            if index not in sources or left <= 0:
                continue
            source = picture(Image.fromarray(images[name][index]))
            left -= len(source)
            figures = {key: short(variants[name]["images"][index][key]) for key in ("psnr", "ssim", "flip")}
            pairs[name].append({"image": index, "source": source} | figures)
    return {str(index): source for index, source in sources.items()}, pairs
