"""Write the README.md of an export, which a hub shows: base model, licence, method, measured figures, how to load it."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from calibration_store.api import read_metrics
from calibration_store.errors import StoreError
from calibration_store.files import atomic_path
from calibration_store.layout import CARD_MARKER, EvaluationPaths, QuantizedModelPaths
from calibration_store.model_folder import BUNDLED_MODEL, FILE_WORDS
from calibration_store.quantized_model import is_export, read_export
from calibration_store.sizes import format_bytes
from w4a8 import __version__
from w4a8.model.catalog import ModelInfo
from w4a8.model.diffusionkit import MMDIT_CKPT
from w4a8.model.licences import licence_of, original_of
from w4a8.quantized.export import ExportSource, Size
from w4a8.quantized.model import StoredWeights
from w4a8.report.page import TEMPLATES

MEASURED = re.compile(r"^## Measured\n.*?(?=^## )", re.MULTILINE | re.DOTALL)
GGUF_ROW = re.compile(r"^\| `(.+?\.gguf)` \| [^|]+ \| (.+?) \|$", re.MULTILINE)
OTHER_FILES = {".gguf": "the transformer, under the original names", ".safetensors": "DiffusionKit's 4-bit layout"}
FILE_TABLE = re.compile(r"(^\| file \| bytes \| what \|\n\| --- .*\n)(?:\|.*\n)*", re.MULTILINE)


def write_model_card(
    paths: QuantizedModelPaths, export: ExportSource, size: Size, calib_dir: Path, layout: str, exported: Path
) -> Path | None:
    """Write README.md beside an export, and the picture of stage 4 where there is one; return its path.

    layout: the value of --format; exported: the file or the folder that was written. Figures come from metrics.json in
    the calibration folder, where stage 4 has measured this run. Beside a model in MLX's layout the card is that model's:
    another layout's files are added to its table, and None is returned. Raises WriteError.
    """
    said = words_of_gguf(paths)
    if layout == "gguf":
        said[exported.name] = (
            f"the transformer, under the original names: {export.weights_name}, {figure_of(export, calib_dir)}"
        )
    if layout != "mlx" and paths.config.exists():
        list_files(paths, said)
        return None
    info, note = export.info, export.note({})
    groups = f"groups of {note['group_size']}" if note["group_size"] else "one scale per output channel"
    metrics = measured_of(measured(calib_dir), export.weights_name, layout)
    content = filled(
        "model_card.md.jinja",
        marker=CARD_MARKER,
        title=f"{base_name(info)}, {note['weights']}",
        base=original_of(info),
        diffusionkit=info.hub_id in MMDIT_CKPT,
        original=BUNDLED_MODEL if info.version == BUNDLED_MODEL else "A model folder",
        licence=licence_of(info),
        bits=note["weight_bits"],
        learned=isinstance(export.weights, StoredWeights),
        groups=groups + (", single layers at other bits" if note["layer_bits"] else ""),
        activations=export.rule.exported()["rule"] if export.rule is not None else None,  # type: ignore[index]
        files=file_rows(paths, said),
        weights_name=export.weights_name,
        variants=",".join(dict.fromkeys((export.weights_name.replace("adaround", "rtn"), export.weights_name))),
        transformer=format_bytes(size.transformer),
        share=f"{size.transformer / size.transformer_float16:.2f}",
        **measured_values(paths, calib_dir, metrics),
        layout=layout,
        gguf=exported.name,
        sd3=info.family.architecture == "sd3",
        guided=info.guidance is not None,
        diffusers="SD3Transformer2DModel" if info.family.architecture == "sd3" else "FluxTransformer2DModel",
        default_steps=info.num_steps,
        default_cfg=f"{info.cfg_weight or 1:g}",
        shift=info.sampler_shift,
        t5=info.use_t5,
        version=__version__,
        model_version=base_name(info) if info.folder is not None else info.version,
        weights=note["weights_fingerprint"][:16],
        calibration_run=note["calibration_run"],
    )
    with atomic_path(paths.card) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return paths.card


def base_name(info: ModelInfo) -> str:
    """Return the name of the original model: of its folder, or of its repository without the owner."""
    return info.folder.name if info.folder is not None else info.version.rpartition("/")[2]


def measured(calib_dir: Path) -> dict[str, Any] | None:
    """Return what stage 4 measured of the run in a calibration folder, or None where there is nothing of this run."""
    try:
        return read_metrics(calib_dir)
    except StoreError:  # there is none, or it is of another run
        return None


def measured_of(metrics: dict[str, Any] | None, weights: str, layout: str) -> dict[str, Any] | None:
    """Return the metrics with the variants of these weights, and nearest rounding beside them; None without the former.

    In MLX's layout they are measured as `native`, too.
    """
    if metrics is None:
        return None
    names = (weights, "native") if layout == "mlx" else (weights,)
    own = {name: row for name, row in metrics["variants"].items() if name.partition("+")[0] in names}
    nearest = {
        name: row
        for name, row in metrics["variants"].items()
        if re.sub(r"-g\d+$", "", name) == re.sub(r"-.*", "-rtn", weights)
    }
    return {**metrics, "variants": nearest | own} if own else None


def show_measured(calib_dir: Path, evaluation: EvaluationPaths) -> None:
    """Put what stage 4 has measured into the card of the folder's export; the rest of the card stays. Raises WriteError.

    Nothing changes where the evaluation is another one than the folder's, the export's weights were not measured, or
    stage 5 did not write the card.
    """
    paths, own = QuantizedModelPaths.below(calib_dir), EvaluationPaths.below(calib_dir)
    if evaluation.root != own.root or paths.card not in paths.card_files() or not is_export(paths.config):
        return
    try:
        note = read_export(paths.root)["export"]
    except StoreError:  # stage 5 and the report say what is wrong with the export
        return
    metrics = measured_of(measured(calib_dir), note["weights"], "mlx")
    if metrics is None:
        return
    section = filled("model_card_measured.md.jinja", **measured_values(paths, calib_dir, metrics)) + "\n"
    content = MEASURED.sub(lambda _: section, paths.card.read_text(encoding="utf-8"), count=1)
    with atomic_path(paths.card) as temporary:
        temporary.write_text(content, encoding="utf-8")


def measured_values(paths: QuantizedModelPaths, calib_dir: Path, metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the words of the card's section on what was measured, and copy stage 4's picture beside the card."""
    grid = EvaluationPaths.below(calib_dir).grid
    if metrics is None or not grid.exists():
        picture = None
    else:
        picture = paths.comparison.name
        with atomic_path(paths.comparison) as temporary:
            shutil.copyfile(grid, temporary)
    return {
        "rows": [] if metrics is None else [variant_row(name, row) for name, row in metrics["variants"].items()],
        "images": 0 if metrics is None else len(metrics["prompts"]),
        "steps": 0 if metrics is None else metrics["num_steps"],
        "picture": picture,
    }


