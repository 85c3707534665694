"""One reading of a tensor that is cut by magnitude: the same bytes as by two, whatever fits and whatever fails."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import compiled
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import plait
from plait.kernels import native, once, selection
from plait.kernels.fused import Raw, Stored
from plait.kernels.worker import Worker
from plait.methods.block import Block
from plait.methods.contract import get_method
from plait.methods.stream import GRAIN, Piece
from plait.writer import FolderWriter

loops = compiled.loops
SIZE = 2 * GRAIN + 12_345
KINDS = {torch.float32: 0, torch.bfloat16: 1}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("ties", {"density": 0.2}),
    ("ties", {"density": 0.7, "normalize": False, "lambda_": 0.3, "weight": 0.4}),
    ("breadcrumbs", {"density": 0.6, "gamma": 0.05}),
    ("breadcrumbs_ties", {"density": 0.3, "gamma": 0.01}),
]


class Memory:
    """A tensor's output, and what was asked of it."""

    def __init__(self, size: int, width: int) -> None:
        self.data, self.width = np.full(size * width, 0xAA, dtype=np.uint8), width
        self.asked: Counter[str] = Counter()

    def begin(self, piece: Piece) -> None:
        self.asked["begin"] += 1

    def _part(self, piece: Piece) -> np.ndarray:
        return self.data[piece.start * self.width : piece.stop * self.width]

    def write(self, piece: Piece, data: memoryview) -> None:
        self.asked["write"] += 1
        self._part(piece)[:] = data

    def read(self, piece: Piece, data: memoryview) -> None:
        self.asked["read"] += 1
        data[:] = self._part(piece).data


