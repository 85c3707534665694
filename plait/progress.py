"""Progress of long work: a bar with bytes, rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from plait.stages import Progress, Silent
from plait.units import show_bytes, show_seconds

if TYPE_CHECKING:
    from rich.progress import TaskID

_EVERY_SECONDS = 5.0


class Lines:
    """A line now and then, for logs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._name, self._unit, self._total, self._done = "", "bytes", 0, 0
        self._note = ""
        self._start = self._said = time.monotonic()

    def stage(self, name: str, total: int, unit: str = "bytes") -> None:
        """A stage of `total` bytes (or other units) begins."""
        with self._lock:
            self._name, self._unit, self._total, self._done, self._note = name, unit, total, 0, ""
            self._start = self._said = time.monotonic()

    def advance(self, count: int) -> None:
        """So many more bytes are done."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._said < _EVERY_SECONDS:
                return
            self._said = now
            rate = self._done / (now - self._start)
            left = show_seconds(max(self._total - self._done, 0) / rate) if rate else "?"
            share = self._done / self._total if self._total else 1.0
            done, total = self._amount(self._done), self._amount(self._total)
            speed = f"{show_bytes(rate)}/s" if self._unit == "bytes" else f"{rate:.1f}/s"
            note = f"; {self._note}" if self._note else ""
        print(f"{self._name}: {share:.0%}, {done} of {total}, {speed}, {left} left{note}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """How the stage stands: said with the next line."""
        with self._lock:
            self._note = text

    def _amount(self, count: int) -> str:
        return show_bytes(count) if self._unit == "bytes" else f"{count} {self._unit}"


@contextmanager
def shown(quiet: bool) -> Iterator[Progress]:
    """A progress display on standard error, for the length of a `with`."""
    if quiet:
        yield Silent()
    elif not sys.stderr.isatty():
        yield Lines()
    else:
        with _Bar() as bar:
            yield bar


class _Bar(Silent):
    """Bars on a terminal, one for every stage."""

    def __enter__(self) -> _Bar:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
        self._bar = RichProgress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
        self._bar.start()
        self._task: TaskID | None = None
        self._lock = threading.Lock()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def stage(self, name: str, total: int, unit: str = "bytes") -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=self._total)
        self._unit, self._total, self._done, self._note = unit, max(total, 1), 0, ""
        self._task = self._bar.add_task(name, total=self._total, text="")
        self._start = time.monotonic()

    def advance(self, count: int) -> None:
        if self._task is None:
            return
        with self._lock:
            self._done += count
            rate = self._done / max(time.monotonic() - self._start, 1e-3)
            if self._unit == "bytes":
                text = f"{show_bytes(self._done)} of {show_bytes(self._total)}, {show_bytes(rate)}/s"
            else:
                text = f"{self._done} of {self._total} {self._unit}"
            text += f", {self._note}" if self._note else ""
        self._bar.update(self._task, advance=count, text=text)

    def note(self, text: str) -> None:
        with self._lock:
            self._note = text
