"""Results as tables: for the terminal, as Markdown and as CSV. Scores in per cent."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from plait.evaluate.results import Comparison, Corrupted, Evaluation, Interval, Part, Robustness, Routing, Row, Sweep
from plait.units import show_bytes, show_latency, show_seconds

SIGNIFICANT = 0.05
_FOOT = (
    "normalised: score / score of the task's own expert, mean over tasks; ±: half of the 95 % interval (bootstrap); "
    "*: differs from {baseline} with p < 0.05 (paired); latency: of the model alone, a sample in batches of {batch}; "
    "task id: what it chooses, the head alone or the model"
)
_UNSEEN_FOOT = "; seen, unseen: averages of the tasks whose experts were merged, and of the others"
_CORRUPTED_FOOT = (
    "normalised: by the experts on clean images; alike: by the experts on images as corrupted as the model's"
)

_ROUTED_FOOT = "; routed: share of the samples whose heaviest expert is their own task's, mean over tasks"
_BLIND_FOOT = (
    "rightly routed: the sample's heaviest expert is its own task's; blind: accuracy where that expert brings the head "
    "too, so that nothing is told the task"
)

_STYLES = {"expert": "dim", "base": "dim"}


def comparison_rows(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a comparison."""
    tasks = found.suite.tasks
    header = [
        "model", *_task_names(found.rows[0].evaluation), *_part_names(found.rows[0].evaluation), "average",
        "normalised", f"against {found.baseline}", *(["routed"] if _has_routed(found) else []), "fit", "merge", "size",
        "latency", "data", "task id",
    ]  # fmt: skip
    return header, [_cells(row, tasks, routed=_has_routed(found)) for row in found.rows]


def comparison_tables(found: Comparison) -> list[Table]:
    """A comparison for the terminal: scores, the best merged model of every column bold; then what each model cost."""
    header, rows = comparison_rows(found)
    parts = len(_part_names(found.rows[0].evaluation))
    scores = len(found.suite.tasks) + parts + 4 + _has_routed(found)
    best = _best(found)
    made = [Table(box=None, header_style="bold", title=f"{escape(found.suite.name)}: test scores, %")]
    made.append(Table(box=None, header_style="bold", title="what it took", min_width=60))
    made[0].caption = _foot(found, escape(found.baseline))
    for table, columns in zip(made, (range(scores), [0, *range(scores, len(header))]), strict=True):
        for column in columns:  # long names of tasks are folded where the terminal is narrow, and nothing else
            align, task = "right" if column else "left", 0 < column <= len(found.suite.tasks)
            table.add_column(escape(header[column]), justify=align, no_wrap=not task, overflow="fold")
        for at, (row, cells) in enumerate(zip(found.rows, rows, strict=True)):
            shown = [f"[bold]{escape(cells[c])}[/]" if (at, c) in best else escape(cells[c]) for c in columns]
            table.add_row(*shown, style=_STYLES.get(row.kind, ""))
    if found.rows[0].corrupted:
        made.insert(1, _corrupted_table(found))
    return made


def comparison_markdown(found: Comparison) -> str:
    """A comparison as a Markdown table; under corruptions, with a second one of them."""
    header, rows = comparison_rows(found)
    lines = [*_markdown(header, rows), "", _foot(found, f"`{found.baseline}`")]
    if found.rows[0].corrupted:
        lines += ["", *_markdown(*corrupted_rows(found)), "", _CORRUPTED_FOOT]
    return "\n".join([*lines, f"Machine: {found.machine}.", ""])


