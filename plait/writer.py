"""A checkpoint folder that appears whole or not at all.

Shards are laid out beforehand and filled in place, in a hidden folder beside the final one. What is finished goes into
a journal, so that an interrupted run goes on where it was; the final name is given by one rename, at the end.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import struct
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from plait.dtypes import from_torch, itemsize
from plait.errors import MachineError, RecipeError
from plait.follow import Follower
from plait.lazy import torch
from plait.sources.base import TensorSpec

JOURNAL = ".journal"
_SYNC_SECONDS = 20.0


@dataclass(frozen=True)
class ShardFile:
    """One safetensors file to be: its header, and where each tensor's bytes start in the file."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size: int

    def regions(self) -> list[tuple[str, int, int]]:
        """(tensor, first byte, one after its last), in the order of the file."""
        starts = sorted(self.offsets.items(), key=lambda item: item[1])
        return [
            (name, at, end) for (name, at), end in zip(starts, [*(at for _, at in starts[1:]), self.size], strict=True)
        ]


def lay_out(
    tensors: Iterable[TensorSpec], shard_size: int, metadata: Mapping[str, str], stem: str = "model"
) -> list[ShardFile]:
    """Cut tensors, in the order given, into safetensors files of at most `shard_size` bytes (a larger tensor alone)."""
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in tensors:
        if groups[-1] and filled + spec.nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    total = len(groups)
    names = (
        [f"{stem}.safetensors"]
        if total == 1
        else [f"{stem}-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    )
    return [shard(name, group, metadata) for name, group in zip(names, groups, strict=True)]


def shard(name: str, tensors: Iterable[TensorSpec], metadata: Mapping[str, str]) -> ShardFile:
    """The layout of one file. Wide types come first, so that every tensor starts at a multiple of its item size."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    starts = {}
    for spec in sorted(tensors, key=lambda spec: -itemsize(spec.dtype)):
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [at, at + spec.nbytes]}
        starts[spec.name] = at
        at += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    prefix = struct.pack("<Q", len(text)) + text
    return ShardFile(name, prefix, {key: len(prefix) + start for key, start in starts.items()}, len(prefix) + at)


def index_of(shards: Iterable[ShardFile], total: int) -> bytes:
    """model.safetensors.index.json."""
    weight_map = {name: item.name for item in shards for name in item.offsets}
    data = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(data, indent=2).encode() + b"\n"


class FolderWriter:
    """Writes one output folder. Use as a context manager; leaving it without `commit` keeps the work for resuming."""

    def __init__(self, out: Path, key: str, shards: list[ShardFile], *, overwrite: bool, follow: bool = False) -> None:
        self.out = out
        self.follow = follow
        """Whether a thread of its own hashes what is written; else that is done at the end."""
        self.partial = out.parent / f".{out.name}.partial-{key[:16]}"
        self.shards = {item.name: item for item in shards}
        self.overwrite = overwrite
        self._where = {name: (item.name, start) for item in shards for name, start in item.offsets.items()}
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        self._synced = time.monotonic()
        self._journal: IO[str] | None = None
        self._guard = -1
        self._follower: Follower | None = None
        self.done: set[str] = set()
        """Tensors that an interrupted run has finished."""

    def __enter__(self) -> FolderWriter:
        if self.out.exists() and not self.overwrite:
            raise RecipeError(f"{self.out}: exists already; choose another folder, or add --overwrite to replace it")
        if self.out.exists() and not self.out.is_dir():
            raise RecipeError(f"{self.out}: is a file, not a folder")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.partial.mkdir(exist_ok=True)
            self._take_lock()
            self._open()
        except OSError as error:
            self._close()
            raise self._explain(error) from None
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def leftovers(self) -> list[Path]:
        """Unfinished work of other recipes under the same output name."""
        return [p for p in sorted(self.out.parent.glob(f".{self.out.name}.partial-*")) if p != self.partial]

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

    def finish(self, tensor: str) -> None:
        """Note in the journal that a tensor is whole."""
        if self._follower is not None:
            self._follower.finished(tensor)
        with self._lock:
            assert self._journal is not None
            self._journal.write(json.dumps(tensor) + "\n")
            self._journal.flush()
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._sync()

    def add_file(self, name: str, content: bytes) -> None:
        """A side file, `name` relative to the folder."""
        path = self.partial / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._explain(error) from None

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every weight file as it now stands, once all tensors are finished."""
        if self._follower is not None:
            return self._follower.result()
        result = {}
        for name in sorted(self.shards):
            digest = hashlib.sha256()
            with open(self.partial / name, "rb", buffering=0) as file:
                while part := file.read(1 << 22):
                    digest.update(part)
            result[name] = digest.hexdigest()
        return result

    def commit(self) -> None:
        """Make everything durable, then give the folder its name in one step."""
        for fd in self._files.values():
            os.fsync(fd)
        (self.partial / JOURNAL).unlink()
        _fsync_folder(self.partial)
        if self.out.exists():
            _exchange(self.partial, self.out)
            shutil.rmtree(self.partial)
        else:
            os.rename(self.partial, self.out)
        _fsync_folder(self.out.parent)

    def _take_lock(self) -> None:
        self._guard = os.open(self.partial, os.O_RDONLY)
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MachineError(f"{self.out}: another merge is writing this folder now; wait for it to end") from None

    def _open(self) -> None:
        self.done = self._read_journal()
        need = sum(item.size for item in self.shards.values())
        have = sum(
            (self.partial / name).stat().st_blocks * 512 for name in self.shards if (self.partial / name).exists()
        )
        free = shutil.disk_usage(self.partial).free
        if need - have > free:
            self._discard()
            raise MachineError(
                f"{self.out.parent}: the disk is too full: the merged model takes {need / 1e9:.2f} GB and "
                f"{(free + have) / 1e9:.2f} GB are free; free some space or choose another disk"
            )
        for item in self.shards.values():
            fd = os.open(self.partial / item.name, os.O_RDWR | os.O_CREAT, 0o644)
            self._files[item.name] = fd
            _allocate(fd, item.size)
            os.pwrite(fd, item.header, 0)
        self._journal = open(self.partial / JOURNAL, "a", encoding="utf-8")  # noqa: SIM115  (closed in _close)
        if not self.done:
            self._journal.truncate(0)
            self._journal.write(json.dumps({"boot": _boot()}) + "\n")
            self._journal.flush()
        if self.follow:
            self._follower = Follower(
                ((self.partial / item.name, item.regions()) for item in self.shards.values()), self.done
            )

    def _read_journal(self) -> set[str]:
        """Finished tensors. After a reboot only those before the last sync: the rest may not have reached the disk."""
        try:
            lines = (self.partial / JOURNAL).read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return set()
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
            elif not isinstance(entry, dict):
                break
            elif "boot" in entry:
                boot = entry["boot"]
            else:
                synced = set(done)
        return (done if boot == _boot() else synced) & set(self._where)

    def _sync(self) -> None:
        for fd in self._files.values():
            os.fdatasync(fd)
        assert self._journal is not None
        self._journal.write(json.dumps({"synced": True}) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._synced = time.monotonic()

    def _discard(self) -> None:
        if not self.done:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _close(self) -> None:
        if self._follower is not None:
            self._follower.stop()
            self._follower = None
        for fd in self._files.values():
            os.close(fd)
        self._files = {}
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        if self._guard >= 0:
            os.close(self._guard)
            self._guard = -1

    def _explain(self, error: OSError) -> MachineError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return MachineError(
                f"{self.out}: the disk became full; free some space and run the same command: it goes on where it was "
                f"(unfinished work is in {self.partial})"
            )
        return MachineError(f"{self.out}: cannot be written: {error.strerror or error}")


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def _allocate(fd: int, size: int) -> None:
    """Reserve the blocks now, so that a full disk is found at once; where that cannot be done, only set the size."""
    try:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
    os.truncate(fd, size)


def _fsync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders atomically (Linux renameat2); elsewhere in two renames."""
    at_cwd, exchange = -100, 2
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None and rename(at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), exchange) == 0:
        return
    aside = old.with_name(f".{old.name}.replaced-{os.getpid()}")
    os.rename(old, aside)
    os.rename(new, old)
    os.rename(aside, new)


def small_file(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file of tensors in memory. The same tensors give the same bytes."""
    specs = [TensorSpec(name, tuple(value.shape), from_torch(value.dtype)) for name, value in tensors.items()]
    file = shard("", specs, {"format": "pt", **(metadata or {})})
    content = bytearray(file.size)
    content[: len(file.header)] = file.header
    for spec in specs:
        start = file.offsets[spec.name]
        flat = tensors[spec.name].detach().cpu().contiguous().reshape(-1)
        content[start : start + spec.nbytes] = flat.view(torch.uint8).numpy().tobytes()
    return bytes(content)
