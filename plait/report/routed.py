"""Where a routed model sent its inputs: which experts each task's samples met, and what came of wrong turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from plait.evaluate.results import Evaluation, Routing, Row
from plait.report.figures import Figure, Trace, axis, bold, layout
from plait.report.granules import Run, heat
from plait.report.text import breakable, count, listed, percent, plot_text, prose, short, signed

_WRITTEN = 20
"""Up to so many experts the numbers stand in their cells."""
_FINE = 10
"""Up to so many with a decimal."""


def routed_parts(row: Row) -> tuple[str, list[Figure]] | None:
    """Words in HTML and figures of a model that is routed by its input; None for all others."""
    routing = row.evaluation.routing
    if routing is None or not routing.chosen or not routing.experts:
        return None
    told = _verdict(row.evaluation, routing)
    words = f'<h3 class="fit">{breakable(row.label)}</h3>' + (f'<p class="finding">{prose(told)}</p>' if told else "")
    made = [_heaviest(routing), _mixture(routing) if len(routing.routes) == 1 else _by_depth(routing)]
    return words, [figure for figure in made if figure is not None]


def _verdict(found: Evaluation, routing: Routing) -> str:
    """How often the router is right, and what it costs where it is not."""
    if routing.right_mean is None:
        return "No task has an expert in this model, so that no way is right or wrong."
    least = min(routing.right, key=lambda task: routing.right[task])
    said = (
        f"{percent(routing.right_mean)} % of the samples (mean over tasks) have their own task's expert as the heaviest"
    )
    if routing.right[least] < max(routing.right.values()):
        said += f", those of {least} least often ({percent(routing.right[least])} %)"
    known = [task for task in routing.blind if task in found.tasks]
    if not known:
        return said + "."
    told = sum(found.tasks[task].score.value for task in known) / len(known)
    blind = sum(routing.blind[task] for task in known) / len(known)
    over = "" if set(known) == set(found.tasks) else f" over {count(len(known), 'task')}"
    cost = f"mis-routing costs {percent(told - blind)} points" if told > blind else "mis-routing costs nothing"
    return (
        f"{said}. If that expert brought the head too, and nothing were told the task, the average{over} would be "
        f"{percent(blind)} % instead of {percent(told)} %: {cost}."
    )


def _heaviest(routing: Routing) -> Figure:
    """The confusion of the router."""
    shares = {task: [n / max(sum(counts), 1) for n in counts] for task, counts in routing.chosen.items()}
    digits = 1 if len(routing.experts) <= _FINE else 0

    def hover(task: str, place: int) -> str:
        counts = routing.chosen[task]
        return f"{percent(shares[task][place])} %, {counts[place]} of {count(sum(counts), 'sample')}"

    wrong = {
        (task, expert): share
        for task, row in shares.items()
        for expert, share in zip(routing.experts, row, strict=True)
        if task in routing.experts and expert != task and share > 0
    }
    finding = "No sample of a task with an expert goes elsewhere."
    if wrong:
        task, expert = max(wrong, key=lambda pair: wrong[pair])
        finding = f"Most often samples of {task} go to the expert of {expert} ({percent(wrong[task, expert])} %)."
    return Figure(
        title="Each sample's heaviest expert",
        note="The share of a task's samples, in %, that have this expert as their heaviest"
        f"{', by the mean over the layers' if len(routing.routes) > 1 else ''}. Framed is the task's own expert; empty "
        "cells got no sample.",
        finding=finding + _strays(routing),
        **_grid(routing, shares, lambda share: percent(share, digits) if share else "", hover),
    )


def _strays(routing: Routing) -> str:
    """Where the samples of tasks without an expert go."""
    most = {
        task: routing.experts[counts.index(max(counts))]
        for task, counts in routing.chosen.items()
        if task not in routing.experts and sum(counts)
    }
    said = [f"{task} mostly goes to {expert}" for task, expert in most.items()]
    return f" Without an expert of their own, {listed(said)}." if said else ""


def _mixture(routing: Routing) -> Figure:
    """The mean weights, where the whole model has one mixture."""
    means = {task: rows[0] for task, rows in routing.weights.items()}
    own = [row[routing.experts.index(task)] for task, row in means.items() if task in routing.experts]
    return Figure(
        title="Mean weights",
        note="How heavy each expert is in the mixture for a task's samples, in the mean over them. Near the shares of "
        "samples, the router is sure of itself; evener than those, it mixes.",
        finding=f"In the mean over tasks, the own expert weighs {_weight(sum(own) / len(own))}." if own else "",
        **_grid(routing, means, _weight, lambda task, place: f"mean weight {_weight(means[task][place])}"),
    )


def _grid(
    routing: Routing, values: dict[str, list[float]], show: Callable[[float], str], hover: Callable[[str, int], str]
) -> dict[str, Any]:
    """What a figure of tasks down and experts across needs; a task's own expert is framed and on the diagonal."""
    tasks = list(values)
    order = [routing.experts.index(task) for task in tasks if task in routing.experts]
    order += [place for place in range(len(routing.experts)) if place not in order]
    across = [routing.experts[place] for place in order]
    cells = [[values[task][place] for place in order] for task in tasks]
    ends, scale = _scale(cells)
    written = len(across) <= _WRITTEN
    size = 12 if len(across) <= _FINE else 9
    shown: Trace = {
        "type": "heatmap", "x": list(range(len(across))), "y": list(range(len(tasks))), "z": cells, "zmin": ends[0],
        "zmax": ends[1], "colorscale": scale, "showscale": not written, "xgap": 2, "ygap": 2, "hoverinfo": "text",
        "colorbar": {"thickness": 9, "outlinewidth": 0, "ticks": "", "tickfont": {"color": "@soft", "size": 11},
                     "nticks": 4},
        "hovertext": [
            [f"samples of {bold(task)}<br>expert of {bold(routing.experts[place])}<br>{hover(task, place)}"
             for place in order]
            for task in tasks
        ],
    }  # fmt: skip
    if written:
        shown |= {"text": [[show(value) for value in row] for row in cells], "texttemplate": "%{text}",
                  "textfont": {"color": "@ink", "size": size}}  # fmt: skip
    frames = [
        {"type": "rect", "x0": across.index(task) - 0.5, "x1": across.index(task) + 0.5, "y0": place - 0.5,
         "y1": place + 0.5, "line": {"color": "@soft", "width": 1.5}}
        for place, task in enumerate(tasks) if task in across
    ]  # fmt: skip
    quiet = {"showgrid": False, "showline": False, "ticks": ""}
    return {
        "data": [shown],
        "layout": layout(
            xaxis=axis(
                "expert", tickvals=list(range(len(across))), ticktext=[plot_text(name, 14) for name in across], **quiet,
                range=[-0.5, len(across) - 0.5], tickangle=-45 if len(across) > 2 else 0,
            ),
            yaxis=axis(
                tickvals=list(range(len(tasks))), ticktext=[plot_text(task, 14) for task in tasks], **quiet,
                range=[len(tasks) - 0.5, -0.5],
            ),
            shapes=frames,
        ),
        "height": _height(len(tasks)), "half": True,
        "narrow": {"xaxis.tickfont.size": 11, "yaxis.tickfont.size": 11,
                   **({"data.textfont.size": 10 if len(across) <= 6 else 7} if written else {})},
    }  # fmt: skip


