"""Figures of sweeps: a line over one setting, a heat map over two, points over the number of experts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from plait.evaluate.results import Interval, Point, Sweep
from plait.report.boards import mean_interval
from plait.report.figures import Figure, Key, Trace, axis, band, bold, colour, layout, line, symbol
from plait.report.text import count, percent, plain, plot_text

_SHARE = "share of the experts, %"
_HOW_LINES = (
    "Each point is one merge. The heavy line is the mean share of the experts' scores, its band the 95 % interval; "
    "thin lines are single tasks. A flat top says that the setting hardly matters there; thin lines that peak at "
    "different places are what no single value can serve."
)
_HOW_MARKS = (
    "Each column is one merge. The large mark is the mean share of the experts' scores with its 95 % interval, small "
    "marks are single tasks. Intervals that overlap say that the difference may be chance."
)


def sweep_figure(sweep: Sweep) -> Figure | None:
    """The figure that fits the sweep's axes; None when there is nothing to compare."""
    settings = [name for name in sweep.axes if name != "experts"]
    if len(_groups(sweep.points, list(sweep.axes), sweep.axes)) < 2:
        return None
    if not settings:
        return _by_experts(sweep)
    if len(sweep.axes) == 1:
        return _by_setting(sweep, settings[0])
    return _by_two(sweep, list(sweep.axes)[:2])


def setting_name(path: str) -> str:
    """`parameters.weight` → `weight`: what the recipe calls it, without the way there."""
    return path.removeprefix("parameters.") if path != "experts" else "number of experts"


def _at(point: Point, name: str) -> Any:
    return len(point.experts) if name == "experts" else point.settings.get(name)


