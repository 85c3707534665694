"""The verbs that look after what is on disk: verify, clean. One function a verb, no logic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from plait.errors import CheckpointError, RecipeError

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def verify(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="What plait merge or plait fit wrote.")],
    replay: Annotated[
        bool, typer.Option("--replay", help="Also merge again by the recorded recipe, and compare.")
    ] = False,
    root: Annotated[
        Path | None, typer.Option(help="Where relative paths of the recipe start. Default: the working directory.")
    ] = None,
    memory: Annotated[str, typer.Option(help="Bound of the merge's buffers, with --replay.")] = "512MB",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the merge, with --replay.")] = None,
    device: Annotated[str, typer.Option(help="Of the merge, with --replay: cpu, cuda, …")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Check that a merged model is what was written: every recorded digest, and with --replay the merge itself."""
    from plait import progress, show, show_upkeep, verify
    from plait.run import usable_threads
    from plait.units import parse_bytes

    if root is not None and not replay:
        raise RecipeError("verify: --root goes with --replay")
    with progress.shown(quiet or as_json) as shown:
        found = verify.verify(folder, shown)
        if replay and not found.damage:
            verify.replay(
                found, root or Path(), memory=parse_bytes(memory, "--memory"), threads=threads or usable_threads(),
                device=device, progress=shown,
            )  # fmt: skip
    show.emit(show_upkeep.verified_data(found), as_json, lambda: show_upkeep.verified_text(found))
    if found.damage:
        raise CheckpointError(found.refusal())


def clean(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder to look in. Default: the working directory, and Plait's cache.")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove them; without this they are only listed.")] = False,
    as_json: Json = False,
) -> None:
    """List what interrupted merges, fits and builds have left on disk, or remove it; never work that goes on."""
    from plait import leftovers, show, show_upkeep

    if folder is not None and not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder; give one in which Plait has worked")
    found = leftovers.find(folder)
    gone = leftovers.remove(found) if remove else []
    data = show_upkeep.leftovers_data(found, gone)
    show.emit(data, as_json, lambda: show_upkeep.leftovers_text(found, gone))


def register(app: Any) -> None:
    """Add the verbs to the command line."""
    for verb in (verify, clean):
        app.command()(verb)
