"""The gate of stage 4: figures that miss their bound end the stage with exit code 1."""

from collections.abc import Collection, Mapping
from typing import Any

from calibration_store.errors import OptionError, UserError
from w4a8.evaluation.paired import gain_words, nearest_of


class GateFailure(UserError):
    """The error of figures that miss --min-psnr, --max-step-error or --min-gain."""

    exit_code = 1


KEPT_EFFECT = 0.9  # cosine of a LoRA's effect before and after rounding, below which stage 4 says that it is drowned
ONLY_IMAGES_ARE_EQUAL = "every image equals the original's, but the latents do not"


def only_images_are_equal(row: Mapping[str, Any]) -> bool:
    """Return whether all images equal the original's although the latents differ.

    The black images of two broken models do so. row: a variant's entry in metrics.json.
    """
    return row["psnr"]["mean"] is None and row["max_step_error"] != 0


def refuse_gain_without_nearest(variants: Collection[str], min_gain: float | None) -> None:
    """Raise OptionError for --min-gain where no variant is compared with round-to-nearest."""
    if min_gain is not None and not any(nearest_of(name, variants) for name in variants):
        raise OptionError(
            f"--min-gain {min_gain:g}: a gain needs quantized weights and round-to-nearest beside them, such as "
            "--variants w4-rtn,w4-adaround"
        )


def check_gate(
    results: dict[str, dict], min_psnr: float | None, max_step_error: float | None, min_gain: float | None = None
) -> None:
    """Raise GateFailure, which names every figure that misses its bound.

    results: {variant: its entry in metrics.json}; min_psnr: dB; max_step_error: relative error of the latents;
    min_gain: dB of the mean gain over round-to-nearest; None: no bound.
    """
    failing = []
    for name, row in results.items():
        mean, worst = row["psnr"]["mean"], row["max_step_error"]
        if min_psnr is not None and only_images_are_equal(row):
            failing.append(f"{name}: {ONLY_IMAGES_ARE_EQUAL}")
        elif min_psnr is not None and mean is not None and not mean >= min_psnr:
            failing.append(f"{name}: mean PSNR {mean:.2f} dB is below --min-psnr {min_psnr:g}")
        if max_step_error is not None and not (worst is not None and worst <= max_step_error):
            shown = "not finite" if worst is None else f"{worst:.4f}"
            failing.append(f"{name}: latent error {shown} is above --max-step-error {max_step_error:g}")
        gain = row.get("gain")
        if min_gain is not None and gain is not None and not gain["mean"] >= min_gain:
            failing.append(f"{name}: {gain_words(gain)}, which is below --min-gain {min_gain:g}")
    if failing:
        raise GateFailure("; ".join(failing) + " (Issue 24)")
