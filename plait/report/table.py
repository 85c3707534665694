"""The table of a board: models down, tasks across, cells shaded by how much of the expert's score is left."""

from __future__ import annotations

import math

from plait.evaluate.results import Interval, Row
from plait.report.boards import Board, shade, standing
from plait.report.text import MISSING, breakable, count, escape, percent, points, probability, stars
from plait.units import show_bytes, show_latency, show_seconds


def table(board: Board) -> str:
    """The scrollable table with its scale and its switch for intervals."""
    costs = any(row.merge_seconds is not None for row in board.rows)
    fits = any(row.fit_seconds is not None for row in board.rows)
    data = any(row.data for row in board.rows)
    paired = any(row.difference for row in board.rows)
    head = _head(board, costs=costs, fits=fits, data=data, paired=paired)
    low, high = _ends(board)
    best = _best_scores(board)
    groups = [("experts", board.of("expert")), ("models", board.ranked), ("base", board.of("base"))]
    bodies = []
    for name, rows in groups:
        if rows:
            lines = "".join(
                _line(
                    row,
                    board,
                    low,
                    high,
                    best if name == "models" else {},
                    costs=costs,
                    fits=fits,
                    data=data,
                    paired=paired,
                )
                for row in rows
            )
            bodies.append(f'<tbody class="{name}">{lines}</tbody>')
    switch = '<label class="switch"><input type="checkbox" class="show-intervals"> show 95 % intervals</label>'
    scale = (
        f'<span class="scale"><span>{percent(low, 0)} %</span><i aria-hidden="true"></i>'
        f"<span>{percent(high, 0)} %</span><span>{_what_shades(board)}</span></span>"
    )
    return (
        f'<div class="table-tools">{scale}{switch}</div>'
        f'<div class="table-scroll" tabindex="0" role="region" aria-label="Scores of every model on every task">'
        f'<table class="scores"><thead>{head}</thead>{"".join(bodies)}</table></div>'
    )


def _what_shades(board: Board) -> str:
    known = any(board.expert_of(task) is not None for task in board.tasks)
    return "of the expert’s score" if known else "score"


def _head(board: Board, *, costs: bool, fits: bool, data: bool, paired: bool) -> str:
    cells = [_th("model", "text", "model", "name")]
    if any(row.evaluation.normalised for row in board.rows):
        cells.append(_th("of experts, %", "number", "Mean over tasks of score / the task's own expert's score", "main"))
    known = len(cells) > 1
    cells.append(_th("average, %", "number", "Mean of the tasks' scores", "" if known else "main"))
    if any(row.evaluation.unseen for row in board.rows):
        cells.append(_th("seen, %", "number", "Mean of the scores of the tasks whose experts were merged"))
        cells.append(_th("unseen, %", "number", "Mean of the scores of the tasks that nothing was merged for"))
    if paired:
        cells.append(_th("vs baseline", "number", f"Average minus that of {board.baseline}, in points"))
    if _has_routed(board):
        cells.append(
            _th("routed, %", "number", "Share of samples whose heaviest expert is their task's, mean of tasks")
        )
    metrics = {task: {r.evaluation.tasks[task].metric for r in board.rows if task in r.evaluation.tasks}
               for task in board.tasks}  # fmt: skip
    unseen = {task for row in board.rows if row.evaluation.unseen for task in row.evaluation.unseen.tasks}
    for place, task in enumerate(board.tasks):
        apart = "; its expert was not merged" if task in unseen else ""
        cells.append(_th(task, "number", f"{task}: {', '.join(sorted(metrics[task])) or 'score'}, %{apart}",
                         "task first" if place == 0 else "task"))  # fmt: skip
    cells += [_th("fit time", "number", "Seconds to learn, before the merge", "first")] if fits else []
    cells += [_th("merge time", "number", "Seconds to merge", "" if fits else "first")] if costs else []
    cells.append(_th("size", "number", "Weight files on disk", "" if costs or fits else "first"))
    if _has_latency(board):
        cells.append(
            _th("latency", "number", "Time of the model alone for a sample, in the batches it was measured in")
        )
    cells += [_th("data", "text", "What data the method saw")] if data else []
    cells.append(_th("task id", "text", "What is chosen by a sample's task: only its head, or the model"))
    return f"<tr>{''.join(cells)}</tr>"