def corrupted_rows(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a comparison under corruptions: normalised averages."""
    header = ["model", "clean", *(_under(one) for one in found.rows[0].corrupted), "mean", "alike"]
    rows = []
    for row in found.rows:
        under = [one.evaluation.normalised for one in row.corrupted]
        alike = [one.normalised_alike for one in row.corrupted]
        cells = [_share(row.evaluation.normalised), *map(_share, under), _mean(under), _mean(alike)]
        rows.append([row.label, *cells])
    return header, rows


def _corrupted_table(found: Comparison) -> Table:
    header, rows = corrupted_rows(found)
    table = Table(box=None, header_style="bold", title="under corruptions: normalised, %", min_width=60)
    table.caption = _CORRUPTED_FOOT
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left", no_wrap=True, overflow="fold")
    for row, cells in zip(found.rows, rows, strict=True):
        table.add_row(*map(escape, cells), style=_STYLES.get(row.kind, ""))
    return table


def comparison_csv(found: Comparison) -> str:
    """A comparison as CSV: one line a model, numbers as fractions and in full."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    ends = ("average", "average_low", "average_high", "normalised", "normalised_low", "normalised_high")
    tests = ("difference", "difference_low", "difference_high", "p")
    routed = ["routed", "blind"] if _has_routed(found) else []
    parts = [
        f"{name}_{key}{end}"
        for name in _part_names(found.rows[0].evaluation)
        for key in ("average", "normalised")
        for end in ("", "_low", "_high")
    ]
    under = [f"{_under(one)} {key}" for one in found.rows[0].corrupted for key in ("average", "normalised", "alike")]
    costs = ("fit_seconds", "merge_seconds", "bytes", "latency_seconds", "data", "task_id")
    writer.writerow(["model", "kind", *found.suite.tasks, *ends, *tests, *costs, *routed, *parts, *under])
    for row in found.rows:
        e, d = row.evaluation, row.difference
        scores = [e.tasks[task].score.value for task in found.suite.tasks]
        tested = [None] * 4 if d is None else [d.value, d.low, d.high, d.p]
        facts = [row.fit_seconds, row.merge_seconds, e.model.bytes, e.latency, row.data, e.protocol.task_id]
        cells = [row.label, row.kind, *scores, *_three(e.average), *_three(e.normalised), *tested, *facts]
        if routed:
            cells += [e.routing.right_mean, e.routing.blind_mean] if e.routing else [None, None]
        cells += [cell for part in _parts(e) for cell in (*_three(part.average), *_three(part.normalised))]
        for one in row.corrupted:
            values = (one.evaluation.average, one.evaluation.normalised, one.normalised_alike)
            cells += [None if value is None else value.value for value in values]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return out.getvalue()


def evaluation_table(found: Evaluation) -> Table:
    """One model, a line per task."""
    table = Table(box=None, header_style="bold", title=f"{escape(found.model.label)} on {escape(found.suite.name)}, %")
    for place, name in enumerate(("task", "metric", "score", "95 %", "expert", "normalised", "others", "samples")):
        table.add_column(name, justify="left" if place < 2 else "right")
    for task, result in zip(_task_names(found), found.tasks.values(), strict=True):
        others = ", ".join(f"{k} {_percent(v)}" for k, v in result.metrics.items() if k != result.metric)
        share = _percent(result.normalised.value) if result.normalised else "-"
        expert = _percent(result.expert) if result.expert is not None else "-"
        score = result.score
        spread = f"{_percent(score.low)} … {_percent(score.high)}"
        cells = [task, result.metric, _percent(score.value), spread, expert, share, others, str(result.samples)]
        table.add_row(*map(escape, cells))
    spread = f"{_percent(found.average.low)} … {_percent(found.average.high)}"
    share = _percent(found.normalised.value) if found.normalised else "-"
    table.add_row("average", "", _percent(found.average.value), spread, "", share, "", "", style="bold")
    for name, part in zip(_part_names(found), _parts(found), strict=True):
        spread = f"{_percent(part.average.low)} … {_percent(part.average.high)}"
        cells = [f"of {len(part.tasks)} {name}", "", _percent(part.average.value), spread, "", _share(part.normalised)]
        table.add_row(*cells, "", "", style="bold")
    timed = "" if found.latency is None else f", {show_latency(found.latency)} a sample in the model alone"
    table.caption = f"{found.samples_per_second:.0f} samples/s{timed}, {found.model.parameters / 1e6:.1f} M parameters"
    return table


def robustness_table(found: Robustness) -> Table:
    """One model, a line for clean images and one for every corruption."""
    clean = found.clean
    title = f"{escape(clean.model.label)} on {escape(clean.suite.name)}: test scores, %"
    table = Table(box=None, header_style="bold", title=title, min_width=len(title), caption=_CORRUPTED_FOOT)
    table.add_column("images", no_wrap=True)
    for name in [*_task_names(clean), *_part_names(clean), "average", "normalised", "alike"]:
        table.add_column(escape(name), justify="right", overflow="fold")
    alike = [clean.normalised, *(one.normalised_alike for one in found.corrupted)]
    names = ["clean", *map(_under, found.corrupted)]
    rows = zip(names, [clean, *(one.evaluation for one in found.corrupted)], alike, strict=True)
    for name, evaluation, share in rows:
        cells = [_percent(result.score.value) for result in evaluation.tasks.values()]
        cells += [_spread(part.average) for part in _parts(evaluation)]
        table.add_row(name, *cells, _spread(evaluation.average), _spread(evaluation.normalised), _spread(share))
    return table


def routing_table(found: Evaluation, routing: Routing) -> Table:
    """Of a model that is routed by its input: how often rightly, and what is left where nothing is told the task."""
    table = Table(box=None, header_style="bold", min_width=60, caption=_BLIND_FOOT)
    table.title = f"where {escape(found.model.label)} sent its inputs, %"
    for place, name in enumerate(("task", "rightly routed", "blind")):
        table.add_column(name, justify="right" if place else "left", no_wrap=bool(place), overflow="fold")
    for task, name in zip(found.tasks, _task_names(found), strict=True):
        if task in routing.chosen:
            table.add_row(escape(name), _known(routing.right.get(task)), _known(routing.blind.get(task)))
    table.add_row("average", _known(routing.right_mean), _known(routing.blind_mean), style="bold")
    return table


def result_tables(found: Evaluation | Robustness) -> list[Table]:
    """One model as `plait eval` shows it: its scores and, where it is routed by its input, how that went."""
    scores = robustness_table(found) if isinstance(found, Robustness) else evaluation_table(found)
    clean = found.clean if isinstance(found, Robustness) else found
    return [scores] if clean.routing is None else [scores, routing_table(clean, clean.routing)]


def sweep_table(found: Sweep) -> Table:
    """A sweep, a line per point."""
    title = f"{escape(found.method)} on {escape(found.suite.name)}: normalised, %"
    table = Table(box=None, header_style="bold", title=title, min_width=len(title))
    axes = [axis for axis in found.axes if axis != "experts"]
    subsets = "experts" in found.axes
    for name in [*axes, *(["experts"] if subsets else []), "seen", "95 %", *(["unseen"] if subsets else [])]:
        table.add_column(escape(name.removeprefix("parameters.")), justify="right")
    for point in found.points:
        cells = [str(point.settings.get(axis)) for axis in axes]
        cells += [f"{len(point.experts)}: {', '.join(point.experts)}"] if subsets else []
        cells += [_percent(point.seen.value), f"{_percent(point.seen.low)} … {_percent(point.seen.high)}"]
        cells += [_percent(point.unseen.value) if point.unseen else "-"] if subsets else []
        table.add_row(*map(escape, cells))
    return table


def _cells(row: Row, tasks: list[str], *, routed: bool) -> list[str]:
    e, d = row.evaluation, row.difference
    right = [_known(e.routing.right_mean if e.routing else None)] if routed else []
    against = "" if d is None else f"{100 * d.value:+.1f}{'*' if d.p < SIGNIFICANT else ''}"
    return [
        row.label, *(_percent(e.tasks[task].score.value) for task in tasks),
        *(_spread(part.average) for part in _parts(e)), _spread(e.average), _spread(e.normalised), against,
        *right, show_seconds(row.fit_seconds) if row.fit_seconds is not None else "",
        show_seconds(row.merge_seconds) if row.merge_seconds is not None else "", show_bytes(e.model.bytes),
        show_latency(e.latency) if e.latency is not None else "", row.data, e.protocol.task_id,
    ]  # fmt: skip


def _best(found: Comparison) -> set[tuple[int, int]]:
    """(row, column) of the best merged model of every task, and of the averages."""
    ours = [at for at, row in enumerate(found.rows) if row.kind in ("merge", "model")]
    tasks = found.suite.tasks
    columns: list[Callable[[Row], float]] = [lambda row, t=task: row.evaluation.tasks[t].score.value for task in tasks]
    for place in range(len(_part_names(found.rows[0].evaluation))):
        columns.append(lambda row, at=place: _parts(row.evaluation)[at].average.value)
    columns += [lambda row: row.evaluation.average.value]
    columns += [lambda row: row.evaluation.normalised.value if row.evaluation.normalised else 0.0]
    best = set()
    for column, value in enumerate(columns, start=1):
        most = max((value(found.rows[at]) for at in ours), default=None)
        best |= {(at, column) for at in ours if value(found.rows[at]) == most}
    return best


def _foot(found: Comparison, baseline: str) -> str:
    unseen = _UNSEEN_FOOT if _parts(found.rows[0].evaluation) else ""
    batch = found.rows[0].evaluation.protocol.batch_size
    return _FOOT.format(baseline=baseline, batch=batch) + unseen + (_ROUTED_FOOT if _has_routed(found) else "")


def _has_routed(found: Comparison) -> bool:
    return any(row.evaluation.routing is not None for row in found.rows)


def _parts(found: Evaluation) -> list[Part]:
    return [part for part in (found.seen, found.unseen) if part is not None]


def _task_names(found: Evaluation) -> list[str]:
    unseen = found.unseen.tasks if found.unseen else []
    return [f"{task} (unseen)" if task in unseen else task for task in found.tasks]


def _part_names(found: Evaluation) -> list[str]:
    return [name for name, part in (("seen", found.seen), ("unseen", found.unseen)) if part is not None]


def _under(one: Corrupted) -> str:
    """`motion 2`."""
    how = one.evaluation.protocol.corruption
    assert how is not None
    return f"{how.name} {how.severity}"


def _markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(_plain, line)) + " |" for line in [header, *rows]]
    return [lines[0], "|---" + "|---:" * (len(header) - 1) + "|", *lines[1:]]


def _mean(values: Sequence[Interval | None]) -> str:
    known = [value.value for value in values if value is not None]
    return _percent(sum(known) / len(known)) if len(known) == len(values) else "-"


def _share(value: Interval | None) -> str:
    return "-" if value is None else _percent(value.value)


def _known(value: float | None) -> str:
    return "-" if value is None else _percent(value)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _spread(value: Interval | None) -> str:
    return "-" if value is None else f"{_percent(value.value)} ±{50 * (value.high - value.low):.1f}"


def _three(value: Interval | None) -> list[Any]:
    return [None] * 3 if value is None else [value.value, value.low, value.high]


def _plain(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ").replace("*", "\\*")
