"""Whoever is told what has been done."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Is told what has been done; may show it."""

    def stage(self, name: str, total: int, unit: str = "bytes") -> None:
        """A stage of `total` bytes begins, or of other units."""
        ...

    def advance(self, count: int) -> None:
        """So many more of them are done."""
        ...

    def note(self, text: str) -> None:
        """How the stage stands, in a few numbers."""
        ...


class Silent:
    """Shows nothing."""

    def stage(self, name: str, total: int, unit: str = "bytes") -> None:
        """A stage begins."""

    def advance(self, count: int) -> None:
        """So many more of them are done."""

    def note(self, text: str) -> None:
        """How the stage stands."""
