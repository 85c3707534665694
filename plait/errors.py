"""Everything Plait can refuse, and the exit code that goes with it.

    PlaitError                   exit 1   a fault of ours, or of the machine
    ├── RecipeError              exit 2   the recipe asks for something that cannot be done
    ├── CheckpointError          exit 3   a file is missing, damaged, hostile, or does not fit the others
    └── MachineError             exit 1   disk full, memory budget, interrupted: the recipe and the files are fine

Every message names the file, tensor, model or recipe key, and ends with what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 4000
"""Characters of a message: it may quote what a stranger wrote, and nobody reads more."""


class PlaitError(Exception):
    """Base of all errors that Plait raises on purpose. `exit_code` is what the command line returns."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class RecipeError(PlaitError):
    """The recipe is wrong. Names the line, the key and, where there is one, the nearest known name."""

    exit_code = 2


class CheckpointError(PlaitError):
    """A checkpoint is missing, damaged, hostile, or does not fit the others."""

    exit_code = 3


class MachineError(PlaitError):
    """The machine cannot do it as asked (disk full, memory budget too small), though recipe and files are fine."""


def printable(text: str) -> str:
    """Foreign text for a terminal: what would move the cursor, hide or turn text is spelled out."""
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + " …"
    if text.replace("\n", "").isprintable():
        return text
    return "".join(mark if mark == "\n" or mark.isprintable() else repr(mark)[1:-1] for mark in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'density'?` for the closest known name, or the list of known names when nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""
