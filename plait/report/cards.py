"""The key figures at the top: four numbers that most readers came for."""

from __future__ import annotations

from plait.evaluate.results import Interval, Sweep
from plait.report.boards import Board, Material
from plait.report.text import breakable, count, escape, percent, points, probability, prose, short
from plait.units import show_bytes

Card = tuple[str, str, str]
"""Heading, value, small print."""


def cards(material: Material) -> str:
    """Cards of the first board or, without one, of the first sweep."""
    if material.boards:
        made = _of_board(material.boards[0])
    else:
        made = _of_sweep(material.sweeps[0]) if material.sweeps else []
    inner = "".join(_card(*card) for card in made)
    return f'<dl class="cards">{inner}</dl>' if inner else ""


def _card(head: str, value: str, small: str) -> str:
    size = "value long" if len(value) > 13 else "value"
    return (
        f'<div class="card"><dt>{escape(head)}</dt><dd class="{size}">{breakable(short(value, 60))}</dd>'
        f'<dd class="small">{prose(small)}</dd></div>'
    )


def _of_board(board: Board) -> list[Card]:
    best = board.best
    if best is None:
        return []
    found, tasks = best.evaluation, count(len(board.tasks), "task")
    merged = best.kind == "merge" and len(board.of("merge")) > 1
    made: list[Card] = []
    if merged:
        by = "share of the experts" if found.normalised else "average"
        other = f"of {len(board.of('merge'))} merges, by {by}"
        made.append(("Best merge", best.label, other))
    if found.normalised:
        made.append(("Share of the experts", f"{percent(found.normalised.value)} %", _interval(found.normalised)))
    experts = board.of("expert")
    beside = f"experts: {percent(experts[0].evaluation.average.value)} %" if len(experts) == 1 else f"over {tasks}"
    made.append(("Average score", f"{percent(found.average.value)} %", beside))
    if best.difference is not None and board.baseline is not None:
        made.append((
            f"Against {board.baseline}", f"{points(best.difference.value)} points",
            f"{points(best.difference.low)} to {points(best.difference.high)}; {probability(best.difference.p)}",
        ))  # fmt: skip
    merging = _experts(board)
    if merging:
        whole = experts[0].evaluation.model.bytes if len(experts) == 1 else 0
        small = f"{show_bytes(whole)} of experts, " if whole > found.model.bytes else ""
        made.append(("Experts", f"{merging} in one", f"{small}{show_bytes(found.model.bytes)} merged"))
    else:
        made.append(("Tasks", str(len(board.tasks)), count(sum(r.samples for r in found.tasks.values()), "sample")))
        made.append(("Size", show_bytes(found.model.bytes), f"{found.model.parameters / 1e6:,.1f} M parameters"))
    return made


def _experts(board: Board) -> int:
    """How many experts went in, as far as anything tells."""
    if board.inspection and board.inspection.get("tasks"):
        return len(board.inspection["tasks"])
    models = [row.recipe.get("models") for row in board.of("merge") if row.recipe]
    sizes = [len(entry) for entry in models if isinstance(entry, list)]
    return max(sizes, default=len(board.tasks) if board.of("expert") else 0)


def _of_sweep(sweep: Sweep) -> list[Card]:
    if not sweep.points:
        return []
    best = max(sweep.points, key=lambda point: point.seen.value)
    return [
        ("Method", sweep.method, f"swept over {', '.join(sweep.axes)}"),
        ("Best share of the experts", f"{percent(best.seen.value)} %", _interval(best.seen)),
        ("Merges", str(len(sweep.points)), f"on {count(len(sweep.suite.tasks), 'task')}"),
    ]


def _interval(part: Interval) -> str:
    return f"95 % interval {percent(part.low)} to {percent(part.high)}"
