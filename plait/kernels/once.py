"""A tensor that is cut by magnitude, merged by one reading of its inputs.

A sample bounds every cut. While the magnitudes are counted, everything is merged as if nothing lay between the bounds:
that is final for all entries but the few of which an expert does. Those are put aside as they are stored, a small
tensor of its own. The cuts are found in it, it is merged by them, and its entries go to their places in the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from plait.kernels import job as J
from plait.kernels import selection
from plait.kernels.fused import Fused, Stored
from plait.kernels.worker import Aside
from plait.lazy import np
from plait.methods.stream import GRAIN, Grid, Piece

_SURE = 5.0
"""Standard errors of the sample's ranks between the bounds."""
_MOST = 0.25
"""Share of the entries up to which putting aside is quicker than reading twice."""


@dataclass
class Wanted(Sequence[Sequence[Any]]):
    """The cuts that keep so many magnitudes, in the form of `Fused.cuts`: looked for when they are first asked for."""

    counts: Sequence[Sequence[int]]
    find: Callable[[], list[list[Any]]]
    make: Any
    trivial: Any
    found: list[list[Any]] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: Any) -> Any:
        if self.found is None:
            self.found = self.find()
        return self.found[index]


class Output(Protocol):
    """Where a tensor's pieces go."""

    def begin(self, piece: Piece) -> None:
        """A piece is about to be read; may raise, to stop."""
        ...

    def write(self, piece: Piece, data: memoryview) -> None:
        """Its bytes, as far as they are known; those written last count."""
        ...

    def read(self, piece: Piece, data: memoryview) -> None:
        """Fill `data` with what was written."""
        ...


def merge(fused: Fused, output: Output) -> None:
    """Merge a tensor into `output`: by one reading where that is possible, else when the cuts are known."""
    if not _by_one_reading(fused, output):
        assert fused.block.raw is not None
        for piece in fused.block.grid:
            output.begin(piece)
            output.write(piece, fused.block.raw.worker.merge(fused, piece))


def _by_one_reading(fused: Fused, output: Output) -> bool:
    """Whether it went; if not, what was written is no good, and all is to be written anew."""
    wanted, grid, raw = fused.cuts, fused.block.grid, fused.block.raw
    if not isinstance(wanted, Wanted) or wanted.found is not None or fused.factors or grid.numel <= selection.SMALL:
        return False
    assert raw is not None
    if selection.low_rank(fused):  # bounds that hold would put too much aside
        return False
    sizes = selection.sample(Fused(fused.block, fused.source), min(max(16, grid.numel >> 19), 64))
    windows = [
        [_window(row, count, grid.numel) for count in counts] for row, counts in zip(sizes, wanted.counts, strict=True)
    ]
    rooms = _rooms(fused, sizes, windows)
    if rooms is None:
        return False
    (aside, held), uncut = rooms, replace(fused, cuts=())
    width, spare = J.WIDTHS[raw.out], raw.worker.buffer("out", min(grid.unit, grid.numel) * J.WIDTHS[raw.out])
    above, ends = np.zeros((len(windows), len(windows[0])), dtype=np.int64), [0]
    for piece in grid:
        output.begin(piece)
        kept = piece.stop * width <= len(held)
        data = held[piece.start * width : piece.stop * width] if kept else spare[: piece.numel * width]
        above += raw.worker.guess(uncut, piece, windows, aside, data)
        if aside.count > len(aside.places):
            return False
        if not kept:
            output.write(piece, data.data)
        ends.append(aside.count)
    late = _late(fused, wanted, windows, above, aside)
    if late is None:
        return False
    for piece, begin, end in zip(grid, ends, ends[1:], strict=False):
        kept = piece.stop * width <= len(held)
        data = held[piece.start * width : piece.stop * width] if kept else spare[: piece.numel * width]
        if not kept:
            output.read(piece, data.data)
        raw.worker.patch(raw.out, aside.places[begin:end], late[begin * width : end * width], data)
        output.write(piece, data.data)
    return True


