"""Figures of scores: every model on every task, and what a better average costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from plait.evaluate.results import Row
from plait.report.boards import Board, standing
from plait.report.figures import Figure, Key, Trace, axis, bold, colour, layout, nice_range, step_for, symbol
from plait.report.text import count, percent, plot_text
from plait.units import show_bytes, show_latency, show_seconds


def task_dots(board: Board) -> Figure | None:
    """Every task a band; in it every model a mark with its interval, and the expert's score as a line across."""
    rows = [*board.ranked, *board.of("base")]
    tasks = board.tasks
    if not tasks or not any(row.evaluation.tasks for row in rows):
        return None
    lane = min(0.8 / len(rows), 0.22)
    data: list[Trace] = []
    keys: list[Key] = []
    experts = [board.expert_of(task) for task in tasks]
    if any(score is not None for score in experts):
        data.append(_expert_lines(tasks, experts))
        keys.append(Key("each task's expert", (0,), "@ink", line=True))
    for place, row in enumerate(rows):
        base = row.kind == "base"
        paint, mark = ("@soft", "circle-open") if base else (colour(place), symbol(place))
        keys.append(Key(row.label, (len(data),), paint, mark))
        data.append(_dots(row, tasks, (place - (len(rows) - 1) / 2) * lane, paint, mark))
    lows = [r.score.low for row in rows for r in row.evaluation.tasks.values()] + [e for e in experts if e is not None]
    highs = [r.score.high for row in rows for r in row.evaluation.tasks.values()] + [
        e for e in experts if e is not None
    ]
    metrics = sorted({r.metric for row in rows for r in row.evaluation.tasks.values()})
    within = (0.0, 100.0) if min(lows) >= 0 and max(highs) <= 1 else (-1e9, 1e9)
    span = 100 * (max(highs) - min(lows))
    left, right = nice_range(100 * min(lows), 100 * max(highs), step_for(span), *within)
    shades = [
        {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": i - 0.5, "y1": i + 0.5, "fillcolor": "@band",
         "line": {"width": 0}, "layer": "below"}
        for i in range(0, len(tasks), 2)
    ]  # fmt: skip
    words = plot_text(metrics[0], 20) if len(metrics) == 1 else "score"
    return Figure(
        title="Every model on every task",
        note="Each mark is a model's score on a task's test samples, with its 95 % interval; the upright line is the "
        "task's own expert. Marks far left of the line are what merging cost on that task.",
        finding=_worst_gap(board),
        data=data,
        layout=layout(
            xaxis=axis(f"{words}, %", range=[left - 0.01 * (right - left), right + 0.01 * (right - left)]),
            yaxis=axis(
                tickvals=list(range(len(tasks))), ticktext=[plot_text(task, 18) for task in tasks], showgrid=False,
                range=[len(tasks) - 0.5, -0.5], tickfont={"color": "@ink", "size": 13},
            ),
            shapes=shades,
        ),
        height=80 + len(tasks) * min(max(44, 10 * len(rows) + 14), 116),
        keys=tuple(keys),
    )  # fmt: skip


def _expert_lines(tasks: list[str], experts: list[float | None]) -> Trace:
    x: list[float | None] = []
    y: list[float | None] = []
    hover: list[str] = []
    for place, (task, score) in enumerate(zip(tasks, experts, strict=True)):
        if score is not None:
            x += [100 * score, 100 * score, 100 * score, None]
            y += [place - 0.42, place, place + 0.42, None]
            hover += [f"{bold(task)}<br>its expert: {percent(score)} %"] * 3 + [""]
    return {
        "type": "scatter", "mode": "lines", "x": x, "y": y, "line": {"color": "@ink", "width": 2.5},
        "hoverinfo": "text", "hovertext": hover,
    }  # fmt: skip