def filled(template: str, **values: Any) -> str:
    """Return one of the card's templates with its words filled in."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), keep_trailing_newline=True)
    return environment.get_template(template).render(values)


def words_of_gguf(paths: QuantizedModelPaths) -> dict[str, str]:
    """Return {file: what the card says of it} of the GGUF files in the card's table; none where stage 5 wrote no card."""
    if paths.card not in paths.card_files():
        return {}
    found = FILE_TABLE.search(paths.card.read_text(encoding="utf-8"))
    return dict(GGUF_ROW.findall(found[0])) if found else {}


def figure_of(export: ExportSource, calib_dir: Path) -> str:
    """Return what stage 4 measured of an export's weights, in dB, or that it did not."""
    metrics = measured(calib_dir)
    row = metrics["variants"].get(export.weights_name) if metrics is not None else None
    mean = None if row is None else row["psnr"]["mean"]
    return "not measured" if row is None else "equal images" if mean is None else f"{mean:.1f} dB"


def list_files(paths: QuantizedModelPaths, said: Mapping[str, str]) -> None:
    """Put the files that the folder holds now into the table of its card; the rest of the card stays. Raises WriteError.

    A card that stage 5 did not write is left alone. said: what is said of the GGUF files.
    """
    if paths.card not in paths.card_files():
        return
    rows = "".join(f"| `{row['name']}` | {row['size']} | {row['what']} |\n" for row in file_rows(paths, said))
    content = paths.card.read_text(encoding="utf-8")
    content = FILE_TABLE.sub(lambda found: found[1] + rows, content, count=1)
    with atomic_path(paths.card) as temporary:
        temporary.write_text(content, encoding="utf-8")


def file_rows(paths: QuantizedModelPaths, said: Mapping[str, str]) -> list[dict[str, str]]:
    """Return a row of the card's table for each file that stage 5 wrote to a folder, in every layout.

    said: what is said of the GGUF files, by name.
    """
    mflux = sorted(file for folder in paths.mflux_files() for file in folder.iterdir())
    rows = []
    for path in [*sorted(paths.owned_files()), *sorted(paths.gguf_files()), *mflux]:
        what = said.get(path.name) or FILE_WORDS.get(path.name, "")
        name, size = path.relative_to(paths.root).as_posix(), format_bytes(path.stat().st_size)
        rows.append({"name": name, "size": size, "what": what or OTHER_FILES[path.suffix]})
    return rows


def variant_row(name: str, metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return the row of a variant in the card's table of figures."""
    psnr, (low, high) = metrics["psnr"], metrics["psnr"]["interval"]
    if psnr["mean"] is None:
        return {"name": name, "mean": "equal", "median": "", "worst": "", "ssim": f"{metrics['ssim']['mean']:.3f}"}
    return {
        "name": name,
        "mean": f"{psnr['mean']:.1f} ({low:.1f} – {high:.1f})",
        "median": f"{psnr['median']:.1f}",
        "worst": f"{psnr['worst']:.1f}",
        "ssim": f"{metrics['ssim']['mean']:.3f}",
    }
