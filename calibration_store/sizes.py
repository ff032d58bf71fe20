"""Numbers of bytes as text for people. This module imports nothing, since `--help` loads it."""


def format_bytes(count: float) -> str:
    """Return a number of bytes as text in decimal units: 1234567 -> '1.2 MB'."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
