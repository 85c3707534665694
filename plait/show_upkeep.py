"""What `verify` and `clean` print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape

from plait.leftovers import Leftover
from plait.show import console
from plait.units import show_bytes, show_seconds
from plait.verify import Verified


def verified_data(found: Verified) -> dict[str, Any]:
    """What a check of a merged model has found."""
    return {
        "folder": str(found.folder),
        "ok": not found.damage,
        "checked": sorted(found.checked),
        "bytes": found.size,
        "replayed": found.replayed,
        "damage": dict(sorted(found.damage.items())),
        "unrecorded": found.unrecorded,
    }


def verified_text(found: Verified) -> None:
    """A line where all is well; what is wrong is said by the error."""
    out = console()
    if not found.damage:
        again = ", and merging again gives the same bytes" if found.replayed else ""
        out.print(
            f"[bold]{escape(str(found.folder))}[/]: {len(found.checked)} files ({show_bytes(found.size)}) are what was "
            f"written{again}"
        )
    if found.unrecorded:
        out.print(f"nothing is recorded of: {', '.join(found.unrecorded)}", markup=False)


def leftovers_data(found: Sequence[Leftover], removed: Sequence[Leftover]) -> dict[str, Any]:
    """What interrupted work has left, and what of it was removed."""
    gone = {item.path for item in removed}
    items = [
        {
            "path": str(item.path), "what": item.what, "of": item.of, "bytes": item.size,
            "age_seconds": round(item.age), "kept": item.kept, "removed": item.path in gone,
        }
        for item in found
    ]  # fmt: skip
    return {"leftovers": items, "bytes": sum(item.size for item in found), "removed": len(gone)}


def leftovers_text(found: Sequence[Leftover], removed: Sequence[Leftover]) -> None:
    """A line each, and how to remove them."""
    out = console()
    if not found:
        out.print("nothing is left of interrupted work")
        return
    gone = {item.path for item in removed}
    for item in found:
        fate = "; removed" if item.path in gone else f"; kept: {item.kept}" if item.kept else ""
        out.print(
            f"{item.path}: {item.what} ({show_bytes(item.size)}, {show_seconds(item.age)} old){fate}",
            markup=False,
            soft_wrap=True,
        )
    left = [item for item in found if item.kept is None and item.path not in gone]
    if left:
        total = show_bytes(sum(item.size for item in left))
        out.print(f"{total} can be removed: plait clean --remove. A merge or fit that is to go on still needs its own.")
