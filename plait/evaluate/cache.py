"""Evaluations by what went in: an unchanged model on unchanged data by an unchanged protocol is not measured twice."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

from plait.errors import CheckpointError
from plait.evaluate.results import Evaluation, dump, load
from plait.suites.places import cache_folder


def find(key: str) -> Evaluation | None:
    """What was stored under a key."""
    path = _path(key)
    if not path.is_file():
        return None
    try:
        found = load(path)
    except CheckpointError:  # half written by another version: measured again
        return None
    return found if isinstance(found, Evaluation) else None


def store(key: str, found: Evaluation) -> None:
    """File an evaluation; whole or not at all."""
    path = _path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    scratch.write_text(dump(found), encoding="utf-8")
    os.replace(scratch, path)


def _path(key: str) -> Path:
    return cache_folder() / "evaluations" / version("plait") / f"{key}.json"