def _dots(row: Row, tasks: list[str], offset: float, paint: str, mark: str) -> Trace:
    found = [(i, task, row.evaluation.tasks[task]) for i, task in enumerate(tasks) if task in row.evaluation.tasks]
    return {
        "type": "scatter", "mode": "markers",
        "x": [100 * r.score.value for _, _, r in found], "y": [i + offset for i, _, _ in found],
        "error_x": {
            "type": "data", "symmetric": False, "array": [100 * (r.score.high - r.score.value) for _, _, r in found],
            "arrayminus": [100 * (r.score.value - r.score.low) for _, _, r in found],
            "color": f"{paint}/45", "thickness": 1.5, "width": 0,
        },
        "marker": {"color": paint, "symbol": mark, "size": 8, "line": {"width": 1.5 if "open" in mark else 0}},
        "hoverinfo": "text",
        "hovertext": [
            f"{bold(row.label)} on {plot_text(task)}<br>{percent(r.score.value)} %  "
            f"({percent(r.score.low)} to {percent(r.score.high)})"
            + (f"<br>{percent(r.normalised.value)} % of the expert's" if r.normalised else "")
            + f"<br>{count(r.samples, 'sample')}"
            for _, task, r in found
        ],
    }  # fmt: skip


def _worst_gap(board: Board) -> str:
    best = board.best
    if best is None:
        return ""
    gaps = {
        task: expert - best.evaluation.tasks[task].score.value
        for task in board.tasks
        if task in best.evaluation.tasks and (expert := board.expert_of(task)) is not None
    }
    if not gaps:
        return (
            f"{best.label} averages {percent(best.evaluation.average.value)} % over {count(len(board.tasks), 'task')}."
        )
    most, least = max(gaps, key=lambda t: gaps[t]), min(gaps, key=lambda t: gaps[t])
    if len(gaps) == 1:
        return f"{best.label} is {percent(gaps[most])} points from the expert on {most}."
    return (
        f"{best.label} is furthest from the expert on {most} ({_gap(gaps[most])}) "
        f"and nearest on {least} ({_gap(gaps[least])})."
    )


def _gap(value: float) -> str:
    return f"{percent(abs(value))} points {'below' if value >= 0 else 'above'}"


def tradeoffs(board: Board) -> list[Figure]:
    """The normalised average against time and against size, each where there is something to trade."""
    fits = any(row.fit_seconds for row in board.ranked)
    made = [
        _tradeoff(
            board, "time", _time, show_seconds, "time to fit and merge, s" if fits else "merge time, s",
            "Up is better, left is cheaper. A method is worth its time only when it stands above everything to its "
            "left; whiskers that overlap say that the difference may be chance.",
        ),
        _tradeoff(
            board, "size", lambda row: row.evaluation.model.bytes / 1e6, lambda mb: show_bytes(mb * 1e6),
            "size on disk, MB",
            "Up is better, left is smaller. A larger model is worth its room only when it stands above everything to "
            "its left.",
        ),
    ]  # fmt: skip
    if any(row.evaluation.routing for row in board.ranked):  # static models differ by chance alone
        made.append(
            _tradeoff(
                board, "latency", _milliseconds, lambda ms: show_latency(ms / 1000), "the model for a sample, ms",
                "Up is better, left is faster. Timed along with the scores, on a machine that may have done other "
                "things: small differences say nothing.",
            )
        )  # fmt: skip
    return [figure for figure in made if figure is not None]


def _time(row: Row) -> float | None:
    """Of the merge and, where the method learned, of its fit."""
    return None if row.merge_seconds is None else row.merge_seconds + (row.fit_seconds or 0.0)


def _milliseconds(row: Row) -> float | None:
    return None if row.evaluation.latency is None else 1000 * row.evaluation.latency


