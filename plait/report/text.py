"""Text from results is hostile: everything that reaches the page goes through here, for HTML, for plotly and for JSON.

Numbers are shown here too, so that a score looks the same in a card, a cell and a figure.
"""

from __future__ import annotations

import html
import json
import math
import re
from typing import Any

MISSING = "–"
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, characters that turn the direction of what follows, and halves of a surrogate pair."""


def clean(value: object) -> str:
    """The text with a visible mark in place of each character that hides or reorders others."""
    return _UNSEEN.sub("\ufffd", str(value))


def escape(value: object) -> str:
    """For HTML, in text and in quoted attributes."""
    return html.escape(clean(value), quote=True)


def breakable(value: object) -> str:
    """For HTML, where a long name may also break behind its underscores and slashes."""
    return re.sub(r"([_/])", r"\1<wbr>", escape(value))


def prose(value: object) -> str:
    """For HTML, with percent signs that stay beside their numbers."""
    return escape(value).replace(" %", "\u00a0%")


def short(value: object, limit: int) -> str:
    """One line of at most so many characters; not yet safe for anything."""
    line = " ".join(clean(value).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def plot_text(value: object, limit: int = 32) -> str:
    """For plotly, which reads a small HTML of its own: shortened, one line, nothing left to interpret."""
    return html.escape(short(value, limit), quote=False)


def embedded_json(data: Any) -> str:
    """JSON that may stand inside a script element: no `<`, `>` or `&`; numbers that are none become null."""
    text = json.dumps(_finite(data), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return round(data, 6) if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data


def signed(number: str) -> str:
    """With a true minus sign, and none before zero."""
    return re.sub(r"^[+-](?=[0.]+$)", "", number).replace("-", "−")


def percent(fraction: float | None, digits: int = 1) -> str:
    """0.873 → `87.3`; a dash for what is unknown."""
    if fraction is None or not math.isfinite(fraction):
        return MISSING
    return signed(f"{100 * fraction:.{digits}f}")


def points(fraction: float | None) -> str:
    """A difference in percentage points, with its sign: `+1.8`, `−0.4`."""
    if fraction is None or not math.isfinite(fraction):
        return MISSING
    return signed(f"{100 * fraction:+.1f}")


def probability(p: float) -> str:
    """`p < 0.001`, `p = 0.032`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def stars(p: float) -> str:
    """The usual marks for 0.05, 0.01 and 0.001."""
    return "***" if p < 0.001 else "**" if p < 0.01 else "*" if p < 0.05 else ""


def plain(value: object) -> str:
    """A setting as people write it: 0.3, true, [a, b]."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return {True: "true", False: "false", None: "none"}.get(value, str(value))  # pyright: ignore[reportArgumentType]
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value) if isinstance(value, int) else json.dumps(value, ensure_ascii=False)


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def count(number: int, noun: str) -> str:
    """`1 task`, `8 tasks`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
