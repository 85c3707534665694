"""What makes files appear whole or not at all: locks on folders, durable writes, names given in one step."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Set
from pathlib import Path

REPLACED = "replaced-by-plait"
"""Ending of the hidden name that a replaced folder has between two renames."""

_AT_CWD, _EXCHANGE = -100, 2


def lock_folder(path: Path) -> int | None:
    """Make a folder and lock it: a descriptor that holds the lock until it is closed; None where another holds it.

    A process that ends, however it ends, lets go of its locks. Raises OSError.
    """
    while True:
        path.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # it got its final name just now
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        if is_at(descriptor, path):
            return descriptor
        os.close(descriptor)  # renamed or removed before the lock was ours


def is_locked(path: Path) -> bool:
    """Whether a living process holds a folder locked."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open folder is still the one of that name."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def beside(path: Path, kind: str) -> list[Path]:
    """The hidden work folders `.NAME.KIND-…` of what is to be called `path`."""
    start = f".{path.name}.{kind}-"
    return sorted(found for found in path.parent.iterdir() if found.name.startswith(start))


def empty(folder: Path, keep: Set[str] = frozenset()) -> None:
    """Remove everything in a folder but the names to keep. Links are removed, not followed."""
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and have it on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, content: bytes) -> None:
    """Give an existing file new content: at any moment it has the old or the new."""
    scratch = path.with_name(f"{path.name}.new")
    write_durably(scratch, content)
    os.replace(scratch, path)


def sync_folder(path: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def boot() -> str:
    """What tells this start of the machine from others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def reserve(fd: int, size: int) -> None:
    """Reserve the blocks now, so that a full disk is found at once; where that cannot be done, only set the size."""
    try:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
    os.truncate(fd, size)


def put_in_place(new: Path, final: Path, *, replace: bool) -> bool:
    """Give folder `new` its final name in one step. True: another folder had the name and is now called `new`.

    Raises FileExistsError where the name is taken and is not to be replaced, else OSError.
    """
    if replace and final.exists():
        _exchange(new, final)
        exchanged = True
    else:
        try:
            os.rename(new, final)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final)) from None
            raise
        exchanged = False
    sync_folder(final.parent)
    return exchanged


def set_aside(final: Path) -> Path | None:
    """Where an interrupted exchange left the folder that had the name, if it did."""
    found = final.with_name(f".{final.name}.{REPLACED}")
    return found if found.is_dir() else None


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders atomically (Linux renameat2); where the file system cannot, in renames that can be undone."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None and rename(_AT_CWD, os.fsencode(new), _AT_CWD, os.fsencode(old), _EXCHANGE) == 0:
        return
    aside = old.with_name(f".{old.name}.{REPLACED}")
    os.rename(old, aside)
    os.rename(new, old)
    os.rename(aside, new)


def start_writing(descriptor: int, offset: int, size: int) -> None:
    """Ask the system to begin writing a range to the disk, and do not wait (Linux; elsewhere nothing happens)."""
    write = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if write is not None:
        begin = 2  # SYNC_FILE_RANGE_WRITE
        write(descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), begin)