def _tradeoff(
    board: Board, what: str, cost: Callable[[Row], float | None], show: Callable[[float], str], title: str, note: str
) -> Figure | None:
    rows = [(i, row, value) for i, row in enumerate(board.ranked) if (value := cost(row)) and value > 0]
    costs = [value for _, _, value in rows]
    if len(rows) < 3 or max(costs) < 1.5 * min(costs):
        return None
    data: list[Trace] = []
    keys: list[Key] = []
    named = len(rows) <= 12
    sides = _sides([(row.label, value, 100 * standing(row)) for _, row, value in rows])
    for place, row, value in rows:
        found = row.evaluation.normalised or row.evaluation.average
        keys.append(Key(row.label, (len(data),), colour(place), symbol(place)))
        data.append({
            "type": "scatter", "mode": "markers+text" if named else "markers", "x": [value], "y": [100 * found.value],
            "text": [f"\u2002{plot_text(row.label, 20)}\u2002"], "textposition": sides[row.label],
            "textfont": {"color": "@ink", "size": 12},
            "cliponaxis": False,
            "error_y": {
                "type": "data", "symmetric": False, "array": [100 * (found.high - found.value)],
                "arrayminus": [100 * (found.value - found.low)], "color": f"{colour(place)}/45", "thickness": 1.5,
                "width": 0,
            },
            "marker": {"color": colour(place), "symbol": symbol(place), "size": 12, "line": {"width": 0}},
            "hoverinfo": "text",
            "hovertext": [f"{bold(row.label)}<br>{percent(found.value)} % ({percent(found.low)} to "
                          f"{percent(found.high)})<br>{show(value)}"],
        })  # fmt: skip
    first = min(rows, key=lambda item: item[2])
    best = max(rows, key=lambda item: standing(item[1]))
    told = f"{best[1].label} is the best at {show(best[2])}"
    if first[1] is not best[1]:
        gain = percent(standing(best[1]) - standing(first[1]))
        told += f"; {first[1].label}, the {'smallest' if what == 'size' else 'fastest'}, takes {show(first[2])} and "
        told += f"is {gain} points below"
    normal = all(row.evaluation.normalised for _, row, _ in rows)
    return Figure(
        title=f"What a better average costs in {what}",
        note=note,
        finding=told + ".",
        data=data,
        layout=layout(
            xaxis=_costs_axis(title, costs),
            yaxis=axis("share of the experts, %" if normal else "average, %"),
        ),
        height=340,
        keys=tuple(keys),
        labelled=named,
        narrow={"data.mode": "markers"},
    )  # fmt: skip


_PLACES = {"middle right": (1, 0), "middle left": (-1, 0), "top center": (0, 1), "bottom center": (0, -1)}


def _sides(marks: list[tuple[str, float, float]]) -> dict[str, str]:
    """On which side of its mark each label stands, so that it covers no other: the best found one after the other."""
    costs, scores = [c for _, c, _ in marks], [s for _, _, s in marks]
    log = max(costs) >= 8 * min(costs)
    bend = math.log10 if log else float
    left, right = (bend(min(costs) / 1.4), bend(max(costs) * 1.4)) if log else (0.0, 1.05 * max(costs))
    rise = (max(scores) - min(scores)) or 1.0
    # Where things stand on a plot 1000 wide and 220 high; a letter is about 7 wide.
    spots = [(name, 1000 * (bend(c) - left) / (right - left), 220 * (s - min(scores)) / rise) for name, c, s in marks]
    taken = [(x - 9, x + 9, y - 9, y + 9) for _, x, y in spots]
    chosen: dict[str, str] = {}
    for name, x, y in spots:
        width = 7 * min(len(name), 20)

        def box(side: str, x: float = x, y: float = y, width: float = width) -> tuple[float, float, float, float]:
            across, up = _PLACES[side]
            middle, height = x + across * (width / 2 + 12), y + up * 24
            return middle - width / 2, middle + width / 2, height - 8, height + 8

        def cost(side: str) -> float:
            a = box(side)
            over = sum(max(0, min(a[1], b[1]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[2], b[2]))
                       for b in taken)  # fmt: skip
            return over + 1000 * (a[0] < 0 or a[1] > 1000)

        chosen[name] = min(_PLACES, key=cost)
        taken.append(box(chosen[name]))
    return chosen


def _costs_axis(title: str, costs: list[float]) -> dict[str, Any]:
    """From zero or, where costs differ by far, logarithmic with ticks at 1, 2 and 5."""
    low, high = min(costs), max(costs)
    if high < 8 * low:
        return axis(title, rangemode="tozero")
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**power for power in powers for m in (1, 2, 5)]
    ends = [math.log10(low / 1.4), math.log10(high * 1.4)]
    return axis(title, type="log", range=ends, tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