def _has_routed(board: Board) -> bool:
    return any(row.evaluation.routing for row in board.rows)


def _has_latency(board: Board) -> bool:
    return any(row.evaluation.latency is not None for row in board.rows)


def _th(label: str, kind: str, title: str, css: str = "") -> str:
    starting = {"main": ' aria-sort="descending"'}.get(css, "")
    name = f"{kind} {css}".strip()
    return (
        f'<th scope="col" class="{name}" title="{escape(title)}"{starting}><button type="button" class="sort">'
        f"{escape(label)}</button></th>"
    )


def _ends(board: Board) -> tuple[float, float]:
    """The scale of the shading: the lowest cell, rounded down to a tenth, to the whole of the expert."""
    cells = [
        value
        for row in board.rows
        for task, result in row.evaluation.tasks.items()
        if (value := shade(result, board, task)) is not None and math.isfinite(value)
    ]
    low = max(0.0, math.floor(10 * min(cells, default=0.0) + 1e-9) / 10)
    return min(low, 0.9), 1.0


def _best_scores(board: Board) -> dict[str, float]:
    """Task → the highest score of a merge or a model, where there are several to choose from."""
    rows = board.ranked
    if len(rows) < 2:
        return {}
    return {
        task: max(r.evaluation.tasks[task].score.value for r in rows if task in r.evaluation.tasks)
        for task in board.tasks
        if any(task in r.evaluation.tasks for r in rows)
    }