def values(count: int, what: str, kind: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and experts. `steps`: magnitudes that many share; `zeros`: the first expert is the base."""
    noise = np.random.default_rng(seed)
    base = noise.normal(size=SIZE).astype(np.float32) * 0.02
    experts = []
    for k in range(count):
        moved = noise.normal(size=SIZE) * 0.002
        if what == "steps":  # every 64th magnitude is shared by some hundred entries, in all pieces
            moved = np.where(noise.random(SIZE) < 0.5, np.round(moved * 2**15) / 2**15, moved)
        if what == "zeros" and k == 0:
            moved[:] = 0
        experts.append(torch.from_numpy((base + moved).astype(np.float32)).to(kind))
    return torch.from_numpy(base).to(kind), experts


def merged(
    loops: native.Loops, method: str, keywords: dict[str, Any], base: torch.Tensor, experts: list[torch.Tensor],
    out: torch.dtype, spare: int,
) -> tuple[np.ndarray, np.ndarray, Counter[str]]:  # fmt: skip
    """The bytes by the loops, those by torch, and what was asked of the output."""

    def over(tensor: torch.Tensor) -> Stored:
        data, width = tensor.view(torch.uint8).numpy(), tensor.element_size()

        def read(start: int, buffer: memoryview) -> None:
            buffer[:] = data[width * start : width * start + len(buffer)].data

        return Stored(KINDS[tensor.dtype], width, read)

    def block() -> Block:
        return Block.of(experts, base)

    fast, slow = block(), block()
    fast.raw = Raw(Worker(loops, spare), [over(expert) for expert in experts], over(base), KINDS[out])
    output = Memory(SIZE, torch.empty(0, dtype=out).element_size())
    fused = get_method(method).fn(fast, **keywords).fused
    assert fused is not None
    once.merge(fused, output)
    want = get_method(method).fn(slow, **keywords).gather().to(out)
    return output.data, want.view(torch.uint8).numpy(), output.asked


@pytest.mark.parametrize("kind", list(KINDS), ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("method", "keywords"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_the_same_bytes_by_one_reading(
    method: str, keywords: dict[str, Any], count: int, kind: torch.dtype, loops: native.Loops
) -> None:
    base, experts = values(count, "steps" if count == 2 else "normal", kind)
    got, want, asked = merged(loops, method, keywords, base, experts, torch.bfloat16, 1 << 26)
    assert np.array_equal(got, want)
    # At K = 5 two cuts leave too much open in so small a sample; all else is read once, and kept until it is whole.
    assert asked["begin"] == 3 or count == 5
    assert asked["write"] == 3
    assert not asked["read"]


@pytest.mark.parametrize(("spare", "back"), [(1 << 26, 0), (2_300_000, 2), (1_200_000, 3), (1 << 16, 0)])
def test_whatever_memory_there_is(spare: int, back: int, loops: native.Loops) -> None:
    base, experts = values(3, "normal", torch.bfloat16)
    got, want, asked = merged(loops, "ties", {"density": 0.2}, base, experts, torch.bfloat16, spare)
    assert np.array_equal(got, want)
    assert asked["read"] == back
    assert asked["write"] == 3 + back
    assert asked["begin"] == 3


@pytest.mark.parametrize("what", ["normal", "steps", "zeros"])
@pytest.mark.parametrize("types", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_files_of_two_types(what: str, types: tuple[torch.dtype, torch.dtype], loops: native.Loops) -> None:
    base, experts = values(3, what, types[0])
    mixed = [experts[0], experts[1].to(types[1]), experts[2]]
    for out in KINDS:
        got, want, _ = merged(
            loops,
            "ties",
            {"density": [0.2, 0.0, 1.0] if what == "steps" else [0.2, 0.5, 0.4]},
            base,
            mixed,
            out,
            1 << 26,
        )
        assert np.array_equal(got, want)


@pytest.mark.parametrize("fault", ["low", "high", "narrow"])
def test_bounds_that_miss_the_cut(fault: str, loops: native.Loops, monkeypatch: pytest.MonkeyPatch) -> None:
    between, calls = selection.between, Counter[str]()

    def wrong(row: np.ndarray, share: float, sure: float) -> tuple[int, int]:
        low, high = between(row, share, sure)
        calls["asked"] += 1
        if calls["asked"] != 2:  # of the second expert, and not when it is looked for again
            return low, high
        return {"low": (0, low // 2), "high": (2 * high, 3 * high), "narrow": (low, low)}[fault]

    monkeypatch.setattr(selection, "between", wrong)
    base, experts = values(3, "normal", torch.float32)
    got, want, asked = merged(loops, "ties", {"density": 0.2}, base, experts, torch.bfloat16, 1 << 26)
    assert np.array_equal(got, want)
    assert calls["asked"] == 6  # three of the guess, three of the two readings
    assert asked["begin"] in (3, 6)


def test_more_is_put_aside_than_the_sample_made_expect(loops: native.Loops) -> None:
    base, experts = values(2, "normal", torch.float32)
    spans = 16
    starts = [i * (SIZE - 4096) // (spans - 1) for i in range(spans)]
    unseen = np.ones(SIZE, dtype=bool)
    for start in starts:
        unseen[start : start + 4096] = False
    for expert in experts:  # what no sample sees has one magnitude, which the cut may be near to
        sign = torch.sign(expert - base)[unseen]
        expert[unseen] = base[unseen] + sign * 0.00257
    got, want, asked = merged(loops, "ties", {"density": 0.2}, base, experts, torch.float32, 1 << 26)
    assert np.array_equal(got, want)
    assert asked["begin"] > 3


@pytest.mark.parametrize("seed", range(4))
def test_a_quota_among_equals_goes_by_position(seed: int, loops: native.Loops) -> None:
    """Equal magnitudes at the cut, spread over all pieces: the first in order of position stay."""
    base, experts = torch.zeros(SIZE), []
    noise = np.random.default_rng(seed)
    for _ in range(2):
        moved = noise.normal(size=SIZE).astype(np.float32)
        cut = np.quantile(np.abs(moved), 0.8)
        near = (np.abs(np.abs(moved) - cut) < 0.003 * cut) | (noise.random(SIZE) < 0.002)
        moved[near] = np.sign(moved[near]) * np.float32(cut)
        experts.append(torch.from_numpy(moved))
    got, want, asked = merged(loops, "ties", {"density": 0.2}, base, experts, torch.float32, 1 << 26)
    assert np.array_equal(got, want)
    assert asked["begin"] == 3


def test_a_model_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written at once and read back from the file, held, or read twice: by the engine, to the same bytes."""
    base, experts = values(3, "normal", torch.bfloat16)
    for name, tensor in zip(("base", "a", "b", "c"), [base, *experts], strict=True):
        (tmp_path / name).mkdir()
        save_file({"w": tensor, "v": tensor[: GRAIN + 5].clone()}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    asked = {
        "merge_method": "ties", "base_model": str(tmp_path / "base"), "parameters": {"density": 0.2},
        "models": [{"model": str(tmp_path / name)} for name in "abc"],
    }  # fmt: skip
    back: Counter[str] = Counter()
    read = FolderWriter.read

    def counted(self: FolderWriter, *arguments: Any) -> None:
        back[out.name] += 1
        read(self, *arguments)

    monkeypatch.setattr(FolderWriter, "read", counted)
    digests = set()
    for memory, threads in (("512MB", 2), ("20MB", 2), ("20MB", 8), ("20MB", 40)):
        out = tmp_path / f"{memory}-{threads}"
        plait.merge(asked, out, memory=memory, threads=threads)
        digests.add(hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
    assert set(back) == {"20MB-8"}  # with more threads each has too little to put anything aside
    monkeypatch.setenv(native.OFF, "0")
    plait.merge(asked, tmp_path / "slow", threads=1)
    digests.add(hashlib.sha256((tmp_path / "slow" / "model.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1
