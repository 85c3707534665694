"""Granules of a model, which are tensors, modules or layers, from input to output: heat maps with depth across."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from plait.layers import Layers
from plait.report.figures import Trace, axis, bold, layout
from plait.report.inspected import named_levels, side_of
from plait.report.text import plot_text

_WRITTEN = 16
"""Up to so many columns the numbers stand in their cells."""


@dataclass(frozen=True)
class Run:
    """Granules side by side that belong to one layer, or stand before or after all layers."""

    label: str
    first: int
    last: int


def in_depth(names: Iterable[str]) -> tuple[list[str], list[Run]]:
    """Granules from input to output, and the runs that they make; no runs where the names tell of no layers."""
    whole = {name: f"{name}.all" for name in names}  # a layer may be a granule, and its number then ends the name
    layers = Layers([*whole.values(), *_frozen(whole.values())])
    keys = {name: side_of(layers, whole[name]) for name in whole}
    ordered = sorted(whole, key=lambda name: (keys[name], name))
    labels = {0: "before", 3: "after"}
    runs: list[Run] = []
    for at, name in enumerate(ordered):
        side, _, index = keys[name]
        if at and keys[name] == keys[ordered[at - 1]]:
            runs[-1] = Run(runs[-1].label, runs[-1].first, at)
        else:
            runs.append(Run(labels.get(side, str(index)), at, at))
    return ordered, runs if any(side in (1, 2) for side, _, _ in keys.values()) else []


def _frozen(names: Iterable[str]) -> list[str]:
    """Names for the layers below the given ones: what was not trained has no granules, but it counts in depth."""
    last: dict[str, int] = {}
    for name in names:
        match = re.match(r"((?:[^.]+\.)*?)(\d{1,3})\.", name)
        if match:
            last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    return [f"{stack}{index}.all" for stack, top in last.items() for index in range(top)]


def heat(
    names: list[str], runs: list[Run], rows: Sequence[str], cells: list[list[float]], show: Callable[[float], str],
    ends: tuple[float, float], scale: list[Any], *, percents: bool = False, across: str = "layer",
    most: int = 24, hover: list[list[str]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What a figure needs: granules across, rows down; numbers in the cells where there is room for them.

    `across` names the axis of runs, of which `most` are numbered; `hover` says more of a cell than its names and its
    number, in plotly's text.
    """
    written = len(names) <= _WRITTEN
    texts = [[show(value) for value in row] for row in cells]
    shown: Trace = {
        "type": "heatmap", "x": list(range(len(names))), "y": list(range(len(rows))), "z": cells, "zmin": ends[0],
        "zmax": ends[1], "colorscale": scale, "showscale": not written,
        "colorbar": {"thickness": 9, "outlinewidth": 0, "ticks": "", "tickfont": {"color": "@soft", "size": 11},
                     "tickformat": ".0%" if percents else ".2f", "nticks": 4},
        "xgap": 2 if written else 0, "ygap": 2, "hoverinfo": "text",
        "hovertext": hover or [
            [f"{bold(row)}<br>{plot_text(name, 60)}<br>{text}" for name, text in zip(names, line_, strict=True)]
            for row, line_ in zip(rows, texts, strict=True)
        ],
    }  # fmt: skip
    if written:
        shown |= {"text": texts, "texttemplate": "%{text}", "textfont": {"color": "@ink", "size": 12}}
    seams = [] if written else [
        {"type": "line", "x0": run.first - 0.5, "x1": run.first - 0.5, "yref": "paper", "y0": 0, "y1": 1,
         "line": {"color": "@raised", "width": 1.5}}
        for run in runs[1:]
    ]  # fmt: skip
    quiet = {"showgrid": False, "showline": False, "ticks": ""}
    return {
        "data": [shown],
        "layout": layout(
            xaxis=axis(
                across if runs else "", **_named(names, runs, most), **quiet, range=[-0.5, len(names) - 0.5],
                tickangle=0,
            ),
            yaxis=axis(
                tickvals=list(range(len(rows))), ticktext=[plot_text(row, 14) for row in rows], **quiet,
                range=[len(rows) - 0.5, -0.5],
            ),
            shapes=seams, margin={"l": 8, "r": 24, "t": 10, "b": 8},
        ),
        "height": 90 + max(26 * len(rows), 60),
        "narrow": {
            **{f"xaxis.{key}": value for key, value in _named(names, runs, 8).items()}, "yaxis.tickfont.size": 11,
            **({"data.textfont.size": 10 if len(names) <= 6 else 7} if written else {}),
        },
    }  # fmt: skip


def _named(names: list[str], runs: list[Run], most: int) -> dict[str, Any]:
    """Layers by number at their middle; without layers the only granule by its name."""
    if not runs:
        only = {"all": "all tensors"}.get(names[0], names[0]) if len(names) == 1 else ""
        return {"tickvals": [0], "ticktext": [plot_text(only, 18)]}
    shown = [runs[i] for i in named_levels([run.label for run in runs], most)]
    return {"tickvals": [(run.first + run.last) / 2 for run in shown], "ticktext": [run.label for run in shown]}
