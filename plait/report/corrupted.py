"""Models under corruptions of their images: how much of the experts each keeps, corruption by corruption."""

from __future__ import annotations

from plait.evaluate.results import Corrupted, Interval, Row
from plait.report.boards import Board
from plait.report.text import MISSING, breakable, escape, percent

_NOTE = (
    "Share of the experts’ scores, in percent, with images as they are (clean) and corrupted: kind and severity, from "
    "1 to 5. The experts stand on clean images, so that every column shows what a corruption costs; <em>alike</em> is "
    "the mean over the corruptions where the experts read the same corrupted images: below the clean share, the model "
    "bears them worse than the experts do."
)


def corrupted_part(board: Board) -> str:
    """A note and a table of models by corruptions; empty where nothing was corrupted."""
    rows = [row for row in board.rows if row.corrupted]
    if not rows:
        return ""
    names = list(dict.fromkeys(_name(one) for row in rows for one in row.corrupted))
    heads = ["clean", *names, "mean", "alike"]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "".join(_line(row, names) for row in rows)
    return (
        f'<p class="note">{_NOTE}</p><div class="table-scroll" tabindex="0" role="region" '
        f'aria-label="Share of the experts under every corruption"><table class="corrupted"><thead><tr>'
        f'<th scope="col" class="text name">model</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _line(row: Row, names: list[str]) -> str:
    under = {_name(one): one for one in row.corrupted}
    shares = [under[name].evaluation.normalised if name in under else None for name in names]
    alike = [under[name].normalised_alike if name in under else None for name in names]
    cells = [_cell(row.evaluation.normalised), *map(_cell, shares), _mean(shares), _mean(alike)]
    return f'<tr><th scope="row" class="name">{breakable(row.label)}</th>{"".join(cells)}</tr>'


def _name(one: Corrupted) -> str:
    how = one.evaluation.protocol.corruption
    return f"{how.name} {how.severity}" if how else "clean again"


def _cell(part: Interval | None) -> str:
    if part is None:
        return f"<td>{MISSING}</td>"
    title = f"95 % interval: {percent(part.low)} to {percent(part.high)}"
    return f'<td title="{title}">{percent(part.value)}</td>'


def _mean(parts: list[Interval | None]) -> str:
    known = [part.value for part in parts if part is not None]
    return f"<td><b>{percent(sum(known) / len(known))}</b></td>" if len(known) == len(parts) else f"<td>{MISSING}</td>"
