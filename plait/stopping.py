"""Ctrl-C and SIGTERM end a command with a sentence that says how to go on, and never with a traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class Stop:
    """Whether the command was told to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The first signal unwinds, so that what is open is closed; the second ends the process at once."""
        if self.signal:
            self.leave()
        self.signal = number
        raise KeyboardInterrupt

    def leave(self) -> None:
        """Say how to go on, and end with 130 (Ctrl-C) or 143 (SIGTERM). Threads are not waited for: all that is
        finished is noted on disk, and nothing has its final name before it is whole.
        """
        resume = " with --resume" if sys.argv[1:2] == ["fit"] else ""
        text = f"\nplait: interrupted; run the same command again{resume} to go on\n"
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os.write(2, text.lstrip().encode() if not sys.stderr.isatty() else text.encode())
        os._exit(128 + self.signal)


@contextmanager
def listen() -> Iterator[Stop]:
    """Take both signals for as long as a command runs; one that the process was told to ignore stays ignored."""
    stop, before = Stop(), {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, stop.handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
