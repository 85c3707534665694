"""A checkpoint folder that appears whole or not at all.

Shards are laid out beforehand and filled in place, in a hidden folder beside the final one. What is finished goes into
a journal, so that an interrupted run goes on where it was; the final name is given by one rename, at the end.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from plait import atomic
from plait.digests import marked_digest
from plait.errors import MachineError, RecipeError
from plait.follow import Follower
from plait.shards import ShardFile

JOURNAL = ".journal"
_SYNC_SECONDS = 20.0


class FolderWriter:
    """Writes one output folder. Use as a context manager; leaving it without `commit` keeps what is finished."""

    def __init__(self, out: Path, key: str, shards: list[ShardFile], *, overwrite: bool, follow: bool = False) -> None:
        self.out = out.resolve() if out.is_symlink() else out  # what a link leads to is replaced, never the link
        self.follow = follow
        """Whether a thread of its own hashes what is written; else that is done at the end."""
        self.partial = self.out.parent / f".{self.out.name}.partial-{key[:16]}"
        self.shards = {item.name: item for item in shards}
        self.overwrite = overwrite
        self.added: dict[str, str] = {}
        """Side file → SHA-256."""
        self.marks: dict[str, list[str]] = {}
        """Weight file → digests of its beginnings, up to the end of its header and of every tensor (`hashes`)."""
        self._where = {name: (item.name, start) for item in shards for name, start in item.offsets.items()}
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        self._synced = time.monotonic()
        self._journal: IO[str] | None = None
        self._guard = -1
        self._follower: Follower | None = None
        self.done: set[str] = set()
        """Tensors that an interrupted run has finished."""
        self._durable: set[str] = set()
        self._finished = 0

    def __enter__(self) -> FolderWriter:
        if self.out.name in ("", ".."):
            raise RecipeError(f"{self.out}: has no name of its own; give the output folder by its name")
        try:
            with self._explained():
                self.out.parent.mkdir(parents=True, exist_ok=True)
                self._put_back()
                self._refuse_taken()
                self._take_lock()
                self._refuse_taken()  # again: what held the lock may just have finished
                self._open()
        except BaseException:
            self._close(discard=not self.done)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(discard=error is not None and not self.done and not self._finished)

    def leftovers(self) -> list[Path]:
        """Unfinished work of other recipes under the same output name."""
        return [path for path in atomic.beside(self.out, "partial") if path != self.partial]

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Put bytes at `offset` of a tensor. Safe to call from several threads."""
        name, start = self._where[tensor]
        position = start + offset
        try:
            while data:
                count = os.pwrite(self._files[name], data, position)
                data, position = data[count:], position + count
        except OSError as error:
            raise self._explain(error) from None

    def read(self, tensor: str, offset: int, data: memoryview) -> None:
        """Fill `data` with what was written at `offset` of a tensor."""
        name, start = self._where[tensor]
        position = start + offset
        try:
            while data:
                count = os.preadv(self._files[name], [data], position)
                if not count:
                    raise OSError(errno.EIO, "became shorter", name)
                data, position = data[count:], position + count
        except OSError as error:
            raise self._explain(error) from None

    def finish(self, tensor: str) -> None:
        """Note in the journal that a tensor is whole."""
        if self._follower is not None:
            self._follower.finished(tensor)
        with self._lock, self._explained():
            assert self._journal is not None
            self._journal.write(json.dumps(tensor) + "\n")
            self._journal.flush()
            self._finished += 1
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._sync()

    def add_file(self, name: str, content: bytes) -> None:
        """A side file, `name` relative to the folder."""
        path = self.partial / name
        with self._explained():
            path.parent.mkdir(exist_ok=True)  # not parents=True: a folder that was removed is not to come back
            atomic.write_durably(path, content)
        self.added[name] = hashlib.sha256(content).hexdigest()

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every weight file as it now stands, once all tensors are finished."""
        result = {}
        if self._follower is not None:
            for name, (digest, marks) in self._follower.result().items():
                result[name], self.marks[name] = digest, marks
            return result
        for name, item in sorted(self.shards.items()):
            starts = sorted(item.offsets.values())
            with self._explained():
                result[name], self.marks[name] = marked_digest(self._files[name], [*starts, item.size])
        return result

    def commit(self) -> None:
        """Make everything durable, then give the folder its name in one step."""
        with self._explained():
            for fd in self._files.values():
                os.fsync(fd)
            self._refuse_removed()
            if not self.overwrite:
                self._refuse_taken()
            (self.partial / JOURNAL).unlink()
            atomic.sync_folder(self.partial)
            try:
                exchanged = atomic.put_in_place(self.partial, self.out, replace=self.overwrite)
            except FileExistsError:
                raise self._taken() from None
        if exchanged:
            shutil.rmtree(self.partial, ignore_errors=True)  # what is left of it, `plait clean` finds

    def discard(self) -> None:
        """Remove the unfinished work: nothing of it is worth going on with."""
        if self._guard >= 0 and atomic.is_at(self._guard, self.partial):
            shutil.rmtree(self.partial, ignore_errors=True)

    def _put_back(self) -> None:
        """Give the former output its name again, where an exchange was interrupted between two renames."""
        aside = atomic.set_aside(self.out)
        if aside is not None and not self.out.exists():
            os.rename(aside, self.out)

    def _refuse_taken(self) -> None:
        if self.out.exists() and not self.overwrite:
            raise self._taken()
        if self.out.exists() and not self.out.is_dir():
            raise RecipeError(f"{self.out}: is a file, not a folder; choose another name")

    def _taken(self) -> RecipeError:
        return RecipeError(f"{self.out}: exists already; choose another folder, or add --overwrite to replace it")

    def _refuse_removed(self) -> None:
        if not atomic.is_at(self._guard, self.partial):
            raise MachineError(
                f"{self.partial}: was removed while the merge was written, so its work is lost; run the same command "
                "again"
            )

    def _take_lock(self) -> None:
        guard = atomic.lock_folder(self.partial)
        if guard is None:
            raise self._busy()
        self._guard = guard
        self._read_journal()
        for other in self.leftovers():
            # Two that start in one moment see each other: then the first by name goes on, as it has no journal yet.
            starting = not (other / JOURNAL).exists() and self.partial < other
            if not starting and atomic.is_locked(other):
                raise self._busy()

    def _busy(self) -> MachineError:
        return MachineError(f"{self.out}: another merge is writing this folder now; wait for it to end")

    def _open(self) -> None:
        self._tidy()
        need = sum(item.size for item in self.shards.values())
        have = sum(
            (self.partial / name).stat().st_blocks * 512 for name in self.shards if (self.partial / name).exists()
        )
        free = shutil.disk_usage(self.partial).free
        if need - have > free:
            raise MachineError(
                f"{self.out.parent}: the disk is too full: the merged model takes {need / 1e9:.2f} GB and "
                f"{(free + have) / 1e9:.2f} GB are free; free some space or choose another disk"
            )
        for item in self.shards.values():
            fd = os.open(self.partial / item.name, os.O_RDWR | os.O_CREAT, 0o644)
            self._files[item.name] = fd
            atomic.reserve(fd, item.size)
            os.pwrite(fd, item.header, 0)
        # Written anew, so that it says what is believed and nothing else: no torn line, none from before a reboot.
        synced = [*sorted(self._durable), {"synced": True}] if self._durable else []
        lines = [{"boot": atomic.boot()}, *synced, *sorted(self.done - self._durable)]
        atomic.replace_durably(self.partial / JOURNAL, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
        self._journal = open(self.partial / JOURNAL, "a", encoding="utf-8")  # noqa: SIM115  (closed in _close)
        if self.follow:
            files = [(item.name, self._files[item.name], item.regions()) for item in self.shards.values()]
            self._follower = Follower(files, self.done)

    def _tidy(self) -> None:
        """Remove what is no unfinished work of ours: side files are written anew, and without a journal all is."""
        atomic.empty(self.partial, keep={JOURNAL, *self.shards} if self.done else set())

    def _read_journal(self) -> None:
        """Finished tensors. After a reboot only those before the last sync: the rest may not have reached the disk."""
        try:
            lines = (self.partial / JOURNAL).read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return
        done: set[str] = set()
        synced: set[str] = set()
        boot = None
        for line in lines:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                break  # the line that the interruption cut, or a disk that lost what it was told
            if isinstance(entry, str):
                done.add(entry)
            elif isinstance(entry, dict) and "boot" in entry:
                boot = entry["boot"]
            else:
                synced = set(done)
        self._durable = synced & set(self._where)
        self.done = done & set(self._where) if boot == atomic.boot() else set(self._durable)

    def _sync(self) -> None:
        for fd in self._files.values():
            os.fdatasync(fd)
        assert self._journal is not None
        self._journal.write(json.dumps({"synced": True}) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._synced = time.monotonic()

    def _close(self, *, discard: bool = False) -> None:
        if self._follower is not None:
            self._follower.stop()
            self._follower = None
        for fd in self._files.values():
            os.close(fd)
        self._files = {}
        journal, self._journal = self._journal, None
        if journal is not None:
            with suppress(OSError):  # a line that a full disk refused: the tensor is merged again
                journal.close()
        if discard:
            self.discard()
        if self._guard >= 0:
            os.close(self._guard)
            self._guard = -1

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._explain(error) from None

    def _explain(self, error: OSError) -> MachineError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return MachineError(
                f"{self.out}: the disk became full; free some space and run the same command: it goes on where it was "
                f"(unfinished work is in {self.partial})"
            )
        if error.errno == errno.ENOENT and not self.partial.exists():
            return MachineError(
                f"{self.partial}: was removed while the merge was written, so its work is lost; run the same command "
                "again"
            )
        return MachineError(
            f"{self.out}: cannot be written ({error.strerror or error}); put that right and run the same command: it "
            "goes on where it was"
        )
