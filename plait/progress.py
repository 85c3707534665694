"""Progress of long work: a bar with bytes, rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from plait.run import Silent
from plait.units import show_bytes, show_seconds

_EVERY_SECONDS = 5.0


class Lines:
    """A line now and then, for logs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._name, self._total, self._done = "", 0, 0
        self._start = self._said = time.monotonic()

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` bytes begins."""
        with self._lock:
            self._name, self._total, self._done = name, total, 0
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
        print(
            f"{self._name}: {share:.0%}, {show_bytes(self._done)} of {show_bytes(self._total)}, "
            f"{show_bytes(rate)}/s, {left} left",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def shown(quiet: bool) -> Iterator[Silent | Lines]:
    """A progress display on standard error, for the length of a `with`."""
    if quiet:
        yield Silent()
    elif not sys.stderr.isatty():
        yield Lines()
    else:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            yield _Bar(bar)


class _Bar(Silent):
    def __init__(self, bar: object) -> None:
        from rich.progress import Progress, TaskID

        assert isinstance(bar, Progress)
        self._bar = bar
        self._task: TaskID | None = None

    def stage(self, name: str, total: int) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=self._bar.tasks[-1].total)
        self._task = self._bar.add_task(name, total=max(total, 1))

    def advance(self, count: int) -> None:
        if self._task is not None:
            self._bar.advance(self._task, count)
