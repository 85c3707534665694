"""One thread's way to the compiled loops: its buffers, filled anew for every piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plait.errors import CheckpointError, MachineError
from plait.kernels import job as J
from plait.kernels.fused import Fused, Stored
from plait.kernels.native import Loops
from plait.lazy import np
from plait.methods.draws import key_of
from plait.methods.stream import Piece


@dataclass
class Aside:
    """Entries of a tensor that are merged later: their places in their pieces, and what is stored there."""

    places: np.ndarray
    models: list[np.ndarray]
    """Bytes, a row for each expert."""
    base: np.ndarray | None
    late: np.ndarray
    """Where the output of these entries goes."""
    count: int = 0
    """More than there are places when they did not fit."""


class Worker:
    """Buffers of one thread. Nothing here may be used by two threads at once."""

    def __init__(self, loops: Loops, spare: int = 1 << 25) -> None:
        self.loops = loops
        self.spare = spare
        """Bytes that a search in one tensor may keep beside the buffers of a piece."""
        self._buffers: dict[str, np.ndarray] = {}
        self._job = np.zeros(0, dtype=np.int64)
        self._numbers = np.zeros(0, dtype=np.float32)

    def merge(self, fused: Fused, piece: Piece) -> memoryview:
        """The bytes of a piece of the output; valid until the next call."""
        assert fused.block.raw is not None
        out = self.buffer("out", piece.numel * J.WIDTHS[fused.block.raw.out])
        self._fill(fused, piece)
        self._job[J.OUT_CODE], self._job[J.OUT_ADDRESS] = fused.block.raw.out, out.ctypes.data
        if self._call(self.loops.merge, fused, piece) & J.TOO_LARGE:
            raise too_large(fused.block.name)
        return out.data

    def magnitudes(self, fused: Fused, runs: Sequence[Piece]) -> np.ndarray:
        """[rows, n] bits of the magnitudes (of the variances, for `spread`) of some runs; valid until the next call."""
        whole = Piece(0, 0, sum(run.numel for run in runs))
        out = self.buffer("sizes", 4 * fused.rows * whole.numel).view(np.uint32)
        self._fill(fused, whole, runs)
        self._job[J.OUT_ADDRESS] = out.ctypes.data
        self._call(self.loops.magnitudes, fused, *runs)
        return out.reshape(fused.rows, -1)

    def tally(
        self,
        fused: Fused,
        piece: Piece,
        bounds: Sequence[tuple[int, int]],
        rooms: Sequence[np.ndarray],
        found: list[int],
    ) -> list[tuple[int, int]]:
        """How many magnitudes of each row lie above the upper bound, and for variances how many are zero.

        Those between the bounds go to the row's room, after the `found` that are there; `found` is brought up to date,
        and is larger than the room where they did not fit.
        """
        self._fill(fused, piece)
        sides = self._sides(fused)[: fused.rows]
        for side, (low, high), room, count in zip(sides, bounds, rooms, found, strict=True):
            side[J.LOW], side[J.HIGH] = low, high
            side[J.FOUND_AT], side[J.ROOM], side[J.FOUND], side[J.ABOVE] = room.ctypes.data, len(room), count, 0
        self._call(self.loops.tally, fused, piece)
        found[:] = sides[:, J.FOUND].tolist()
        return [(int(side[J.ABOVE]), int(side[J.QUOTA])) for side in sides]

    def guess(
        self, fused: Fused, piece: Piece, windows: Sequence[Sequence[tuple[int, int]]], aside: Aside, out: np.ndarray
    ) -> list[list[int]]:
        """Merge a piece into `out` as far as it is decided before the cuts are known; the rest is put `aside`.

        `fused` has no cuts; `windows` has, in their form, the bounds that each lies between. → how many magnitudes are
        above them.
        """
        self._fill(fused, piece)
        job, sides = self._job, self._sides(fused)
        assert fused.block.raw is not None
        job[J.OUT_CODE], job[J.OUT_ADDRESS] = fused.block.raw.out, out.ctypes.data
        job[J.PLACES], job[J.LIST_ROOM], job[J.LISTED] = aside.places.ctypes.data, len(aside.places), aside.count
        if aside.base is not None:
            job[J.LISTED_BASE] = aside.base.ctypes.data
        for side, listed, (*top, bottom) in zip(sides, aside.models, windows, strict=True):
            side[J.FOUND_AT] = listed.ctypes.data
            side[J.LOW], side[J.HIGH] = bottom
            side[J.LOW_TOP], side[J.HIGH_TOP] = top[0] if top else (J.TOP, J.TOP)
        large = self._call(self.loops.guess, fused, piece) & J.TOO_LARGE
        # Too large for float16, an entry may yet be one that is put right: as if there were no room to put aside.
        aside.count = len(aside.places) + 1 if large else int(job[J.LISTED])
        both = sides[:, [J.ABOVE_TOP, J.ABOVE]].tolist()
        return [above[-len(row) :] for above, row in zip(both, windows, strict=True)]

    def patch(self, code: int, places: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
        """Put output entries to their places in a piece."""
        job = np.zeros(J.HEAD, dtype=np.int64)
        job[J.ENTRIES], job[J.OUT_CODE], job[J.OUT_ADDRESS] = len(out), code, out.ctypes.data
        job[J.LISTED], job[J.PLACES], job[J.BASE_ADDRESS] = len(places), places.ctypes.data, values.ctypes.data
        self.loops.patch(job.ctypes.data, self._numbers.ctypes.data)

    def product(
        self, left: np.ndarray, right: np.ndarray, scale: float, under: Stored | None, start: int, buffer: memoryview
    ) -> None:
        """Fill with entries from `start` on of scale·leftᵀ·right, [rank, rows], [rank, columns]; added to `under`."""
        job, numel = np.zeros(J.PRODUCT, dtype=np.int64), len(buffer) // 4
        (rank, rows), columns = left.shape, right.shape[1]
        job[J.ENTRIES], job[J.FIRST], job[J.RANK], job[J.ROWS], job[J.COLUMNS] = numel, start, rank, rows, columns
        out = np.frombuffer(buffer, dtype=np.float32)
        job[J.LEFT], job[J.RIGHT], job[J.TARGET] = left.ctypes.data, right.ctypes.data, out.ctypes.data
        if under is not None:
            job[J.UNDER_CODE], job[J.UNDER_ADDRESS] = (
                under.code,
                self._read("under", under, [Piece(0, start, start + numel)]),
            )
            job[J.SPARE] = self.buffer("widened", 4 * J.CHUNK).ctypes.data
        scales = np.array([scale], dtype=np.float32)
        self.loops.product(job.ctypes.data, scales.ctypes.data)

    def pick(self, numbers: np.ndarray, low: int, high: int, wanted: int) -> tuple[int, int, int]:
        """The `wanted`-th largest integer of [low, high]; how many equals of it are wanted, and how many there are."""
        job = np.zeros(J.HEAD + J.SIDE, dtype=np.int64)
        side = job[J.HEAD :]
        job[J.SCRATCH] = self.buffer("scratch", J.PICK_BYTES).ctypes.data
        side[J.FOUND_AT], side[J.FOUND], side[J.QUOTA] = numbers.ctypes.data, len(numbers), wanted
        side[J.LOW], side[J.HIGH] = low, high
        self.loops.pick(job.ctypes.data, self._numbers.ctypes.data)
        return int(side[J.EQUAL]), int(side[J.QUOTA]), int(side[J.ABOVE])

    def votes(self, fused: Fused, piece: Piece) -> int:
        """Entries whose sum over the experts is positive, less those where it is negative."""
        self._fill(fused, piece)
        self._job[J.VOTES] = 0
        self._call(self.loops.votes, fused, piece)
        return int(self._job[J.VOTES])

    def norms(self, fused: Fused, what: int) -> list[float]:
        """Per expert Σ |v| or Σ v² over the tensor, in the order of `plait.methods.sums`."""
        totals = np.zeros(len(fused.block.tasks))
        for piece in fused.block.grid:
            self._fill(fused, piece)
            totals += self._norms(fused, piece, what)
        return totals.tolist()

    def _norms(self, fused: Fused, piece: Piece, what: int) -> np.ndarray:
        """The same of the piece that the job is filled with."""
        sums = np.zeros(len(fused.block.tasks))
        self._job[J.VOTES], self._job[J.DOUBLES] = what, sums.ctypes.data
        self._call(self.loops.norms, fused, piece)
        return sums

    def prune(
        self, fused: Fused, width: int, densities: Sequence[float], epsilons: Sequence[float]
    ) -> tuple[list[Any], list[tuple[float, float]]]:
        """DELLA's packed masks, [K, bytes] per piece, and per expert Σ |v| before and after; `width`: entries of a row.

        The sums are those of `norms`.
        """
        chances = np.array([*(d - e for d, e in zip(densities, epsilons, strict=True)), *epsilons], dtype=np.float64)
        masks, sums = [], np.zeros((2, len(densities)))
        for piece in fused.block.grid:
            packed = np.zeros((len(densities), -(-piece.numel // 8)), dtype=np.uint8)
            self._fill(fused, piece)
            scratch = self.buffer("rows", J.prune_bytes(width, piece.numel, len(densities))).ctypes.data
            chunks, self._job[J.SCRATCH] = int(self._job[J.SCRATCH]), scratch
            self._job[J.WIDTH], self._job[J.DOUBLES] = width, chances.ctypes.data
            for k, (side, density) in enumerate(zip(self._sides(fused), densities, strict=True)):
                side[J.BITS] = packed[k].ctypes.data if density < 1 else 0
                self._key(fused, side, k)
            self._call(self.loops.prune, fused, piece)
            masks.append(packed)
            self._job[J.SCRATCH] = chunks
            sums[0] += self._norms(fused, piece, J.ABSOLUTE)
            self._job[J.SPARSIFY] = J.MASKED
            sums[1] += self._norms(fused, piece, J.ABSOLUTE)
        return masks, list(zip(*sums.tolist(), strict=True))

    def _call(self, entry: Any, fused: Fused, *pieces: Piece) -> int:
        found = entry(self._job.ctypes.data, self._numbers.ctypes.data)
        if found & J.NOT_FINITE:
            for read in (*fused.block.read_models, fused.block.read_base):
                if read is not None:
                    for piece in pieces:
                        read(piece)  # the slow way, which says what is wrong, and where
            raise CheckpointError(f"'{fused.block.name}': holds a number that is not finite; get the checkpoint again")
        return found

    def buffer(self, name: str, size: int) -> np.ndarray:
        """`size` bytes that are kept for the next piece."""
        held = self._buffers.get(name)
        if held is None or len(held) < size:
            held = self._buffers[name] = np.empty(size, dtype=np.uint8)
        return held[:size]

    def room(self, row: int, count: int) -> np.ndarray:
        """Where a row's candidates go: `count` integers, the same memory for every tally."""
        return self.buffer(f"room {row}", 4 * count).view(np.uint32)

    def _sides(self, fused: Fused) -> np.ndarray:
        count = len(fused.block.tasks)
        return self._job[J.HEAD : J.HEAD + J.SIDE * count].reshape(count, J.SIDE)

    def _read(self, name: str, stored: Stored, runs: Sequence[Piece], own: bool = False) -> int:
        """Address of a buffer with the stored bytes (or the `own` task vector) of some runs, side by side."""
        buffer, at = self.buffer(name, stored.width * sum(run.numel for run in runs)), 0
        read = stored.own if own and stored.own is not None else stored.read
        for run in runs:
            read(run.start, buffer.data[at : at + stored.width * run.numel])
            at += stored.width * run.numel
        return buffer.ctypes.data

    def _fill(self, fused: Fused, piece: Piece, runs: Sequence[Piece] = ()) -> None:
        """Read the inputs of a piece, or of runs that are taken for one, and say everything about it in the job."""
        raw, count, each = fused.block.raw, len(fused.block.tasks), list(fused.cuts)  # they may be looked for only now
        assert raw is not None
        runs = runs or [piece]
        if len(self._job) != J.HEAD + J.SIDE * count:
            self._job = np.zeros(J.HEAD + J.SIDE * count, dtype=np.int64)
            self._numbers = np.zeros(3 * count + 4, dtype=np.float32)
        job, numbers = self._job, self._numbers
        job[:] = 0
        job[J.ENTRIES], job[J.EXPERTS], job[J.SOURCE], job[J.POSITION] = piece.numel, count, fused.source, piece.start
        if raw.base is not None and (fused.source == J.DELTAS or fused.on_base):
            job[J.BASE_CODE], job[J.BASE_ADDRESS] = raw.base.code, self._read("base", raw.base, runs)
        job[J.SCRATCH] = self.buffer("scratch", J.scratch_bytes(count)).ctypes.data
        job[J.SPARSIFY], job[J.COMBINE] = fused.sparsify, fused.combine or J.SUM
        job[J.DIVIDE], job[J.RESCALE], job[J.VOTES] = fused.divide, bool(fused.factors), fused.votes
        weights = fused.weights or [1.0] * count
        job[J.WEIGH] = any(weight != 1 for weight in weights)
        job[J.NORMALIZE], job[J.ZERO_IS_POSITIVE] = fused.normalize, fused.zero_is_positive
        job[J.SCALE], job[J.ON_BASE] = fused.scale is not None, fused.on_base
        numbers[:count] = weights
        if fused.densities:
            numbers[count : 2 * count] = fused.densities
        if fused.factors:
            numbers[2 * count : 3 * count] = fused.factors
        numbers[3 * count :] = (fused.divisor, 1.0 if fused.scale is None else fused.scale, 1e-6, fused.mu)
        for k, (side, model) in enumerate(zip(self._sides(fused), raw.models, strict=True)):
            side[J.OWN] = fused.source == J.DELTAS and model.own is not None
            side[J.CODE], side[J.ADDRESS] = model.code, self._read(f"expert {k}", model, runs, bool(side[J.OWN]))
            side[J.EQUAL] = side[J.EQUAL_TOP] = -1
            side[J.HIGH] = J.TOP
            if fused.sparsify == J.DROP:
                self._key(fused, side, k)
            elif fused.sparsify == J.MASKED:
                side[J.BITS] = fused.masks[piece.index][k].ctypes.data if fused.masked[k] else 0
        for side, cuts in zip(self._sides(fused), each, strict=False):
            *top, bottom = cuts
            side[J.LOW], side[J.EQUAL], side[J.QUOTA] = _edge(bottom, piece)
            for cut in top:
                side[J.HIGH], side[J.EQUAL_TOP], side[J.QUOTA_TOP] = _edge(cut, piece)
                if side[J.EQUAL_TOP] >= 0:  # what equals the upper cut was dealt with; the rest of it stays
                    side[J.HIGH] += 1

    def _key(self, fused: Fused, side: np.ndarray, k: int) -> None:
        side[J.KEY : J.KEY + 3] = key_of(fused.block.seed, fused.block.name, fused.block.tasks[k])


def _edge(cut: Any, piece: Piece) -> tuple[int, int, int]:
    """A cut in one piece: the least bits kept; which bits are kept only in part (−1: none), and how many of them."""
    least = cut.least(piece)
    return (least, -1, 0) if least is not None else (cut.bits, cut.bits, cut.quota - cut.before[piece.index])


def too_large(name: str) -> MachineError:
    """What is said of a tensor that float16 cannot hold."""
    return MachineError(f"'{name}': merged values exceed float16 (65504); set out_dtype: bfloat16 or float32")
