"""Careful reading of files that strangers wrote: regular files only, bounded JSON, no duplicate keys.

Everything here turns a fault of a file into a `CheckpointError` that names the file and says what to do.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from plait.errors import CheckpointError, PlaitError, nearest
from plait.sources.base import TensorSpec

_Item = TypeVar("_Item")

CONFIG_LIMIT = 16 << 20
INDEX_LIMIT = 100 << 20
_LINE_LIMIT, _DEPTH_LIMIT = 256 << 20, 100
HEAD_FILE = "head.safetensors"
"""A task head kept beside a model: not a part of the model's own weights."""

_ADVICE_STEP = 128 << 10
"""The read-ahead of a Linux disk where nobody has set another."""
_SAMPLES, _SAMPLE_BYTES, _MIDDLES = 64, 4096, 1024


def open_regular(path: Path) -> int:
    """A read-only descriptor. Pipes and devices are refused, because reading one may block for ever."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        what = "is a link to a file that is gone" if path.is_symlink() else "does not exist"
        raise CheckpointError(f"{path}: {what}. Download or copy the checkpoint again.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be opened ({error}). Check the path and its permissions.") from None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise CheckpointError(f"{path}: is not a regular file. Give the checkpoint's folder or a weight file.")


def fill(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Read exactly `len(buffer)` bytes at `offset`. Positioned reads share no state, so threads may call this."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
            raise CheckpointError(f"{path}: {reason}. Check the disk, then download it again.") from None
        if count == 0:
            missing = len(buffer) - done
            raise CheckpointError(f"{path}: became {missing} bytes too short while it was read. Download it again.")
        done += count


def cached(descriptor: int, offset: int) -> bool:
    """Whether the byte at `offset` can be had without waiting for the disk."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except (OSError, AttributeError):  # not there, or a system or file system that cannot say
        return False


def bring(descriptor: int, start: int, stop: int) -> None:
    """Begin to read [start, stop) into the page cache. In steps: a call brings no more than the disk's own share."""
    with contextlib.suppress(OSError):  # a file system that takes no advice
        for offset in range(start, stop, _ADVICE_STEP):
            os.posix_fadvise(descriptor, offset, min(_ADVICE_STEP, stop - offset), os.POSIX_FADV_WILLNEED)


def read_bytes(descriptor: int, offset: int, length: int, path: Path) -> bytes:
    """`length` bytes at `offset`."""
    buffer = bytearray(length)
    fill(descriptor, memoryview(buffer), offset, path)
    return bytes(buffer)


def parse_object(data: bytes, path: Path, what: str) -> dict[str, Any]:
    """JSON that must be an object. Repeated keys are refused: two readers would see two different files."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in pairs:
            if name in table:
                raise CheckpointError(f"{path}: {what} holds the key {name!r} twice. Download or save the file again.")
            table[name] = value
        return table

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {what} is not valid JSON ({error}). Download the file again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {what} is not a JSON object. Download the file again.")
    return value


def read_object(path: Path, what: str, limit: int = CONFIG_LIMIT) -> tuple[dict[str, Any], bytes]:
    """A small JSON file as data, with the bytes it was read from."""
    data = read_whole(path, limit, what)
    return parse_object(data, path, what), data


def read_whole(path: Path, limit: int, what: str = "the file") -> bytes:
    """A small regular file."""
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise CheckpointError(f"{path}: {what} has {size} bytes; the limit is {limit}. This is not a real one.")
        return read_bytes(descriptor, 0, size, path)
    finally:
        os.close(descriptor)


def check_depth(path: Path) -> None:
    """Refuse JSON, or JSON lines, that nests deeper than data does: Arrow's parser would end the process."""
    with os.fdopen(open_regular(path), "rb") as file:
        for number in itertools.count(1):
            line = file.readline(_LINE_LIMIT + 1)
            if not line:
                return
            where = f"{path}: line {number}"
            if len(line) > _LINE_LIMIT:
                raise CheckpointError(f"{where} has more than {_LINE_LIMIT >> 20} MB. Write one record a line.")
            if line.count(b"[") + line.count(b"{") > _DEPTH_LIMIT and _depth(line) > _DEPTH_LIMIT:
                raise CheckpointError(f"{where} nests more than {_DEPTH_LIMIT} levels. This is no table of data.")


