"""Hashes output files while they are being written: what is whole from the start of a file on is read back at once.

A file's SHA-256 is a chain, so one thread follows the tensors as they are finished. What it reads is still in the page
cache, and little is left to do when the last tensor is.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterable

from plait import atomic
from plait.digests import MARK
from plait.errors import MachineError

_STEP = 1 << 20
_WRITE_BACK = 1 << 25
"""Bytes after which the disk is told to begin: less is left to wait for before the rename."""


class Follower:
    """One thread over all files of a folder: (name, open descriptor, regions) each.

    Regions: (tensor, first byte, one after the last). `done` are the tensors that are finished already.
    """

    def __init__(self, files: Iterable[tuple[str, int, list[tuple[str, int, int]]]], done: Iterable[str]) -> None:
        self._files = list(files)
        self._done = set(done)
        self._news = threading.Condition()
        self._stopped = False
        self._hashes: dict[str, tuple[str, list[str]]] = {}
        self._error: MachineError | None = None
        self._thread = threading.Thread(target=self._run, name="plait-hash", daemon=True)
        self._thread.start()

    def finished(self, tensor: str) -> None:
        """A tensor's bytes are all in its file."""
        with self._news:
            self._done.add(tensor)
            self._news.notify()

    def result(self) -> dict[str, tuple[str, list[str]]]:
        """File name → SHA-256 and marks (`digests.marked_digest`), once every tensor is finished.

        Raises MachineError when a file cannot be read back.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return dict(self._hashes)

    def stop(self) -> None:
        """Give up and wait for the thread."""
        with self._news:
            self._stopped = True
            self._news.notify()
        self._thread.join()

    def _run(self) -> None:
        for name, descriptor, regions in self._files:
            try:
                self._hashes[name] = self._follow(descriptor, regions)
            except OSError as error:
                reason = error.strerror or error
                self._error = MachineError(f"{name}: cannot be read back ({reason}); check the disk of the output")
                return
            if self._stopped:
                return

    def _follow(self, descriptor: int, regions: list[tuple[str, int, int]]) -> tuple[str, list[str]]:
        digest, at, begun, marks = hashlib.sha256(), 0, 0, []
        buffer = memoryview(bytearray(_STEP))
        size = os.fstat(descriptor).st_size
        ends = [("", regions[0][1] if regions else size), *((tensor, stop) for tensor, _, stop in regions)]
        for tensor, end in ends:
            with self._news:
                self._news.wait_for(lambda tensor=tensor: self._stopped or not tensor or tensor in self._done)
                if self._stopped:
                    return "", []
            while at < end:
                count = os.preadv(descriptor, [buffer[: end - at]], at)
                if not count:
                    raise OSError(errno.EIO, "it became shorter")
                digest.update(buffer[:count])
                at += count
                if at - begun >= _WRITE_BACK:
                    atomic.start_writing(descriptor, begun, at - begun)
                    begun = at
            marks.append(digest.copy().hexdigest()[:MARK])
        return digest.hexdigest(), marks
