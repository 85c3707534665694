"""The marks of legends as small drawings: the same shapes that plotly draws, in the same colours."""

from __future__ import annotations

import math

from plait.report.figures import Key


def swatch(key: Key) -> str:
    """An SVG of a legend entry's line and mark. Colours come from the page's style, so they follow the theme."""
    name, _, share = key.colour.removeprefix("@").partition("/")
    faint = f' opacity="{int(share) / 100:g}"' if share else ""
    parts = []
    if key.line:
        dash = ' stroke-dasharray="2 3"' if key.symbol is None and name == "soft" else ""
        if key.symbol is None and name == "ink":
            parts.append('<path d="M9 -6V6" stroke="currentColor" stroke-width="2.5"/>')
        else:
            parts.append(f'<path d="M0 0H18" stroke="currentColor" stroke-width="2"{dash}/>')
    if key.symbol:
        fill = "none" if key.symbol.endswith("-open") else "currentColor"
        parts.append(
            f'<path d="{_outline(key.symbol.removesuffix("-open"))}" transform="translate(9 0)" fill="{fill}" '
            'stroke="currentColor" stroke-width="1.2"/>'
        )
    return (
        f'<svg viewBox="0 -7 18 14" width="18" height="14" aria-hidden="true" style="color:var(--{name})"{faint}>'
        f"{''.join(parts)}</svg>"
    )


def _outline(symbol: str) -> str:
    if symbol == "circle":
        return "M-4.3 0a4.3 4.3 0 1 0 8.6 0a4.3 4.3 0 1 0 -8.6 0Z"
    if symbol == "cross":
        return "M-4.6 -1.6H-1.6V-4.6H1.6V-1.6H4.6V1.6H1.6V4.6H-1.6V1.6H-4.6Z"
    if symbol == "x":
        return "M-4.4 -2.2L-2.2 -4.4L0 -2.2L2.2 -4.4L4.4 -2.2L2.2 0L4.4 2.2L2.2 4.4L0 2.2L-2.2 4.4L-4.4 2.2L-2.2 0Z"
    corners, turn, inner = {
        "square": (4, 45, 0.0), "diamond": (4, 0, 0.0), "triangle-up": (3, 0, 0.0), "triangle-down": (3, 180, 0.0),
        "pentagon": (5, 0, 0.0), "hexagon": (6, 30, 0.0), "star": (5, 0, 0.42),
    }[symbol]  # fmt: skip
    steps = corners * 2 if inner else corners
    points = []
    for step in range(steps):
        radius = 5.2 * (inner if inner and step % 2 else 1.0)
        angle = math.radians(turn + 360 * step / steps)
        points.append(f"{radius * math.sin(angle):.2f} {-radius * math.cos(angle):.2f}".replace("-0.00", "0.00"))
    return "M" + "L".join(points) + "Z"