def _depth(text: bytes) -> int:
    depth = deepest = 0
    for mark in re.findall(rb"[\[\]{}]", re.sub(rb'"(?:\\.|[^"\\])*"', b"", text)):
        depth += 1 if mark in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder as data; empty where there is none."""
    path = folder / "config.json"
    return read_object(path, "the model configuration")[0] if path.exists() else {}


def read_index(path: Path) -> tuple[dict[str, list[str]], bytes]:
    """A shard index as file name → tensors, in file-name order. Names that leave the folder are refused."""
    index, data = read_object(path, "the shard index", INDEX_LIMIT)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no 'weight_map' object naming the shards. Download the index again.")
    shards: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not plain_name(file):
            raise CheckpointError(
                f"{path}: tensor {tensor!r} is said to be in {file!r}, which is not a plain file name in this folder. "
                "Do not trust this checkpoint; download it again from its author."
            )
        shards.setdefault(file, []).append(tensor)
    return dict(sorted(shards.items())), data


def check_inside(path: Path) -> None:
    """Refuse a shard that is a link out of its folder; a hub snapshot links to its own cache, which is meant.

    Whoever made the index chose the names: such a link would put files of this machine into the merged model.
    """
    folder = path.parent.resolve()
    roots = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in roots):
        raise CheckpointError(
            f"{path}: is a link that leaves its folder, to {path.resolve()}. Copy the file into the folder if it "
            "belongs to this checkpoint."
        )


def plain_name(name: str) -> bool:
    """True for a name that stays in its folder: no separators, no `..`, no drive, nothing unprintable."""
    return name not in ("", ".", "..") and name.isprintable() and not any(mark in name for mark in "/\\:")


def check_name(name: str, path: Path) -> None:
    """Tensor names reach terminals and file names, so control characters are refused."""
    if not name or len(name) > 1000 or not name.isprintable():
        raise CheckpointError(f"{path}: {name[:80]!r} is not a usable tensor name. Save the checkpoint again.")


def check_span(spec: TensorSpec, start: int, stop: int) -> None:
    """A span outside of its tensor is a fault of the caller, not of the file."""
    if not 0 <= start <= stop <= spec.numel:
        raise PlaitError(f"span [{start}, {stop}) is outside of '{spec.name}' with {spec.numel} elements")


def no_such_tensor(name: str, label: str, known: Iterable[str]) -> CheckpointError:
    """For a read by a name that is not stored."""
    return CheckpointError(f"{label}: has no tensor '{name}'{nearest(name, known)}")


def stamp(paths: Iterable[Path]) -> str:
    """Name, size, time and inode of each file, hashed: another value once a file is replaced, touched or gone."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            reason = f"is no longer there ({error.strerror})"
            raise CheckpointError(f"{path}: {reason}. Put it back and run again.") from None
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}\n".encode())
    return digest.hexdigest()


def sample(digest: Any, path: Path, begin: int, end: int, middles: Iterable[int] = ()) -> None:
    """Feed `digest` with samples of a file's bytes [begin, end): evenly spaced, and one at each of `middles`.

    The middles of the tensors are there because a fine-tune of the head or the norms alone changes so few bytes that
    even spacing would miss them. They are thinned where a checkpoint has very many tensors.
    """
    marks = thinned(list(middles)) + [begin + (end - begin) * turn // _SAMPLES for turn in range(_SAMPLES)]
    descriptor = open_regular(path)
    try:
        for offset in sorted(set(marks)):
            length = min(_SAMPLE_BYTES, end - offset)
            digest.update(offset.to_bytes(8, "little") + read_bytes(descriptor, offset, length, path))
    finally:
        os.close(descriptor)


def thinned(items: list[_Item]) -> list[_Item]:
    """At most about a thousand of the items, evenly chosen."""
    return items[:: len(items) // _MIDDLES + 1]


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def check_unique(names: Mapping[str, Path], name: str, path: Path) -> None:
    """A tensor in two shards has two values, and readers would disagree about which one is meant."""
    if name in names:
        raise CheckpointError(
            f"{path}: tensor '{name}' is also in {names[name].name}. Keep one of them (save the model again)."
        )
