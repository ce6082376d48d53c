"""Bytes, seconds, counts and ratios as people read them. A missing number reads "–"."""

from __future__ import annotations

import math

MISSING = "–"


def format_bytes(count: float | None) -> str:
    """1536 -> "1.50 KiB": three significant digits in the largest unit that keeps it above one."""
    if count is None or not math.isfinite(count):
        return MISSING
    if abs(count) < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if abs(count) < 999.5 or unit == "TiB":
            break
    return f"{_three_digits(count)} {unit}"


def format_seconds(seconds: float | None) -> str:
    """0.0123 -> "12.3 ms", 1.5 -> "1.50 s", 200 -> "3 min 20 s", 7260 -> "2 h 1 min"."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if abs(seconds) < 0.9995:
        return f"{_three_digits(seconds * 1000)} ms"
    if seconds < 119.5:
        return f"{_three_digits(seconds)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def format_ratio(ratio: float | None) -> str:
    """0.774 -> "0.77×", 0.0312 -> "0.031×", 12.34 -> "12.3×"."""
    if ratio is None or not math.isfinite(ratio):
        return MISSING
    if 0 < ratio < 0.1:
        return f"{ratio:.{1 - math.floor(math.log10(ratio))}f}×"
    return f"{ratio:.2f}×" if ratio < 9.995 else f"{_three_digits(ratio)}×"


def format_percent(fraction: float | None) -> str:
    """0.8765 -> "87.7%"."""
    if fraction is None or not math.isfinite(fraction):
        return MISSING
    return f"{100 * fraction:.1f}%"


def format_loss(loss: float | None) -> str:
    """1.23456 -> "1.235"."""
    return MISSING if loss is None or not math.isfinite(loss) else f"{loss:.3f}"


def format_score(score: float | None) -> str:
    """A correlation or an F1 of 0.8127 -> "0.813"."""
    return format_loss(score)


def format_count(count: float | None) -> str:
    """134515008 -> "134.5 M"; below ten thousand every digit is kept."""
    if count is None or not math.isfinite(count):
        return MISSING
    if abs(count) < 10_000:
        return f"{count:,.0f}"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= 0.99995 * size:
            return f"{count / size:.1f} {unit}"
    raise AssertionError("unreachable: every count of ten thousand has a unit")


def ratio_of(value: float | None, baseline: float | None) -> float | None:
    """`value / baseline`, or None where that says nothing."""
    if value is None or baseline is None or not baseline:
        return None
    ratio = value / baseline
    return ratio if math.isfinite(ratio) else None


def _three_digits(value: float) -> str:
    magnitude = abs(value)
    return f"{value:.{2 if magnitude < 9.995 else 1 if magnitude < 99.95 else 0}f}"
