"""Bytes and seconds, as people write and read them."""

from __future__ import annotations

import re

from plait.errors import RecipeError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: int | str, key: str) -> int:
    """`512MB`, `4 GiB` or a number of bytes. RecipeError naming `key` for anything else."""
    if isinstance(text, int) and not isinstance(text, bool):
        value = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
        unit = match[2].upper() if match else ""
        if match is None or unit not in _UNITS:
            raise RecipeError(f"{key}: must be a size such as 512MB or 4GB, got {text!r}")
        value = int(float(match[1]) * _UNITS[unit])
    if value <= 0:
        raise RecipeError(f"{key}: must be more than zero, got {text!r}")
    return value


def show_bytes(count: float) -> str:
    """`1.3 GB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def show_latency(seconds: float) -> str:
    """`4.2 ms`."""
    return f"{1000 * seconds:.{0 if seconds >= 0.1 else 1 if seconds >= 0.001 else 3}f} ms"


def show_seconds(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
