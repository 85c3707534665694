"""What all figures share: one shape for a figure, quiet axes, colours by role, marks that differ without colour.

Figures are plain data. Colours are names such as `@ink` or `@c3/20` (20 % of it); the page's script puts in those of
the theme, so that one figure serves light, dark and paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from plait.report.text import plot_text

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "pentagon", "star", "hexagon")
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif'
Trace = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """One entry of a legend: pressing it hides and shows its traces."""

    label: str
    traces: tuple[int, ...]
    colour: str
    symbol: str | None = None
    line: bool = False
    on: bool = True


@dataclass(frozen=True)
class Figure:
    """A plot with its words. `square` is the margin around a plot whose height follows its width."""

    title: str
    note: str
    """How to read it, in a sentence or two."""
    finding: str
    """What it says here; also what a screen reader is told."""
    data: list[Trace]
    layout: dict[str, Any]
    height: int = 320
    square: tuple[int, int] | None = None
    keys: tuple[Key, ...] = ()
    half: bool = False
    """Fits beside another one."""
    labelled: bool = False
    """The marks carry their names, so the legend is for phones only."""
    narrow: dict[str, Any] = field(default_factory=dict)
    """What differs on a phone: a path in the layout or, after `data.`, in every trace → its value."""


def colour(index: int) -> str:
    """The colour of the i-th series."""
    return f"@c{index % 10}"


def symbol(index: int) -> str:
    """The mark of the i-th series: hollow from the eleventh on, so that 20 series differ."""
    return SYMBOLS[index % 10] + ("-open" if index // 10 % 2 else "")


def axis(title: str = "", **more: Any) -> dict[str, Any]:
    """A quiet axis. Words from results must have gone through plot_text."""
    made: dict[str, Any] = {
        "gridcolor": "@grid", "linecolor": "@line", "tickcolor": "@line", "zeroline": False, "fixedrange": True,
        "automargin": True, "tickfont": {"color": "@soft", "size": 12}, "ticklabelstandoff": 4,
    }  # fmt: skip
    if title:
        made["title"] = {"text": title, "font": {"color": "@soft", "size": 12.5}, "standoff": 12}
    return {**made, **more}


def layout(**more: Any) -> dict[str, Any]:
    """The rest of a quiet plot."""
    return {
        "font": {"family": FONT, "size": 12.5, "color": "@ink"},
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 12, "t": 10, "b": 8}, "showlegend": False, "dragmode": False, "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": "@raised", "bordercolor": "@line", "font": {"color": "@ink", "size": 12.5}, "align": "left",
            "namelength": -1,
        },
        **more,
    }  # fmt: skip


def band(x: list[Any], low: list[float], high: list[float], fill: str) -> Trace:
    """The area between two lines."""
    return {
        "type": "scatter", "mode": "lines", "x": [*x, *reversed(x)], "y": [*high, *reversed(low)], "fill": "toself",
        "fillcolor": fill, "line": {"width": 0, "color": fill}, "hoverinfo": "skip",
    }  # fmt: skip


def line(x: list[Any], y: list[Any], colour: str, hover: list[str], **more: Any) -> Trace:
    """A line with small marks."""
    return {
        "type": "scatter", "mode": "lines+markers", "x": x, "y": y, "line": {"color": colour, "width": 2},
        "marker": {"color": colour, "size": 6}, "hoverinfo": "text", "hovertext": hover, **more,
    }  # fmt: skip


def bold(value: object) -> str:
    """For plotly: the one piece of markup that we write ourselves."""
    return f"<b>{plot_text(value)}</b>"


def nice_range(low: float, high: float, step: float, least: float = -math.inf, most: float = math.inf) -> list[float]:
    """Rounded outwards to steps, within limits."""
    return [max(math.floor(low / step) * step, least), min(math.ceil(high / step) * step, most)]


def step_for(span: float) -> float:
    """1, 2 or 5 times a power of ten: about five steps over the span."""
    if span <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next((power * m for m in (1, 2, 5) if span / (power * m) <= 6), power * 10)
