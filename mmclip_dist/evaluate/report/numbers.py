"""Numbers as text: few digits, units, and words for missing values."""

from __future__ import annotations

import math

NOT_MEASURED = "not measured"

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def is_known(value: float | None) -> bool:
    """Whether the value is a finite number (not None, nan or infinite)."""
    return value is not None and math.isfinite(value)


def significant(value: float | None, digits: int = 3) -> str:
    """A value with `digits` significant digits: 0.0714, 12.3, 4,480, 1.64 × 10⁻⁵."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded value: 9.996 is 10.0, not 10.00
    if exponent >= 7 or exponent < -3:
        return f"{value / 10**exponent:.{digits - 1}f} × {power_of_ten(exponent)}".replace("-", "−")
    return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace("-", "−")


def power_of_ten(exponent: int) -> str:
    """10⁻⁴ for -4."""
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def fixed(value: float | None, decimals: int) -> str:
    """A value with that many decimals, for columns that are compared: 0.667."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    return f"{value:.{decimals}f}".replace("-", "−")


def signed(value: float | None, decimals: int) -> str:
    """As `fixed`, with a plus where the value is positive."""
    return ("+" if value is not None and value > 0 else "") + fixed(value, decimals)


def interval(bounds: tuple[float, float]) -> str:
    """A 95% interval: 0.651 to 0.685."""
    if not all(is_known(bound) for bound in bounds):
        return NOT_MEASURED
    return f"{fixed(bounds[0], 3)} to {fixed(bounds[1], 3)}"


def count(value: int) -> str:
    """Whole numbers with thousands separators: 9,600."""
    return f"{value:,}"


def duration(seconds: float | None) -> str:
    """A time span from seconds: 4.2 s, 48 s, 2 min 05 s, 1 h 12 min."""
    if seconds is None or not math.isfinite(seconds):
        return NOT_MEASURED
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
