"""`clean`: what interrupted work has left behind: hidden folders and files that Plait makes and nothing else makes.

Only names that Plait gives are looked at, and of those none that a living process holds: work folders are locked while
they are written, and other temporary names end in the number of their process.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from plait import atomic
from plait.suites.places import cache_folder

_KEY = "[0-9a-f]{16}"
_WORK = {
    re.compile(rf"\.(?P<of>.+)\.partial-{_KEY}"): "an unfinished merge",
    re.compile(rf"\.(?P<of>.+)\.fitting-{_KEY}"): "an unfinished fit",
    re.compile(rf"\.(?P<of>.+)\.state-{_KEY}"): "the state that an unfinished merge has fitted",
    re.compile(r"\.(?P<of>.+)\.replay-[a-z0-9_]{8}"): "a merge done again by plait verify",
    re.compile(r"\.(?P<of>.+)\.writing-(?P<pid>\d+)"): "a routed model that was being saved",
    re.compile(rf"\.(?P<of>.+)\.{atomic.REPLACED}"): "a former output",
}
_FILES = {
    re.compile(r"\.(?P<of>(comparison|sweep)[^/]*)-(?P<pid>\d+)"): "results that were being written",
    re.compile(r"\.(?P<of>.+\.html)\.[0-9a-f]{8}"): "a report that was being written",
}
_CACHE = re.compile(r"\.(?P<of>.+)-(?P<pid>\d+)")
_RECENT = 60.0


@dataclass(frozen=True)
class Leftover:
    """Something that interrupted work has left."""

    path: Path
    what: str
    of: str
    """What it was to become."""
    size: int
    """Bytes on disk."""
    age: float
    """Seconds since anything in it was written."""
    kept: str | None
    """Why it is not to be removed; None where it may be."""


def find(folder: Path | None) -> list[Leftover]:
    """Leftovers in a folder and the folders right in it; by default in the working directory and in Plait's cache."""
    places = [folder] if folder is not None else [Path()]
    found = [item for place in places for item in _in_folder(place, depth=1)]
    if folder is None and cache_folder().is_dir():
        found += _in_cache(cache_folder())
    return found


def remove(items: list[Leftover]) -> list[Leftover]:
    """Remove what may be removed; returns what was. What has been taken up meanwhile stays."""
    return [item for item in items if item.kept is None and _removed(item.path)]


def _in_folder(folder: Path, depth: int) -> Iterator[Leftover]:
    for path in _listed(folder):
        if path.is_symlink():
            continue
        if path.is_dir():
            known = _known(path, _WORK)
            if known is not None:
                yield known
            elif depth and not path.name.startswith("."):
                yield from _in_folder(path, depth - 1)
        elif path.is_file() and (known := _known(path, _FILES)) is not None:
            yield known


def _in_cache(folder: Path) -> Iterator[Leftover]:
    """All of the cache is ours, so there a hidden name with the number of a process is enough."""
    for path in _listed(folder):
        if path.is_symlink():
            continue
        known = (_known(path, _WORK) if path.is_dir() else None) or _known(path, {_CACHE: "half-made, in the cache"})
        if known is not None:
            yield known
        elif path.is_dir():
            yield from _in_cache(path)


def _known(path: Path, names: dict[re.Pattern[str], str]) -> Leftover | None:
    for pattern, what in names.items():
        match = pattern.fullmatch(path.name)
        if match is not None:
            size, changed = _measure(path)
            age = max(time.time() - changed, 0.0)
            return Leftover(path, what, match["of"], size, age, _why_kept(path, match, age))
    return None


def _why_kept(path: Path, match: re.Match[str], age: float) -> str | None:
    process = match.groupdict().get("pid")
    if process is not None:
        return f"process {process} is running" if _is_alive(int(process)) else None
    if path.name.endswith(atomic.REPLACED) and not path.with_name(match["of"]).exists():
        return f"is the only copy of the former output: run the merge again, or rename it to {match['of']}"
    if path.is_dir():
        return "a process is working on it" if atomic.is_locked(path) or _state_in_use(path, match) else None
    return "was written just now" if age < _RECENT else None


def _state_in_use(path: Path, match: re.Match[str]) -> bool:
    """A state's folder is taken up by its merge a moment after it was written, so the fit's own lock counts too."""
    return ".state-" in path.name and any(map(atomic.is_locked, atomic.beside(path, "fitting")))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _measure(path: Path) -> tuple[int, float]:
    """Bytes on disk, and the latest change in it."""
    size, changed = 0, 0.0
    for each in [path, *(path.rglob("*") if path.is_dir() else ())]:
        try:
            status = each.lstat()
        except OSError:  # gone meanwhile
            continue
        size, changed = size + status.st_blocks * 512, max(changed, status.st_mtime)
    return size, changed


def _removed(path: Path) -> bool:
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return True
    guard = atomic.lock_folder(path) if path.exists() else None
    if guard is None:
        return False
    try:
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(guard)
    return not path.exists()


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
