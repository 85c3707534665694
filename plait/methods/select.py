"""Exact selection of the largest magnitudes of a tensor of any size, in bounded memory.

The bits of a non-negative float, read as an integer, sort as the float does. Two histograms (the upper bits, then the
lower bits inside the one bin that matters) find the k-th largest of any float32 data exactly, in two sweeps. Equal
magnitudes are kept in order of position, lowest first; only when a cut falls among equals is a third sweep needed, to
count them piece by piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from plait.lazy import torch
from plait.methods.stream import Piece, Stream

_LOW_BITS = 15
_HIGH_BINS = 1 << (31 - _LOW_BITS)
_LOW_BINS = 1 << _LOW_BITS


_NONE = (1 << 31) - 1
"""Above the bits of every finite float: a cut that keeps nothing."""
_ALL = -1
"""Below the bits of every float: a cut that keeps everything."""


@dataclass
class Cut:
    """Keeps what lies above `bits`, and the first `quota` of what equals it."""

    bits: int
    quota: int = 0
    equals: int = 0
    """How many elements equal `bits`; above `quota`, `before` is filled."""
    before: list[int] = field(default_factory=list)
    """For each piece, how many equal elements come earlier; one entry more than pieces, the total."""

    def least(self, piece: Piece) -> int | None:
        """The smallest bits kept in a piece; None where some of the equal ones are kept and some are not."""
        if self.quota >= self.equals:
            return self.bits if self.quota else min(self.bits + 1, _NONE)
        if self.before[piece.index + 1] <= self.quota:
            return self.bits
        return self.bits + 1 if self.before[piece.index] >= self.quota else None

    def mask(self, magnitudes: torch.Tensor, piece: Piece) -> torch.Tensor:
        """Boolean mask of one piece's kept elements."""
        bits = as_bits(magnitudes)
        least = self.least(piece) if len(bits) else 0
        if least is not None:
            return bits >= least
        equal = bits == self.bits
        rank = torch.cumsum(equal, dim=-1) + self.before[piece.index]
        return (bits > self.bits) | (equal & (rank <= self.quota))

    def keep_(self, values: torch.Tensor, piece: Piece) -> None:
        """Set to zero, in place, what of one expert's piece [n] is not kept."""
        least = self.least(piece) if len(values) else 0
        if least is None or values.dtype != torch.float32:
            values *= self.mask(values.abs(), piece)
            return
        # On the bits themselves, several times as fast as a boolean mask: the sign bit of (magnitude − least) spreads
        # over the word and clears the entries below.
        bits = values.view(torch.int32)
        below = (bits & _NONE).sub_(least).bitwise_right_shift_(31)
        bits &= below.bitwise_not_()


def as_bits(magnitudes: torch.Tensor) -> torch.Tensor:
    """Non-negative float32 → integers that sort alike. float64 is selected at float32 precision."""
    return magnitudes.to(torch.float32).view(torch.int32)


def count_of(density: float, numel: int) -> int:
    """How many of `numel` elements a density keeps: ⌊density·n⌋, but something of any tensor when density > 0."""
    if density <= 0 or numel == 0:
        return 0
    return max(int(density * numel), 1)


class Histograms:
    """The two sweeps, as sums that any number of tensors and threads may add to: integer counts, so order is free.

    One row per (expert, wanted count): several cuts of one expert (breadcrumbs) share the upper histogram.
    """

    def __init__(self, counts: Sequence[Sequence[int]], numel: int) -> None:
        self.counts = [[min(count, numel) for count in row] for row in counts]
        self.numel = numel
        self.bins: list[list[int]] = []
        self.above: list[list[int]] = []

    @staticmethod
    def high(magnitudes: torch.Tensor) -> torch.Tensor:
        """[K, n] → [K, high bins] counts of the upper bits."""
        bins = as_bits(magnitudes) >> _LOW_BITS
        return torch.stack([torch.bincount(row, minlength=_HIGH_BINS) for row in bins])

    def choose(self, high: torch.Tensor) -> None:
        """Find, for each wanted count, the upper bin in which its cut falls."""
        for row, wanted in zip(high.cpu(), self.counts, strict=True):
            located = [_locate(row, count) for count in wanted]
            self.bins.append([bin_ for bin_, _ in located])
            self.above.append([above for _, above in located])

    def low(self, magnitudes: torch.Tensor) -> torch.Tensor:
        """[K, n] → [K, cuts, low bins] counts of the lower bits inside the chosen upper bins."""
        bits = as_bits(magnitudes)
        rows = []
        for k, chosen in enumerate(self.bins):
            found = {}
            for b in set(chosen):
                # What lies outside the bin is counted in the two bins at the ends, and dropped.
                inside = (bits[k] - (b << _LOW_BITS)).clamp_(-1, _LOW_BINS).add_(1)
                found[b] = torch.bincount(inside, minlength=_LOW_BINS + 2)[1:-1]
            rows.append(torch.stack([found[b] for b in chosen]))
        return torch.stack(rows)

    def cuts(self, low: torch.Tensor) -> list[list[Cut]]:
        """The cuts; `before` is still empty, and needed only where `quota` < `equals`."""
        result = []
        for k, wanted in enumerate(self.counts):
            row = []
            for c, count in enumerate(wanted):
                if count <= 0:
                    row.append(Cut(bits=_NONE))
                    continue
                if count >= self.numel:
                    row.append(Cut(bits=_ALL))
                    continue
                histogram = low[k, c].cpu()
                bin_, above = _locate(histogram, count - self.above[k][c])
                quota = count - self.above[k][c] - above
                row.append(Cut((self.bins[k][c] << _LOW_BITS) | bin_, quota, int(histogram[bin_])))
            result.append(row)
        return result


