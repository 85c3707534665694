"""Figures of the task vectors, from what `plait inspect` found: angles, signs, and sizes over depth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any

from plait.report.figures import Figure, Key, Trace, axis, band, bold, colour, layout, line, symbol
from plait.report.inspected import Inspected, Level, by_depth, named_levels, read_inspection
from plait.report.text import percent, plot_text, signed


def vector_figures(inspection: Mapping[str, Any] | None) -> list[Figure]:
    """Those for which there is something to see."""
    found = read_inspection(inspection)
    if found is None:
        return []
    depth = by_depth(found.tensors)
    several, deep = len(found.tasks) > 1, len(depth) > 1
    made = [
        _cosines(found) if several else None,
        _signs(found) if several else None,
        _signs_by_depth(found.tasks, depth) if several and deep else None,
        _norms_by_depth(found.tasks, depth) if deep else None,
    ]
    return [figure for figure in made if figure is not None]


def _cosines(found: Inspected) -> Figure:
    tasks, values = found.tasks, found.overall.cosine
    pairs = {(a, b): values[a][b] for a, b in combinations(range(len(tasks)), 2)}
    near = max(pairs, key=lambda pair: pairs[pair])
    mean = sum(pairs.values()) / len(pairs)
    most = max(0.2, *(abs(value) for value in pairs.values()))
    return Figure(
        title="Angles between task vectors",
        note="Cosine of what two experts learned: 0 when they moved in unrelated directions, 1 in the same, below 0 "
        "against each other. Near zero, merging adds skills that hardly touch; large values say that they share.",
        finding=f"{tasks[near[0]]} and {tasks[near[1]]} are closest ({_cosine(pairs[near])}); "
        f"the mean over all pairs is {_cosine(mean)}.",
        **_matrix(tasks, values, _cosine, (-most, most), [[0, "@cool"], [0.5, "@raised"], [1, "@heat"]]),
    )


def _signs(found: Inspected) -> Figure:
    tasks, values = found.tasks, found.overall.sign_agreement
    pairs = {(a, b): values[a][b] for a, b in combinations(range(len(tasks)), 2)}
    far = min(pairs, key=lambda pair: pairs[pair])
    most = max(0.05, *(abs(value - 0.5) for value in pairs.values()))
    return Figure(
        title="Agreement of signs",
        note="Of the weights that both experts changed, the share, in %, that both moved the same way. Chance gives "
        "50: weights that disagree pull against each other in a plain sum; TIES holds its election over exactly those.",
        finding=f"{tasks[far[0]]} and {tasks[far[1]]} agree least ({percent(pairs[far])} %).",
        **_matrix(
            tasks, values, percent, (0.5 - most, 0.5 + most),
            [[0, "@cool"], [0.5, "@raised"], [1, "@heat"]],
        ),
    )  # fmt: skip


def _cosine(value: float) -> str:
    return signed(f"{value:.2f}")


def _matrix(tasks: list[str], values: Any, show: Any, ends: tuple[float, float], scale: list[Any]) -> dict[str, Any]:
    """A square of numbers; the diagonal says nothing and stays empty."""
    size = len(tasks)
    names = [plot_text(task, 14) for task in tasks]
    cells = [[None if i == j else float(values[i][j]) for j in range(size)] for i in range(size)]
    written = [["" if v is None else show(v) for v in row] for row in cells]
    numbers = size <= 16
    shown: Trace = {
        "type": "heatmap", "x": list(range(size)), "y": list(range(size)), "z": cells, "zmin": ends[0],
        "zmax": ends[1], "colorscale": scale, "showscale": not numbers,
        "colorbar": {"thickness": 9, "outlinewidth": 0, "ticks": "", "tickfont": {"color": "@soft", "size": 11},
                     "tickformat": ".0%" if show is percent else ".2f"},
        "xgap": 2, "ygap": 2, "hoverinfo": "text",
        "hoverongaps": False, "text": written if numbers else None,
        "texttemplate": "%{text}" if numbers else None,
        "textfont": {"color": "@ink", "size": 12 if size <= 10 else 9},
        "hovertext": [
            [f"{bold(tasks[i])} and {bold(tasks[j])}<br>{written[i][j]}" for j in range(size)] for i in range(size)
        ],
    }  # fmt: skip
    ticks = {"tickvals": list(range(size)), "ticktext": names, "showgrid": False, "showline": False, "ticks": ""}
    return {
        "data": [{key: value for key, value in shown.items() if value is not None}],
        "layout": layout(
            xaxis=axis(**ticks, side="bottom", tickangle=-45, range=[-0.5, size - 0.5]),
            yaxis=axis(**ticks, range=[size - 0.5, -0.5]),
        ),
        "square": (90, 80),
        "half": True,
        "narrow": {"xaxis.tickfont.size": 11, "yaxis.tickfont.size": 11, "data.textfont.size": 10 if size <= 10 else 7},
    }  # fmt: skip


def _depth_axis(depth: list[Level]) -> dict[str, Any]:
    return axis("layer", **_depth_ticks(depth, 18), showgrid=False, range=[-0.5, len(depth) - 0.5], tickangle=0)


def _depth_ticks(depth: list[Level], most: int) -> dict[str, Any]:
    shown = named_levels([level.label for level in depth], most)
    return {"tickvals": shown, "ticktext": [depth[i].label for i in shown]}


def _narrow(depth: list[Level]) -> dict[str, Any]:
    return {f"xaxis.{key}": value for key, value in _depth_ticks(depth, 8).items()}


def _stacks(depth: list[Level]) -> dict[str, Any]:
    """A hairline between two stacks, and their names, where there is more than one."""
    starts = [i for i, level in enumerate(depth) if i and level.stack != depth[i - 1].stack]
    names = sorted({level.stack for level in depth} - {""})
    lines = [
        {"type": "line", "x0": i - 0.5, "x1": i - 0.5, "yref": "paper", "y0": 0, "y1": 1, "layer": "below",
         "line": {"color": "@line", "width": 1, "dash": "dot"}}
        for i in starts
    ]  # fmt: skip
    words = []
    for name in names if len(names) > 1 else []:
        inside = [i for i, level in enumerate(depth) if level.stack == name]
        words.append({
            "text": plot_text(name.rstrip("."), 20), "x": sum(inside) / len(inside), "y": 1, "yref": "paper",
            "yanchor": "bottom", "showarrow": False, "font": {"color": "@soft", "size": 11},
        })  # fmt: skip
    margin = {"l": 8, "r": 12, "t": 26 if words else 10, "b": 8}
    return {"shapes": lines, "annotations": words, "margin": margin}


def _signs_by_depth(tasks: list[str], depth: list[Level]) -> Figure | None:
    pairs = list(combinations(range(len(tasks)), 2))
    levels, of_pairs = [], []
    for level in depth:
        shares = [100 * share for a, b in pairs if (share := level.agreement(tasks, a, b)) is not None]
        if shares:
            levels.append(level)
            of_pairs.append(shares)
    if len(levels) < 2:
        return None
    x = [depth.index(level) for level in levels]
    means = [sum(row) / len(row) for row in of_pairs]
    unanimous = [100 * (level.unanimous or 0.0) for level in levels]
    chance = 100 * 0.5 ** (len(tasks) - 1)
    hover = [
        f"{bold(level.where)}<br>pairs agree: {mean:.1f} % ({min(row):.1f} to {max(row):.1f})"
        f"<br>all agree: {alone:.1f} %"
        for level, mean, row, alone in zip(levels, means, of_pairs, unanimous, strict=True)
    ]
    data: list[Trace] = []
    keys = []
    if len(tasks) > 2:
        data.append(band(x, [min(row) for row in of_pairs], [max(row) for row in of_pairs], "@accent/16"))
        keys.append(Key("range over pairs", (0,), "@accent/30", "square"))
    keys.append(Key("mean over pairs", (len(data),), "@accent", "circle", line=True))
    data.append(line(x, means, "@accent", hover))
    if len(tasks) > 2:
        keys.append(Key("all experts agree", (len(data),), "@c1", "diamond", line=True))
        data.append(line(x, unanimous, "@c1", hover, marker={"color": "@c1", "size": 7, "symbol": "diamond"}))
    keys.append(Key("by chance", (len(data), len(data) + 1) if len(tasks) > 2 else (len(data),), "@soft", None, True))
    for level in (50.0, chance) if len(tasks) > 2 else (50.0,):
        data.append({
            "type": "scatter", "mode": "lines", "x": [-0.5, len(depth) - 0.5], "y": [level, level],
            "hoverinfo": "skip", "line": {"color": "@soft", "width": 1.2, "dash": "dot"},
        })  # fmt: skip
    low = min(range(len(levels)), key=lambda i: means[i])
    high = max(range(len(levels)), key=lambda i: means[i])
    return Figure(
        title="Agreement of signs by depth",
        note="The share of changed weights that experts moved the same way, pair by pair and all at once, layer by "
        "layer. The closer to the dotted line of chance, the more the experts pull against each other there.",
        finding=f"Pairs agree least {_in(levels[low])} ({means[low]:.1f} %) and most {_in(levels[high])} "
        f"({means[high]:.1f} %).",
        data=data,
        layout=layout(
            xaxis=_depth_axis(depth), yaxis=axis("agree, %", rangemode="tozero"), **_stacks(depth),
        ),
        height=330,
        keys=tuple(keys),
        half=True,
        narrow=_narrow(depth),
    )  # fmt: skip


def _in(level: Level) -> str:
    return f"in {level.where}" if level.label.isdigit() else level.where


def _norms_by_depth(tasks: list[str], depth: list[Level]) -> Figure:
    x = list(range(len(depth)))
    base = [level.base_norm for level in depth]
    data: list[Trace] = []
    keys: list[Key] = []
    totals: dict[str, float] = {}
    for place, task in enumerate(tasks):
        own = [level.norm(task) for level in depth]
        share = [100 * n / b if b else None for n, b in zip(own, base, strict=True)]
        totals[task] = math.hypot(*own)
        keys.append(Key(task, (place,), colour(place), symbol(place), line=True))
        hover = [
            f"{bold(task)}, {plot_text(level.where)}<br>{value:.2f} % of the base's norm" if value is not None else ""
            for level, value in zip(depth, share, strict=True)
        ]
        mark = {"color": colour(place), "size": 6, "symbol": symbol(place)}
        data.append(line(x, share, colour(place), hover, marker=mark, line={"color": colour(place), "width": 1.6}))
    far, near = max(totals, key=lambda t: totals[t]), min(totals, key=lambda t: totals[t])
    told = f"{far} moved the furthest"
    if near != far and totals[near] > 0:
        told += f", {totals[far] / totals[near]:.1f} times as far as {near}"
    return Figure(
        title="Size of task vectors by depth",
        note="How far each expert moved from the base in each layer, as a share of the base's own norm there. An "
        "expert that moved further weighs more in a plain sum; its weight may need to be lower.",
        finding=told + ".",
        data=data,
        layout=layout(
            xaxis=_depth_axis(depth), yaxis=axis("of the base's norm, %", rangemode="tozero"), **_stacks(depth),
        ),
        height=330,
        keys=tuple(keys),
        half=True,
        narrow=_narrow(depth),
    )  # fmt: skip
