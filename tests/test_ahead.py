"""Reading ahead: in the order of the jobs, no further than its depth, and of no consequence for what is written."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import plait
from plait import ahead
from plait.ahead import ReadAhead
from plait.errors import CheckpointError
from plait.sources import files
from plait.sources.safetensors import SafetensorsSource

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice on files")


@dataclass
class Place:
    """A checkpoint of eight tensors of 100 bytes."""

    source: SafetensorsSource
    asked: list[tuple[str, int]]

    def plans(self) -> list[Any]:
        item = [SimpleNamespace(source=self.source, stored=name, update=None) for name in self.source.specs]
        return [SimpleNamespace(inputs=[one], base=one, bytes_in=200) for one in item]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    save_file({f"t{n}": np.zeros(25, np.float32) for n in range(8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(SafetensorsSource, "soon", lambda _, name, limit: asked.append((name, limit)))
    return Place(SafetensorsSource(tmp_path, "here"), asked)


def reached(asked: list[Any], count: int) -> int:
    """How much has been asked for: awaited up to `count`, and then for a while whether there is more."""
    until = time.monotonic() + 20
    while len(asked) < count and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(0.1)
    return len(asked)


def test_it_stays_its_depth_ahead_of_the_jobs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "DEPTH", 400)
    with ReadAhead(place.plans()) as reader:
        assert reached(place.asked, 6) == 6  # two tensors fit between the jobs and the third
        reader.begun()
        assert reached(place.asked, 8) == 8
        with reader._change:  # all at once: the jobs are past t4 when the thread comes to it
            reader._begun += 4
            reader._change.notify()
        assert reached(place.asked, 14) == 14
    names = [name for name, _ in place.asked]
    assert names == sorted(names)
    assert set(names) == {"t0", "t1", "t2", "t3", "t5", "t6", "t7"}
    assert {limit for _, limit in place.asked} == {200}


def test_it_ends_with_the_jobs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "DEPTH", 200)
    with pytest.raises(KeyError), ReadAhead(place.plans()):
        raise KeyError
    assert "plait-ahead" not in {thread.name for thread in threading.enumerate()}
    assert len(place.asked) <= 4


@pytest.mark.parametrize(("there", "steps"), [(True, 0), (False, 3)])
def test_what_is_in_memory_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, steps: int
) -> None:
    save_file({"a": np.zeros(100_000, np.float32)}, tmp_path / "model.safetensors")
    source, spans = SafetensorsSource(tmp_path / "model.safetensors", "here"), []
    monkeypatch.setattr(files, "cached", lambda *_: there)
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, advice: spans.append((start, size)))
    source.soon("a", 300_000)
    assert len(spans) == steps
    assert sum(size for _, size in spans) == (0 if there else 300_000)
    source.close()
    source.soon("a", 300_000)
    assert len(spans) == steps


def test_a_file_that_was_just_read_is_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10_000))
    with open(path, "rb") as file:
        file.read()
        assert files.cached(file.fileno(), 0)
        assert not files.cached(file.fileno(), 20_000)


@pytest.mark.parametrize("fault", ["advice", "look"])
def test_a_system_that_will_not_is_no_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_file({"a": np.ones((30, 40), np.float32)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    real = os.preadv

    def refuse(*given: Any) -> int:
        if fault == "look" and len(given) == 3:
            return real(*given)
        raise OSError(95, "Operation not supported")

    recipe = {"merge_method": "average", "models": [{"model": str(tmp_path / name)} for name in ("one", "two")]}
    monkeypatch.setattr(files, "cached", lambda *_: False) if fault == "advice" else None
    monkeypatch.setattr(os, "posix_fadvise" if fault == "advice" else "preadv", refuse)
    try:
        plait.merge(recipe, tmp_path / "out")
    except CheckpointError as error:
        pytest.fail(str(error))
    assert (tmp_path / "out" / "model.safetensors").is_file()
