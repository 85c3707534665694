"""Results sorted into what the page shows: a board is one suite with the models that were measured on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from plait.evaluate.results import (
    Comparison,
    Corrupted,
    Evaluation,
    Interval,
    Result,
    Robustness,
    Row,
    SuiteFacts,
    Sweep,
    TaskResult,
)


@dataclass(frozen=True)
class Board:
    """The rows that share a table and a scale."""

    suite: SuiteFacts
    rows: tuple[Row, ...]
    baseline: str | None
    inspection: dict[str, Any] | None
    machine: str | None

    @property
    def tasks(self) -> list[str]:
        """In the suite's order."""
        return self.suite.tasks

    def of(self, *kinds: str) -> list[Row]:
        """Rows of these kinds, in the order given."""
        return [row for row in self.rows if row.kind in kinds]

    @property
    def ranked(self) -> list[Row]:
        """Merges and models, the best first."""
        return sorted(self.of("merge", "model"), key=lambda row: (-standing(row), row.label))

    @property
    def best(self) -> Row | None:
        """The best merge or, where nothing was merged, the best model."""
        return next((row for row in self.ranked if row.kind == "merge"), next(iter(self.ranked), None))

    def expert_of(self, task: str) -> float | None:
        """The score of a task's own expert: measured here, or noted with the other rows' results."""
        for row in self.of("expert"):
            result = row.evaluation.tasks.get(task)
            if result is not None and (len(self.of("expert")) == 1 or row.label == task):
                return result.score.value
        known = (row.evaluation.tasks.get(task) for row in self.rows)
        return next((result.expert for result in known if result is not None and result.expert is not None), None)


@dataclass(frozen=True)
class Material:
    """Everything that a report is made of."""

    boards: tuple[Board, ...]
    sweeps: tuple[Sweep, ...]


def gather(results: Sequence[Result]) -> Material:
    """Comparisons become boards; single evaluations join the board of their suite, or make one together."""
    boards = [
        Board(found.suite, tuple(found.rows), found.baseline, found.inspection, found.machine)
        for found in results
        if isinstance(found, Comparison)
    ]
    alone = [as_row(found) for found in results if isinstance(found, Evaluation)]
    alone += [as_row(found.clean, found.corrupted) for found in results if isinstance(found, Robustness)]
    for row in alone:
        suite = row.evaluation.suite
        place = next((i for i, b in enumerate(boards) if b.suite.fingerprint == suite.fingerprint), None)
        if place is None:
            boards.append(Board(suite, (row,), None, None, None))
        elif all((one.evaluation, one.corrupted) != (row.evaluation, row.corrupted) for one in boards[place].rows):
            boards[place] = replace(boards[place], rows=(*boards[place].rows, row))
    return Material(tuple(boards), tuple(found for found in results if isinstance(found, Sweep)))


def as_row(evaluation: Evaluation, corrupted: Sequence[Corrupted] = ()) -> Row:
    """A line for a model that was measured alone."""
    return Row(
        label=evaluation.model.label, kind="model", method=None, recipe=None, evaluation=evaluation,
        merge_seconds=None, data="", difference=None, corrupted=list(corrupted),
    )  # fmt: skip


def standing(row: Row) -> float:
    """What rows are ranked by: the normalised average, or the plain one where the experts are unknown."""
    found = row.evaluation.normalised or row.evaluation.average
    return found.value


def shade(result: TaskResult, board: Board, task: str) -> float | None:
    """The share of the expert's score that colours a cell; the score itself where no expert is known."""
    if result.normalised is not None:
        return result.normalised.value
    expert = board.expert_of(task)
    return result.score.value / expert if expert and expert > 0 else result.score.value


def mean_interval(parts: Sequence[Interval]) -> Interval:
    """Mean of values and of the ends of their intervals: how wide they typically are, not the mean's own interval."""
    size = len(parts)
    return Interval(
        value=sum(p.value for p in parts) / size, low=sum(p.low for p in parts) / size,
        high=sum(p.high for p in parts) / size,
    )  # fmt: skip