def _by_depth(routing: Routing) -> Figure | None:
    """The weight of a task's own expert, layer after layer; the last row is what the others get there."""
    own: dict[str, list[float]] = {}
    others: dict[str, list[float]] = {}
    for task, rows in routing.weights.items():
        if task in routing.experts:
            at, rest = routing.experts.index(task), len(routing.experts) - 1
            own[task] = [row[at] for row in rows]
            others[task] = [(sum(row) - row[at]) / rest if rest else 0.0 for row in rows]
    if not own or len(routing.experts) < 2:
        return None
    columns = range(len(routing.routes))
    labels = [_label(route) for route in routing.routes]
    mean = [sum(row[i] for row in own.values()) / len(own) for i in columns]
    apart = [sum(row[i] for row in others.values()) / len(others) for i in columns]
    cells = [*own.values(), apart]
    hover = [
        [f"{bold(task)}, {plot_text(routing.routes[i])}<br>its own expert: {_weight(own[task][i])}<br>"
         f"each other, in the mean: {_weight(others[task][i])}" for i in columns]
        for task in own
    ]  # fmt: skip
    hover.append([
        f"{plot_text(routing.routes[i])}<br>experts of other tasks, in the mean: {_weight(apart[i])}" for i in columns
    ])  # fmt: skip
    high, low = max(columns, key=lambda i: mean[i]), min(columns, key=lambda i: mean[i])
    drawn = heat(
        routing.routes, [Run(label, i, i) for i, label in enumerate(labels)], [*own, "other experts"], cells, _weight,
        *_scale(cells), across="routed layers, from first to last", most=12, hover=hover,
    )  # fmt: skip
    drawn["layout"]["shapes"] = [{  # parts the tasks from what they are compared with
        "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": len(own) - 0.5, "y1": len(own) - 0.5,
        "line": {"color": "@soft", "width": 1.5},
    }]  # fmt: skip
    return Figure(
        title="Weight of each task's own expert by depth",
        note="The mean weight of a task's own expert for the task's samples, in every group of layers with weights of "
        "its own. The last row is what an expert of another task gets there, in the mean: where the two are alike, the "
        "router does not tell the tasks apart.",
        finding=f"The own expert weighs most in {routing.routes[high]} ({_weight(mean[high])} in the mean, another's "
        f"{_weight(apart[high])}) and least in {routing.routes[low]} ({_weight(mean[low])}, another's "
        f"{_weight(apart[low])}).",
        **{**drawn, "height": _height(len(own)), "half": True},
    )


def _scale(cells: list[list[float]]) -> tuple[tuple[float, float], list[Any]]:
    """From nothing to the largest; routers that do not clamp may go below zero, which is then another colour."""
    low, high = min(map(min, cells)), max(0.01, *map(max, cells))
    if low >= 0:
        return (0.0, high), [[0, "@raised"], [1, "@heat"]]
    far = max(high, -low)
    return (-far, far), [[0, "@cool"], [0.5, "@raised"], [1, "@heat"]]


def _height(tasks: int) -> int:
    """Of both figures of a model, which stand side by side."""
    return 140 + max(34 * tasks, 60)


def _label(route: str) -> str:
    """The number of a group of layers, or the name of what has none."""
    number = route.rpartition(" ")[2]
    return number if number.isdecimal() and len(number) < 4 else plot_text(short(route, 8), 8)


def _weight(value: float) -> str:
    return signed(f"{value:.2f}")