def _locate(histogram: torch.Tensor, count: int) -> tuple[int, int]:
    """The bin in which the `count`-th largest falls, and how many elements lie in higher bins."""
    if count <= 0:
        return 0, 0
    from_top = torch.cumsum(histogram.flip(0), dim=0)
    index = int(torch.searchsorted(from_top, torch.tensor(count, dtype=from_top.dtype)))
    index = min(index, histogram.numel() - 1)
    above = int(from_top[index - 1]) if index else 0
    return histogram.numel() - 1 - index, above


def equal_counts(magnitudes: torch.Tensor, cuts: Sequence[Sequence[Cut]]) -> list[list[int]]:
    """How many elements of [K, n] equal each cut's threshold."""
    bits = as_bits(magnitudes)
    return [[int(torch.count_nonzero(bits[k] == cut.bits)) for cut in row] for k, row in enumerate(cuts)]


def largest(values: Stream, counts: Sequence[Sequence[int]], numel: int) -> Sequence[Sequence[Cut]]:
    """For each expert k of a [K, n] stream and each wanted count, the cut that keeps exactly that many magnitudes.

    `counts[k]` lists the counts wanted of expert k; all experts must want equally many cuts. They may be looked for
    when they are first asked for: whoever merges by the loops may know them by then.
    """
    if all(count <= 0 or count >= numel for row in counts for count in row):
        return [[trivial(count) for count in row] for row in counts]
    if values.fused is None or not values.fused.plain:
        return _searched(values, counts, numel)
    from plait.kernels import once  # not for `plait check`, which merges nothing

    return once.Wanted(counts, lambda: _searched(values, counts, numel), Cut, trivial)


def _searched(values: Stream, counts: Sequence[Sequence[int]], numel: int) -> list[list[Cut]]:
    if values.fused is not None and values.fused.plain:
        from plait.kernels import selection

        found = selection.largest(values.fused, counts, Cut, trivial)
        if found is not None:
            return found
    magnitudes = values.map(lambda part: part.abs())
    search = Histograms(counts, numel)
    search.choose(magnitudes.total(Histograms.high))
    cuts = search.cuts(magnitudes.total(search.low))
    if any(cut.quota < cut.equals for row in cuts for cut in row):
        fill_before(cuts, magnitudes.sweep(lambda values, _: equal_counts(values, cuts)))
    return cuts


def trivial(count: int) -> Cut:
    """The cut that keeps nothing, or everything."""
    return Cut(bits=_NONE) if count <= 0 else Cut(bits=_ALL)


def largest_share(values: Stream, share: float, numel: int) -> Cut:
    """The cut of a stream [1, n] that keeps ⌊share · (entries that are not zero)⌋ of largest magnitude."""
    if values.fused is not None and values.fused.plain and numel:
        from plait.kernels import selection

        found = selection.largest_share(values.fused, share, Cut, trivial)
        if found is not None:
            return found
    count = int(sum(values.sweep(lambda part, _: int(torch.count_nonzero(part)))) * share)
    ((cut,),) = largest(values, [[count]], numel)
    return cut


def fill_before(cuts: Sequence[Sequence[Cut]], per_piece: Sequence[list[list[int]]]) -> None:
    """Running totals of the counts of equal elements, piece after piece."""
    for k, row in enumerate(cuts):
        for c, cut in enumerate(row):
            running = 0
            for counts in per_piece:
                cut.before.append(running)
                running += counts[k][c]
            cut.before.append(running)
