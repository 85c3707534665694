"""Digests of data and of model folders: what is equal by content is the same, wherever it lies."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

_CHUNK = 1 << 22
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def digest(data: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


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
