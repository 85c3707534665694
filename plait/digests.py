"""Digests of data and of model folders: what is equal by content is the same, wherever it lies."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_CHUNK = 1 << 22
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def digest(data: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def sealed(record: Mapping[str, Any]) -> bytes:
    """A record as a JSON file that holds its own digest under `seal`: damage to it is seen too."""
    return _text({**record, "seal": _seal(record)})


def is_sealed(record: Mapping[str, Any]) -> bool:
    """Whether a record that was read is the one that was written."""
    return record.get("seal") == _seal({key: value for key, value in record.items() if key != "seal"})


def _seal(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(record)).hexdigest()


def _text(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


MARK = 16
"""Digits of a mark."""


def marked_digest(descriptor: int, ends: Sequence[int]) -> tuple[str, list[str]]:
    """SHA-256 of an open file, and the first 16 digits of the SHA-256 of its beginning up to each of `ends`.

    `ends` ascend. They are positions in the running sum, so they cost nothing; the first that differs later says
    which part of the file has changed. Raises OSError.
    """
    total, marks, at = hashlib.sha256(), [], 0
    while part := os.pread(descriptor, _CHUNK, at):
        view, begin = memoryview(part), at
        while len(marks) < len(ends) and ends[len(marks)] <= begin + len(part):
            total.update(view[at - begin : ends[len(marks)] - begin])
            at = max(at, ends[len(marks)])
            marks.append(total.copy().hexdigest()[:MARK])
        total.update(view[at - begin :])
        at = begin + len(part)
    return total.hexdigest(), marks


def folder_digest(folder: Path) -> str:
    """SHA-256 over the weights, heads, configs and tokenizer of a model's folder; notes and provenance do not count."""
    files = [path for path in _files(folder) if path.suffix in (*_WEIGHTS, ".json", ".txt", ".model")]
    stats = [path.stat() for path in files if path.name != "plait.json"]
    return _content(folder, tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats))


def weight_bytes(folder: Path) -> int:
    """Size of a folder's weight files, heads among them."""
    return sum(path.stat().st_size for path in _files(folder) if path.suffix in _WEIGHTS)


@functools.lru_cache(maxsize=256)
def _content(folder: Path, state: tuple[Any, ...]) -> str:
    """The content itself; `state` only says when to read it again."""
    total = hashlib.sha256()
    for path in _files(folder):
        if path.suffix in (*_WEIGHTS, ".json", ".txt", ".model") and path.name != "plait.json":
            total.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    total.update(chunk)
    return total.hexdigest()


def _files(folder: Path) -> list[Path]:
    """A model's own files: not what else lies below it, such as a trainer's checkpoints."""
    found = [*folder.glob("*"), *folder.glob("heads/*")]
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))
