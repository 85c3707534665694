"""Results as tables: for the terminal, as Markdown and as CSV. Scores in per cent."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Any

from rich.markup import escape
from rich.table import Table

from plait.evaluate.results import Comparison, Evaluation, Interval, Row, Sweep
from plait.units import show_bytes, show_seconds

SIGNIFICANT = 0.05
_FOOT = (
    "normalised: score / score of the task's own expert, mean over tasks; ±: half of the 95 % interval (bootstrap); "
    "*: differs from {baseline} with p < 0.05 (paired); task id: what it chooses, the head alone or the model"
)

_STYLES = {"expert": "dim", "base": "dim"}


def comparison_rows(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a comparison."""
    tasks = found.suite.tasks
    header = [
        "model",
        *tasks,
        "average",
        "normalised",
        f"against {found.baseline}",
        "fit",
        "merge",
        "size",
        "data",
        "task id",
    ]
    return header, [_cells(row, tasks) for row in found.rows]


def comparison_tables(found: Comparison) -> list[Table]:
    """A comparison for the terminal: scores, the best merged model of every column bold; then what each model cost."""
    header, rows = comparison_rows(found)
    scores = len(found.suite.tasks) + 4
    best = _best(found)
    made = [Table(box=None, header_style="bold", title=f"{escape(found.suite.name)}: test scores, %")]
    made.append(Table(box=None, header_style="bold", title="what it took", min_width=60))
    made[0].caption = _FOOT.format(baseline=escape(found.baseline))
    for table, columns in zip(made, (range(scores), [0, *range(scores, len(header))]), strict=True):
        for column in columns:  # long names of tasks are folded where the terminal is narrow, and nothing else
            align, task = "right" if column else "left", 0 < column <= len(found.suite.tasks)
            table.add_column(escape(header[column]), justify=align, no_wrap=not task, overflow="fold")
        for at, (row, cells) in enumerate(zip(found.rows, rows, strict=True)):
            shown = [f"[bold]{escape(cells[c])}[/]" if (at, c) in best else escape(cells[c]) for c in columns]
            table.add_row(*shown, style=_STYLES.get(row.kind, ""))
    return made


def comparison_markdown(found: Comparison) -> str:
    """A comparison as a Markdown table."""
    header, rows = comparison_rows(found)
    lines = ["| " + " | ".join(map(_plain, line)) + " |" for line in [header, *rows]]
    lines.insert(1, "|---" + "|---:" * (len(header) - 1) + "|")
    return "\n".join([*lines, "", _FOOT.format(baseline=f"`{found.baseline}`"), f"Machine: {found.machine}.", ""])


def comparison_csv(found: Comparison) -> str:
    """A comparison as CSV: one line a model, numbers as fractions and in full."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    ends = ("average", "average_low", "average_high", "normalised", "normalised_low", "normalised_high")
    more = (
        "difference",
        "difference_low",
        "difference_high",
        "p",
        "fit_seconds",
        "merge_seconds",
        "bytes",
        "data",
        "task_id",
    )
    writer.writerow(["model", "kind", *found.suite.tasks, *ends, *more])
    for row in found.rows:
        e, d = row.evaluation, row.difference
        scores = [e.tasks[task].score.value for task in found.suite.tasks]
        tested = [None] * 4 if d is None else [d.value, d.low, d.high, d.p]
        facts = [row.fit_seconds, row.merge_seconds, e.model.bytes, row.data, e.protocol.task_id]
        cells = [row.label, row.kind, *scores, *_three(e.average), *_three(e.normalised), *tested, *facts]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return out.getvalue()


def evaluation_table(found: Evaluation) -> Table:
    """One model, a line per task."""
    table = Table(box=None, header_style="bold", title=f"{escape(found.model.label)} on {found.suite.name}, %")
    for place, name in enumerate(("task", "metric", "score", "95 %", "expert", "normalised", "others", "samples")):
        table.add_column(name, justify="left" if place < 2 else "right")
    for task, result in found.tasks.items():
        others = ", ".join(f"{k} {_percent(v)}" for k, v in result.metrics.items() if k != result.metric)
        share = _percent(result.normalised.value) if result.normalised else "-"
        expert = _percent(result.expert) if result.expert is not None else "-"
        score = result.score
        spread = f"{_percent(score.low)} … {_percent(score.high)}"
        table.add_row(task, result.metric, _percent(score.value), spread, expert, share, others, str(result.samples))
    spread = f"{_percent(found.average.low)} … {_percent(found.average.high)}"
    share = _percent(found.normalised.value) if found.normalised else "-"
    table.add_row("average", "", _percent(found.average.value), spread, "", share, "", "", style="bold")
    table.caption = f"{found.samples_per_second:.0f} samples/s, {found.model.parameters / 1e6:.1f} M parameters"
    return table


def sweep_table(found: Sweep) -> Table:
    """A sweep, a line per point."""
    title = f"{escape(found.method)} on {found.suite.name}: normalised, %"
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


def _cells(row: Row, tasks: list[str]) -> list[str]:
    e, d = row.evaluation, row.difference
    against = "" if d is None else f"{100 * d.value:+.1f}{'*' if d.p < SIGNIFICANT else ''}"
    return [
        row.label, *(_percent(e.tasks[task].score.value) for task in tasks), _spread(e.average), _spread(e.normalised),
        against, show_seconds(row.fit_seconds) if row.fit_seconds is not None else "",
        show_seconds(row.merge_seconds) if row.merge_seconds is not None else "", show_bytes(e.model.bytes),
        row.data, e.protocol.task_id,
    ]  # fmt: skip


def _best(found: Comparison) -> set[tuple[int, int]]:
    """(row, column) of the best merged model of every task, and of the averages."""
    ours = [at for at, row in enumerate(found.rows) if row.kind in ("merge", "model")]
    tasks = found.suite.tasks
    columns: list[Callable[[Row], float]] = [lambda row, t=task: row.evaluation.tasks[t].score.value for task in tasks]
    columns += [lambda row: row.evaluation.average.value]
    columns += [lambda row: row.evaluation.normalised.value if row.evaluation.normalised else 0.0]
    best = set()
    for column, value in enumerate(columns, start=1):
        most = max((value(found.rows[at]) for at in ours), default=None)
        best |= {(at, column) for at in ours if value(found.rows[at]) == most}
    return best


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _spread(value: Interval | None) -> str:
    return "-" if value is None else f"{_percent(value.value)} ±{50 * (value.high - value.low):.1f}"


def _three(value: Interval | None) -> list[Any]:
    return [None] * 3 if value is None else [value.value, value.low, value.high]


def _plain(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ").replace("*", "\\*")
