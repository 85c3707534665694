"""Reports: results of evaluations, comparisons and sweeps as one HTML file that works offline.

Same results, same bytes: no dates, no random names. `render` gives the text, `write_report` puts it into a file whole.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from plait.errors import MachineError, RecipeError
from plait.evaluate.results import Result
from plait.report.boards import gather
from plait.report.page import page_text

__all__ = ["render", "write_report"]


def render(
    results: Sequence[Result],
    *,
    title: str | None = None,
    provenance: Mapping[str, str] | None = None,
) -> str:
    """The report's HTML. `provenance` adds lines of its own, such as {"command": "plait compare …"}.

    Raises RecipeError without results, MachineError where plotly is missing.
    """
    if not results:
        raise RecipeError("a report needs at least one result: give files that plait eval, compare or sweep wrote")
    return page_text(gather(results), title, provenance or {})


def write_report(
    results: Sequence[Result],
    out: str | os.PathLike[str],
    *,
    title: str | None = None,
    provenance: Mapping[str, str] | None = None,
) -> Path:
    """Render into a file, which appears whole or not at all. Returns its path."""
    path = Path(out)
    text = render(results, title=title, provenance=provenance)
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        hidden.write_text(text, encoding="utf-8", newline="\n")
        os.replace(hidden, path)
    except OSError as error:
        raise MachineError(f"{path}: the report cannot be written: {error.strerror}") from None
    finally:
        hidden.unlink(missing_ok=True)
    return path