def _groups(points: Iterable[Point], names: Sequence[str], axes: dict[str, list[Any]]) -> dict[str, list[Point]]:
    """Points by their values of some axes, in the axes' order."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(_key(_at(point, name) for name in names), []).append(point)
    order = {name: {_key([value]): i for i, value in enumerate(axes[name])} for name in names}

    def rank(key: str) -> list[Any]:
        return [(order[n].get(_key([v]), 1e9), v if n == "experts" else 0)
                for n, v in zip(names, json.loads(key), strict=True)]  # fmt: skip

    return {key: found[key] for key in sorted(found, key=rank)}


def _key(values: Iterable[Any]) -> str:
    return json.dumps(list(values), sort_keys=True)


def _positions(values: list[Any], title: str) -> tuple[list[float], dict[str, Any]]:
    """Numbers stand where they are; anything else stands side by side."""
    if _numbers(values):
        made = axis(plot_text(title), showgrid=False)
        if len(values) <= 12:
            made |= {"tickvals": values, "ticktext": [plain(value) for value in values]}
        return [float(value) for value in values], made
    names = [plot_text(plain(value), 16) for value in values]
    return [float(i) for i in range(len(values))], axis(
        plot_text(title), tickvals=list(range(len(values))), ticktext=names, showgrid=False
    )


def _curve(
    x: list[float], parts: list[Interval], name: str, paint: str, mark: str, labels: list[str], joined: bool
) -> list[Trace]:
    """A heavy line in a band; marks with whiskers where nothing lies between the values."""
    hover = [
        f"{bold(label)}<br>{name}: {percent(part.value)} % ({percent(part.low)} to {percent(part.high)})"
        for label, part in zip(labels, parts, strict=True)
    ]
    high, low = [100 * part.high for part in parts], [100 * part.low for part in parts]
    middle = [100 * part.value for part in parts]
    drawn = line(
        x, middle, paint, hover, mode="lines+markers" if joined else "markers",
        line={"color": paint, "width": 2.8}, marker={"color": paint, "size": 8 if joined else 10, "symbol": mark},
    )  # fmt: skip
    if joined:
        return [band(x, low, high, f"{paint}/18"), drawn]
    drawn["error_y"] = {
        "type": "data", "symmetric": False, "array": [h - m for h, m in zip(high, middle, strict=True)],
        "arrayminus": [m - v for v, m in zip(low, middle, strict=True)], "color": f"{paint}/60", "thickness": 2,
        "width": 0,
    }  # fmt: skip
    return [drawn]


def _numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _by_setting(sweep: Sweep, name: str) -> Figure:
    title = setting_name(name)
    groups = list(_groups(sweep.points, [name], sweep.axes).values())
    values = [_at(group[0], name) for group in groups]
    joined = _numbers(values)
    if joined:
        groups, values = zip(*sorted(zip(groups, values, strict=True), key=lambda p: p[1]), strict=True)
        groups, values = list(groups), list(values)
    x, xaxis = _positions(values, title)
    labels = [f"{title} {plain(value)}" for value in values]
    data: list[Trace] = []
    keys: list[Key] = []
    for place, task in enumerate(sweep.suite.tasks):
        ys = [
            100 * sum(own) / len(own) if (own := [p.normalised[task] for p in group if task in p.normalised]) else None
            for group in groups
        ]
        if any(y is not None for y in ys):
            hover = ["" if y is None else f"{bold(task)}, {plot_text(label)}<br>{y:.1f} %"
                     for y, label in zip(ys, labels, strict=True)]  # fmt: skip
            keys.append(Key(task, (len(data),), colour(place), symbol(place), line=joined))
            data.append(line(
                x, ys, colour(place), hover, line={"color": colour(place), "width": 1.2}, opacity=0.7,
                marker={"color": colour(place), "size": 5 if joined else 7, "symbol": symbol(place)},
                mode="lines+markers" if joined else "markers",
            ))  # fmt: skip
    seen = [mean_interval([point.seen for point in group]) for group in groups]
    unseen = [mean_interval([p.unseen for p in g if p.unseen]) if any(p.unseen for p in g) else None for g in groups]
    kinds: list[tuple[str, str, str, Sequence[Interval | None]]] = [
        ("mean, merged tasks" if any(unseen) else "mean", "@ink", "circle", seen)
    ]
    if any(unseen):
        kinds.append(("mean, unseen tasks", "@c1", "diamond", unseen))
    lead: list[Key] = []
    for name, paint, mark, parts in kinds:
        known = [(x[i], part, labels[i]) for i, part in enumerate(parts) if part is not None]
        drawn = _curve([at for at, _, _ in known], [part for _, part, _ in known], name, paint, mark,
                       [label for _, _, label in known], joined)  # fmt: skip
        lead.append(Key(name, tuple(range(len(data), len(data) + len(drawn))), paint, mark, line=joined))
        data += drawn
    best = max(range(len(seen)), key=lambda i: seen[i].value)
    drop = [{"type": "line", "x0": x[best], "x1": x[best], "yref": "paper", "y0": 0, "y1": 1, "layer": "below",
             "line": {"color": "@soft", "width": 1.2, "dash": "dot"}}]  # fmt: skip
    return Figure(
        title=f"{sweep.method} over {title}",
        note=_HOW_LINES if joined else _HOW_MARKS,
        finding=f"The mean peaks at {title} {plain(values[best])}, with {percent(seen[best].value)} % of the experts "
        f"({percent(seen[best].low)} to {percent(seen[best].high)}).",
        data=data,
        layout=layout(xaxis=xaxis, yaxis=axis(_SHARE), shapes=drop),
        height=400,
        keys=(*lead, *keys),
        narrow={"xaxis.tickmode": "auto", "xaxis.nticks": 6} if x == values else {},
    )


def _by_experts(sweep: Sweep) -> Figure:
    groups = _groups(sweep.points, ["experts"], sweep.axes)
    members = sorted(groups.values(), key=lambda group: len(group[0].experts))
    sizes = [len(group[0].experts) for group in members]
    data: list[Trace] = []
    keys: list[Key] = []
    kinds = [("merged tasks", "@accent", "circle", lambda p: p.seen)]
    if any(point.unseen for point in sweep.points):
        kinds.append(("other tasks", "@c1", "diamond", lambda p: p.unseen))
    ends: dict[str, tuple[float, float]] = {}
    for name, paint, mark, pick in kinds:
        shown = [
            (size + 0.2 * ((i + 0.5) / len(group) - 0.5), part, point)
            for size, group in zip(sizes, members, strict=True)
            for i, point in enumerate(group)
            if (part := pick(point)) is not None
        ]
        middle = [
            (size, sum(parts) / len(parts))
            for size, group in zip(sizes, members, strict=True)
            if (parts := [part.value for point in group if (part := pick(point)) is not None])
        ]
        ends[name] = (middle[0][1], middle[-1][1])
        keys.append(Key(name, (len(data), len(data) + 1), paint, mark, line=True))
        data.append({
            "type": "scatter", "mode": "markers", "x": [x for x, _, _ in shown],
            "y": [100 * part.value for _, part, _ in shown],
            "error_y": {
                "type": "data", "symmetric": False, "array": [100 * (p.high - p.value) for _, p, _ in shown],
                "arrayminus": [100 * (p.value - p.low) for _, p, _ in shown], "color": f"{paint}/35",
                "thickness": 1.2, "width": 0,
            },
            "marker": {"color": f"{paint}/60", "size": 7, "symbol": mark, "line": {"width": 0}},
            "hoverinfo": "text",
            "hovertext": [
                f"{bold(count(len(point.experts), 'expert'))}: {plot_text(', '.join(point.experts), 60)}<br>{name}: "
                f"{percent(part.value)} % ({percent(part.low)} to {percent(part.high)})"
                for _, part, point in shown
            ],
        })  # fmt: skip
        data.append(line(
            [float(size) for size, _ in middle], [100 * value for _, value in middle], paint,
            [f"{bold(count(size, 'expert'))}<br>{name}, mean: {percent(value)} %" for size, value in middle],
            mode="lines", line={"color": paint, "width": 2.8},
        ))  # fmt: skip
    first, last = ends["merged tasks"]
    return Figure(
        title=f"{sweep.method} over the number of experts",
        note="Each point is one subset of the experts with its 95 % interval, the line the mean over subsets. How fast "
        "the merged tasks fall says how much room the experts leave each other; tasks whose expert was not merged show "
        "what the merge carries over.",
        finding=f"From {sizes[0]} to {count(sizes[-1], 'expert')} the merged tasks go from {percent(first)} to "
        f"{percent(last)} % of their experts.",
        data=data,
        layout=layout(
            xaxis=axis("experts merged", tickvals=sizes, showgrid=False, range=[sizes[0] - 0.4, sizes[-1] + 0.4]),
            yaxis=axis(_SHARE),
        ),
        height=360,
        keys=tuple(keys),
    )


def _by_two(sweep: Sweep, names: list[str]) -> Figure:
    across, down = names
    columns = [_at(group[0], across) for group in _groups(sweep.points, [across], sweep.axes).values()]
    lines = [_at(group[0], down) for group in _groups(sweep.points, [down], sweep.axes).values()]
    groups = _groups(sweep.points, names, sweep.axes)
    cells: list[list[float | None]] = []
    for value in lines:
        found = [groups.get(_key([column, value])) for column in columns]
        cells.append([_best(group, len(sweep.axes) > 2) if group else None for group in found])
    top, at, of = max(
        (cell, i, j) for i, row in enumerate(cells) for j, cell in enumerate(row) if cell is not None
    )  # fmt: skip
    bottom = min(cell for row in cells for cell in row if cell is not None)
    written = [["" if cell is None else f"{100 * cell:.1f}" for cell in row] for row in cells]
    wide = setting_name(across), setting_name(down)
    rest = [setting_name(name) for name in sweep.axes if name not in names]
    fitting = f" Every cell shows the best over {', '.join(rest)}." if rest else ""
    return Figure(
        title=f"{sweep.method} over {wide[0]} and {wide[1]}",
        note="Each cell is the mean share of the experts' scores in %; darker is better, and the frame marks the best. "
        "A broad dark field says that the recipe forgives; a narrow one says that it must be tuned." + fitting,
        finding=f"The best is {percent(top)} % of the experts, at {wide[0]} {plain(columns[of])} and {wide[1]} "
        f"{plain(lines[at])}.",
        data=[{
            "type": "heatmap", "x": list(range(len(columns))), "y": list(range(len(lines))), "z": cells,
            "zmin": bottom - 0.15 * (top - bottom), "zmax": top, "colorscale": [[0, "@raised"], [1, "@heat"]],
            "showscale": False, "xgap": 2, "ygap": 2, "text": written, "texttemplate": "%{text}",
            "textfont": {"color": "@ink", "size": 12}, "hoverinfo": "text", "hoverongaps": False,
            "hovertext": [
                [f"{plot_text(wide[0])} {bold(plain(column))}<br>{plot_text(wide[1])} {bold(plain(value))}<br>{text} %"
                 for column, text in zip(columns, row, strict=True)]
                for value, row in zip(lines, written, strict=True)
            ],
        }],
        layout=layout(
            xaxis=axis(plot_text(wide[0]), tickvals=list(range(len(columns))), showgrid=False,
                       ticktext=[plot_text(plain(value), 16) for value in columns]),
            yaxis=axis(plot_text(wide[1], 20), tickvals=list(range(len(lines))), showgrid=False, autorange="reversed",
                       ticktext=[plot_text(plain(value), 16) for value in lines]),
            shapes=[{"type": "rect", "x0": of - 0.48, "x1": of + 0.48, "y0": at - 0.48, "y1": at + 0.48,
                     "line": {"color": "@ink", "width": 2}}],
        ),
        height=max(240, 90 + 44 * len(lines)),
    )  # fmt: skip


def _best(group: list[Point], several: bool) -> float:
    values = [point.seen.value for point in group]
    return max(values) if several else sum(values) / len(values)