def _window(row: np.ndarray, count: int, numel: int) -> tuple[int, int]:
    """Bounds of the cut that keeps `count`: all that is above them is kept, all that is below is not."""
    if not 0 < count < numel:
        return (J.TOP, J.TOP) if count <= 0 else (-1, -1)
    return selection.between(row, count / numel, _SURE)


def _rooms(
    fused: Fused, sizes: np.ndarray, windows: Sequence[Sequence[tuple[int, int]]]
) -> tuple[Aside, np.ndarray] | None:
    """Where entries are put aside, as many as the sample makes expect, and where pieces of the output wait for them.

    All of it is cut from one buffer, so that it stays within the memory spared; None where that is too little.
    """
    raw, numel = fused.block.raw, fused.block.grid.numel
    assert raw is not None
    inside = np.zeros(sizes.shape, dtype=bool)
    for row, marked, bounds in zip(sizes, inside, windows, strict=True):
        for low, high in bounds:
            marked |= (row >= low) & (row <= high)
    each = inside.any(axis=0)
    share = float(each.mean())
    stored = [*raw.models, *([] if raw.base is None else [raw.base])]
    widths = [4, *(model.width for model in stored), J.WIDTHS[raw.out]]
    candidates = 4 * float(inside.sum()) / max(float(each.sum()), 1.0)  # `pick` looks through those of each expert
    room = min(int(1.3 * share * numel) + GRAIN // 8, int(raw.worker.spare / (sum(widths) + candidates))) // 16 * 16
    if share > _MOST or room < 1.1 * share * numel:
        return None
    buffer, at, parts = raw.worker.buffer("aside", raw.worker.spare), 0, []
    for width in widths:
        parts.append(buffer[at : at + width * room])
        at += width * room
    places, *entries, late = parts
    models, base = entries[: len(raw.models)], entries[len(raw.models) :]
    left = max(len(buffer) - at - int(candidates * room), 0)
    held = buffer[at : at + min(left, numel * J.WIDTHS[raw.out])]
    return Aside(places.view(np.uint32), models, base[0] if base else None, late), held


def _late(
    fused: Fused, wanted: Wanted, windows: Sequence[Sequence[tuple[int, int]]], above: np.ndarray, aside: Aside
) -> np.ndarray | None:
    """The output of what was put aside, by the cuts; None where the bounds missed one."""
    raw, count = fused.block.raw, aside.count
    assert raw is not None
    if not count:
        return aside.late[:0]

    def over(stored: Stored, data: np.ndarray) -> Stored:
        def read(start: int, buffer: memoryview) -> None:
            buffer[:] = data[start * stored.width : start * stored.width + len(buffer)].data

        return replace(stored, read=read)

    models = [over(*both) for both in zip(raw.models, aside.models, strict=True)]
    base = over(raw.base, aside.base) if raw.base is not None and aside.base is not None else None
    block = replace(fused.block, grid=Grid(count, GRAIN), raw=replace(raw, models=models, base=base))
    cuts: list[list[Any]] = [[] for _ in windows]
    for c in range(len(windows[0])):
        bounds = [row[c] if row[c][0] >= 0 else (J.TOP, J.TOP) for row in windows]
        tallies = selection.tally(Fused(block, fused.source), bounds, [count] * len(windows))
        assert tallies is not None  # there is room for all
        for k, found in enumerate(tallies):
            whole = replace(found, above=int(above[k][c]))
            cut = selection.settle(fused, whole, wanted.counts[k][c], wanted.make, wanted.trivial)
            if cut is None:
                return None
            cuts[k].append(cut)
    decided, width = replace(fused, block=block, cuts=cuts), J.WIDTHS[raw.out]
    for piece in block.grid:
        aside.late[piece.start * width : piece.stop * width] = raw.worker.merge(decided, piece)
    return aside.late
