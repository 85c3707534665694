"""The k-th largest magnitude, exactly, in one pass: a sample says about where it is, a tally settles it.

The sample gives bounds that hold the wanted magnitude almost surely. One pass counts what lies above them and keeps
what lies between, a few per cent; the answer is among those, or the counts show that it is not, and the bounds are
widened. The cuts are those of `plait.methods.select`, whatever the sample was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from plait.kernels.fused import Fused
from plait.kernels.job import TOP
from plait.lazy import np
from plait.methods.stream import Piece

SMALL = 1 << 16
"""Entries up to which everything is kept between the bounds."""
_SPAN = 4096
_SAMPLE = 16
"""Runs of _SPAN entries that are looked at beforehand."""
_BINS = 1 << 20
"""Different magnitudes that are counted one by one; more are sorted."""
_TRIES = (5.0, 0.0, 40.0)
"""Standard errors of the sample's ranks between the bounds. With none it is one magnitude, which very many share."""
_SHORTER, _WIDER = 8, 4.0
"""For adapters, whose rows and columns differ in size as a whole: a sample of more and shorter runs, wider bounds."""


@dataclass
class Tally:
    """What one row of a tensor has above the bounds, and between them."""

    above: int
    zeros: int
    """Counted of variances alone."""
    bounds: tuple[int, int]
    inside: np.ndarray
    """Bits, in the order of positions; empty where the bounds are one. Good until the worker's next tally."""
    ends: list[int]
    """How many there are up to the end of each piece."""


def largest(fused: Fused, counts: Sequence[Sequence[int]], make: Any, trivial: Any) -> list[list[Any]] | None:
    """The cuts of `select.largest` (made by `make` and `trivial`), or None where no try found them."""
    sizes = _looked_at(fused)
    result: list[list[Any]] = [[] for _ in range(fused.rows)]
    for wanted in zip(*counts, strict=True):
        cuts = _cuts(fused, sizes, wanted, lambda row, wanted=wanted: wanted[row[0]], make, trivial)
        if cuts is None:
            return None
        for row, cut in zip(result, cuts, strict=True):
            row.append(cut)
    return result


def largest_share(fused: Fused, share: float, make: Any, trivial: Any) -> Any:
    """The cut that keeps this share of what is not zero in a single row, or None where no try found it."""
    numel, sizes = fused.block.grid.numel, _looked_at(fused)
    about = numel if sizes is None else numel * float(np.count_nonzero(sizes)) / sizes.size
    guess = min(max(int(about * share), 1), max(numel - 1, 1))
    cuts = _cuts(fused, sizes, [guess], lambda row: int((numel - row[1].zeros) * share), make, trivial)
    return None if cuts is None else cuts[0]


def _looked_at(fused: Fused) -> np.ndarray | None:
    return None if fused.block.grid.numel <= SMALL else sample(fused, _SAMPLE)


def _cuts(
    fused: Fused, sizes: np.ndarray | None, guesses: Sequence[int], wanted: Callable[[tuple[int, Tally]], int],
    make: Any, trivial: Any,
) -> list[Any] | None:  # fmt: skip
    """A cut for every row. `guesses`: about how many are wanted; `wanted`: exactly, of (row, what was found)."""
    numel, rows = fused.block.grid.numel, fused.rows
    for sure in (_WIDER * errors for errors in _TRIES) if low_rank(fused) else _TRIES:
        bounds = [
            (TOP, TOP) if not 0 < count < numel  # nothing to look for
            else (0, TOP - 1) if sizes is None else between(sizes[k], count / numel, sure)
            for k, count in enumerate(guesses)
        ]  # fmt: skip
        tallies = tally(fused, bounds, [_room(fused, sizes is None, sure)] * rows)
        if tallies is None:
            continue
        cuts = [settle(fused, found, wanted((k, found)), make, trivial) for k, found in enumerate(tallies)]
        if None not in cuts:
            return cuts
    return None


