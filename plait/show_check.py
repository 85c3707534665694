"""What `plait check` prints, and `plait plan` first of all: without rich, whose import is a tenth of a check's time."""

from __future__ import annotations

from typing import Any

import typer

from plait.errors import printable
from plait.plan import Plan


def check_data(plan: Plan) -> dict[str, Any]:
    """Summary of a plan that holds."""
    return {
        "ok": not plan.refused,
        "method": plan.method.name,
        "base": plan.base.label if plan.base else None,
        "models": {model.name: {"from": model.label, "names": model.alignment.describe()} for model in plan.models},
        "merged": len(plan.merged),
        "copied": len(plan.tensors) - len(plan.merged),
        "per_task": {task: [item.stored for item in items] for task, items in plan.heads.items()},
        "notes": plan.notes,
    }


def check_text(plan: Plan) -> None:
    """A few lines: what fits, and what to know."""
    copied = len(plan.tensors) - len(plan.merged)
    ok = typer.style("ok", fg="green", bold=True)
    typer.echo(f"{ok}  {plan.method.name}: {len(plan.merged)} tensors merged, {copied} copied")
    models_text(plan)
    notes_text(plan.notes)


def models_text(plan: Plan) -> None:
    """A line each for the base and the models: where they come from, and how many names they share."""
    rows = [("model", "from", "names")]
    if plan.base is not None:
        rows.append(("base", plan.base.label, f"{len(plan.base.specs())} tensors"))
    for model in plan.models:
        names = model.alignment.describe() if not model.updates else f"adapter: {len(model.updates)} updated tensors"
        rows.append((model.name, model.label, names))
    rows = [tuple(printable(cell).replace("\n", "\\n") for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        typer.echo(f" {typer.style(line, bold=not number)}")
    typer.echo()


def notes_text(notes: list[str]) -> None:
    """What there is to know."""
    for note in notes:
        typer.echo(printable(f"note: {note}"))
