"""What `plait merge` says at its end: without rich, whose import would be seen in the time of a small merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from plait.errors import printable
from plait.units import show_bytes

if TYPE_CHECKING:
    from plait.run import Merged


def emit(data: Any, as_json: bool, text: Callable[[], None]) -> None:
    """JSON on standard output, or the text."""
    if as_json:
        print(json.dumps(data, indent=2, ensure_ascii=False))
    else:
        text()


def merged_data(merged: Merged) -> dict[str, Any]:
    """What a merge has made."""
    return {
        "path": str(merged.path),
        "sha256": dict(merged.hashes),
        "merged": len(merged.plan.merged),
        "copied": len(merged.plan.tensors) - len(merged.plan.merged),
        "per_task": sorted(merged.plan.heads),
        "resumed_tensors": merged.resumed,
        "notes": list(merged.notes),
    }


def merged_text(merged: Merged) -> None:
    """A few lines."""
    plan = merged.plan
    resumed = f" ({merged.resumed} of them by the interrupted run)" if merged.resumed else ""
    size = sum((merged.path / name).stat().st_size for name in merged.hashes)
    typer.echo(
        f"{typer.style(printable(str(merged.path)), bold=True)}: {len(plan.tensors)} tensors{resumed}, "
        f"{show_bytes(size)}, from {len(plan.models)} models by {plan.method.name}"
    )
    if plan.heads:
        typer.echo(printable(f"heads kept per task: {', '.join(sorted(plan.heads))} (in {merged.path}/heads)"))
    for note in merged.notes:
        typer.echo(printable(f"note: {note}"))