def _room(fused: Fused, everything: bool, sure: float) -> int:
    """Candidates of one row that fit."""
    share = 1.0 if everything else 0.03 * sure
    assert fused.block.raw is not None
    return min(int(share * fused.block.grid.numel), fused.block.raw.worker.spare // (4 * fused.rows)) + 16


def sample(fused: Fused, spans: int) -> np.ndarray:
    """[rows, n] bits of magnitudes of evenly spaced runs of the tensor; valid until the next sample."""
    assert fused.block.raw is not None
    worker, numel = fused.block.raw.worker, fused.block.grid.numel
    shorter = _SHORTER if low_rank(fused) else 1
    width, spans = min(_SPAN // shorter, numel), spans * shorter
    starts = [i * (numel - width) // max(spans - 1, 1) for i in range(spans)]
    return worker.magnitudes(fused, [Piece(0, start, start + width) for start in starts])


def low_rank(fused: Fused) -> bool:
    """Whether some task vector is an adapter's."""
    return any(model.own is not None for model in fused.block.raw.models)


def between(row: np.ndarray, share: float, sure: float) -> tuple[int, int]:
    """Bounds that the magnitude below the `share` largest lies between, by a sample.

    They are multiples of 2¹⁵, 0.4 % of a magnitude: counting into so few bins is quicker than sorting.
    """
    size = len(row)
    slack = sure * math.sqrt(size * share * (1 - share)) + (2 if sure else 0)
    low, high = math.floor(size * (1 - share) - slack), math.floor(size * (1 - share) + slack)
    if not sure:
        row.partition(max(low, 0))
        return int(row[low]), int(row[low])
    up_to = np.cumsum(np.bincount(row >> np.uint32(15)))
    first, last = (int(np.searchsorted(up_to, place, "right")) for place in (low, high))
    return (0 if low < 0 else first << 15), (TOP - 1 if high >= size else ((last + 1) << 15) - 1)


def tally(fused: Fused, bounds: Sequence[tuple[int, int]], rooms: Sequence[int]) -> list[Tally] | None:
    """One pass over a tensor; None where the candidates do not fit."""
    assert fused.block.raw is not None
    kept = [fused.block.raw.worker.room(k, room) for k, room in enumerate(rooms)]
    found, above, zeros = [0] * len(rooms), [0] * len(rooms), [0] * len(rooms)
    ends: list[list[int]] = [[] for _ in rooms]
    for piece in fused.block.grid:
        parts = fused.block.raw.worker.tally(fused, piece, bounds, kept, found)
        above = [total + part for total, (part, _) in zip(above, parts, strict=True)]
        zeros = [total + part for total, (_, part) in zip(zeros, parts, strict=True)]
        if any(c > room and low < high for c, room, (low, high) in zip(found, rooms, bounds, strict=True)):
            return None
        for row, count in zip(ends, found, strict=True):
            row.append(count)
    stored = [row[: 0 if low == high else f] for row, f, (low, high) in zip(kept, found, bounds, strict=True)]
    return [Tally(*each) for each in zip(above, zeros, bounds, stored, ends, strict=True)]


def settle(fused: Fused, found: Tally, count: int, make: Any, trivial: Any) -> Any:
    """The cut that keeps `count`, or None when the bounds missed it."""
    if not 0 < count < fused.block.grid.numel:
        return trivial(count)
    wanted, (low, high) = count - found.above, found.bounds
    if not 0 < wanted <= found.ends[-1]:
        return None
    assert fused.block.raw is not None
    bits, quota, equals = (
        fused.block.raw.worker.pick(found.inside, low, high, wanted) if low < high else (low, wanted, found.ends[-1])
    )
    return make(bits, quota, equals, [] if quota >= equals else before(found, bits))


def locate(tallies: Sequence[Tally], wanted: int) -> tuple[int, int, int] | None:
    """(bits, quota, equals) of the `wanted`-th largest of all these candidates, or None when there are fewer."""
    parts = [tally.inside for tally in tallies if len(tally.inside)]
    low = tallies[0].bounds[0]
    if not parts:
        alike = sum(tally.ends[-1] for tally in tallies if tally.ends)
        return (low, wanted, alike) if 0 < wanted <= alike else None
    if not 0 < wanted <= sum(map(len, parts)):
        return None
    wide = max(int(part.max()) for part in parts) - low + 1
    if wide > _BINS:
        whole = np.sort(np.concatenate(parts))
        bits = whole[len(whole) - wanted]
        first, last = (int(np.searchsorted(whole, bits, side)) for side in ("left", "right"))
        return int(bits), wanted - (len(whole) - last), last - first
    counts = np.zeros(wide, dtype=np.int64)
    for part in parts:  # magnitudes of bfloat16 differences are few, and numpy's partition is slow among equals
        counts += np.bincount(part - np.uint32(low), minlength=wide)
    from_top = np.cumsum(counts[::-1])
    at = int(np.searchsorted(from_top, wanted))
    equals = int(counts[wide - 1 - at])
    return low + wide - 1 - at, wanted - (int(from_top[at]) - equals), equals


def before(found: Tally, bits: int) -> list[int]:
    """For each piece, how many entries that equal a cut come earlier; one more than pieces, the total."""
    if not len(found.inside):
        return [0, *found.ends]
    equal, running = found.inside == bits, [0]
    for begin, end in pairwise([0, *found.ends]):
        running.append(running[-1] + int(np.count_nonzero(equal[begin:end])))
    return running


# The same over all tensors of a model.

KEPT = 1 << 28
"""Bytes of candidates that a whole model keeps at most, however much memory there is."""
_MODEL_SAMPLE = 1 << 20
"""Entries of each expert that are looked at beforehand."""
_MODEL_SLACK = 2.0
"""How much further apart the bounds are than for entries drawn one by one: runs of neighbours are alike."""


@dataclass
class Sample:
    """Magnitudes of one tensor, and how many entries each of them stands for."""

    sizes: np.ndarray
    weight: float


def rate_of(numel: int) -> int:
    """Of how many entries one is looked at."""
    return max(1, numel // _MODEL_SAMPLE)


def sample_of(block: Any, rate: int) -> Sample | None:
    """About every `rate`-th entry of a block, in runs; None where the loops cannot read it."""
    fused, numel = block.deltas.fused, block.grid.numel
    if fused is None:
        return None
    if not numel:
        return Sample(np.empty((len(block.tasks), 0), dtype=np.uint32), 0.0)
    sizes = sample(fused, max(1, round(numel / rate / _SPAN))).copy()
    return Sample(sizes, numel / sizes.shape[1])


def bounds_of(samples: Sequence[Sample], counts: Sequence[int], numel: int) -> list[tuple[int, int]]:
    """Per expert, between which bits the wanted magnitude lies."""
    weights = np.concatenate([np.full(each.sizes.shape[1], each.weight) for each in samples])
    bounds = []
    for k, count in enumerate(counts):
        if not 0 < count < numel:
            bounds.append((TOP, TOP))
            continue
        sizes = np.concatenate([each.sizes[k] for each in samples])
        order = np.argsort(sizes)
        share = np.cumsum(weights[order]) / numel  # of entries up to this magnitude
        slack = _TRIES[0] * _MODEL_SLACK * math.sqrt(count / numel * (1 - count / numel) / len(sizes))
        low = int(np.searchsorted(share, 1 - count / numel - slack))
        high = int(np.searchsorted(share, 1 - count / numel + slack))
        bounds.append((
            0 if 1 - count / numel < slack else int(sizes[order[min(low, len(order) - 1)]]),
            TOP - 1 if high >= len(order) else int(sizes[order[high]]),
        ))  # fmt: skip
    return bounds


def fits(numel: int, tasks: int, memory: int) -> bool:
    """Whether a model's candidates fit in so much memory, at the worst density; beyond it histograms take over."""
    share = _TRIES[0] * _MODEL_SLACK / math.sqrt(_MODEL_SAMPLE)
    return 4 * tasks * (numel if numel <= _MODEL_SAMPLE else numel * share) <= memory


def tally_of(block: Any, bounds: Sequence[tuple[int, int]]) -> list[Tally] | None:
    """One pass over a block; None where the candidates do not fit."""
    if not block.grid.numel:
        return []
    room = min(block.grid.numel, max(block.raw.worker.spare // (4 * len(bounds)), SMALL)) + 16
    found = tally(block.deltas.fused, bounds, [room] * len(bounds))
    return found and [replace(row, inside=row.inside.copy()) for row in found]