def _line(
    row: Row, board: Board, low: float, high: float, best: dict[str, float], *, costs: bool, fits: bool, data: bool,
    paired: bool,
) -> str:  # fmt: skip
    found = row.evaluation
    tags = {"expert": "one model per task", "base": "nothing merged"}
    about = tags.get(row.kind) or (row.method if row.method and row.method != row.label else "")
    mark = '<span class="tag">baseline</span>' if row.label == board.baseline else ""
    small = f'<span class="about">{escape(about)}</span>' if about else ""
    cells = [f'<th scope="row" class="name" data-v="{escape(row.label)}">{breakable(row.label)}{mark}{small}</th>']
    leading = row is board.best and len(board.ranked) > 1
    if any(other.evaluation.normalised for other in board.rows):
        cells.append(_average(found.normalised, "main best" if leading else "main"))
    cells.append(_average(found.average, ""))
    if any(other.evaluation.unseen for other in board.rows):
        cells += [_average(part.average if part else None, "") for part in (found.seen, found.unseen)]
    if paired:
        cells.append(_difference(row))
    if _has_routed(board):
        right = found.routing.right_mean if found.routing else None
        cells.append(f"<td>{MISSING}</td>" if right is None else _plain(right, percent(right), ""))
    for place, task in enumerate(board.tasks):
        cells.append(_score(row, board, task, low, high, best, "first" if place == 0 else ""))
    if fits:
        cells.append(_seconds(row.fit_seconds, "first"))
    if costs:
        cells.append(_seconds(row.merge_seconds, "" if fits else "first"))
    size = show_bytes(found.model.bytes)
    cells.append(_plain(found.model.bytes, size, "" if costs or fits else "first"))
    if _has_latency(board):
        time = found.latency
        cells.append(f"<td>{MISSING}</td>" if time is None else _plain(time, show_latency(time), ""))
    cells += [f'<td class="text" data-v="{escape(row.data)}">{escape(row.data) or MISSING}</td>'] if data else []
    chosen = found.protocol.task_id
    cells.append(f'<td class="text" data-v="{chosen}">{chosen}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _average(part: Interval | None, css: str) -> str:
    if part is None:
        return f'<td class="{css}">{MISSING}</td>'
    half = (part.high - part.low) / 2
    around = f'<span class="near">±{percent(half)}</span>' if half > 0 else ""
    return (
        f'<td class="{css}" data-v="{part.value:.6f}" title="95 % interval: {_range(part)}">'
        f"<b>{percent(part.value)}</b>{around}</td>"
    )


def _range(part: Interval) -> str:
    return f"{percent(part.low)} to {percent(part.high)}"


def _difference(row: Row) -> str:
    part = row.difference
    if part is None:
        return f"<td>{MISSING}</td>"
    title = f"95 % interval: {points(part.low)} to {points(part.high)} points; {probability(part.p)}"
    sign = stars(part.p)
    mark = f'<span class="stars" aria-label="{probability(part.p)}">{sign}</span>' if sign else ""
    return (
        f'<td class="difference" data-v="{part.value:.6f}" title="{title}">{points(part.value)}{mark}'
        f'<span class="near">{probability(part.p)}</span></td>'
    )


def _score(row: Row, board: Board, task: str, low: float, high: float, best: dict[str, float], css: str) -> str:
    result = row.evaluation.tasks.get(task)
    if result is None:
        return f'<td class="cell {css}">{MISSING}</td>'
    share = shade(result, board, task)
    depth = 0.0 if share is None else min(max((share - low) / (high - low), 0.0), 1.0)
    title = f"{task}, {row.label}: 95 % interval {_range(result.score)}; {count(result.samples, 'sample')}"
    if result.normalised is not None and row.kind != "expert":
        title += f"; {percent(result.normalised.value)} % of the expert's {percent(board.expert_of(task))}"
    value = percent(result.score.value)
    if best.get(task) == result.score.value:
        value, title = f"<b>{value}</b>", title + "; the best merge on this task"
    name = f"cell {css}".strip()
    return (
        f'<td class="{name}" style="--v:{depth:.3f}" data-v="{result.score.value:.6f}" title="{escape(title)}">'
        f'{value}<span class="range">{percent(result.score.low)}–{percent(result.score.high)}</span></td>'
    )


def _seconds(value: float | None, css: str) -> str:
    return f'<td class="{css}">{MISSING}</td>' if value is None else _plain(value, show_seconds(value), css)


def _plain(value: float, text: str, css: str) -> str:
    return f'<td class="{css}" data-v="{value:.6f}">{escape(text)}</td>'


def reading(board: Board) -> str:
    """How to read the table."""
    parts = [
        "Every number is the task's main metric in percent on its test samples; the shade of a cell is the share of "
        "the score that the task's own expert reaches, so that easy and hard tasks compare."
    ]
    if any(row.evaluation.normalised for row in board.rows):
        parts.append("<em>Of experts</em> is the mean of those shares: 100 would be no loss by merging.")
    if any(row.difference for row in board.rows):
        levels = "* p < 0.05, ** p < 0.01, *** p < 0.001".replace("<", "&lt;").replace(" ", "&nbsp;")
        levels = levels.replace(",&nbsp;", ", ")
        parts.append(
            f"<em>vs baseline</em> is the average minus that of {escape(board.baseline)} on the same samples, with a "
            f"permutation test: {levels}, each comparison for itself."
        )
    if _has_routed(board):
        parts.append(
            "<em>Routed</em> is the share of samples whose heaviest expert is their own task’s, mean over tasks."
        )
    if len(board.ranked) > 1:
        parts.append("The best merge on a task is bold and underlined. Press a heading to sort.")
    return " ".join(parts)


def told(board: Board) -> str:
    """What the table says, in a sentence."""
    best = board.best
    if best is None or len(board.ranked) < 2:
        return ""
    second = next((row for row in board.ranked if row is not best), best)
    sentence = f"{best.label} keeps {percent(standing(best))} % of the experts, ahead of {second.label} with "
    sentence += f"{percent(standing(second))} %."
    if best.evaluation.normalised is None:
        sentence = f"{best.label} averages {percent(standing(best))} %, ahead of {second.label} with "
        sentence += f"{percent(standing(second))} %."
    return sentence
