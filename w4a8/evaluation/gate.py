"""The gate: figures that miss their bound end stage 4 with exit code 1."""

from calibration_store.errors import UserError


class GateFailure(UserError):
    """--min-psnr or --max-step-error is not met."""

    exit_code = 1


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
