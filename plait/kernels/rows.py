"""DELLA's ranks: which entries of whole rows stay."""

# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import numpy as np
from numba import carray, cfunc, njit, types

from plait.kernels import job as J
from plait.kernels.memory import _MAGNITUDE, _POINTERS, _f32, _i32, _load, _pointer, _u8, _u32, _uniform, _widen


@njit(error_model="numpy")
def _rank(bits, width, i):
    """Rank of entry i from below; among equals the lower position ranks higher."""
    own = np.int32(bits[i])
    below = np.int32(0)
    for j in range(width):
        below = np.int32(below + np.int32(np.int32(bits[j]) < own))
    for j in range(i + 1, width):
        below = np.int32(below + np.int32(np.int32(bits[j]) == own))
    return below


@njit(inline="always")
def _chance(rank, last, low, spread):
    share = np.float64(rank) / np.float64(last) if last else 0.5
    return low + share * 2.0 * spread


@njit(error_model="numpy")
def _binned(row, width, bins, target):
    """Into which of equally wide bins each magnitude of a row falls."""
    sizes, out = _f32(row, width), _i32(target, width)
    top = np.float32(0)
    for i in range(width):
        top = sizes[i] if sizes[i] > top else top
    factor = np.float32(bins) / top if top > np.float32(1e-30) else np.float32(0)
    highest = np.int32(bins - 1)
    for i in range(width):
        b = np.int32(sizes[i] * factor)
        b = b if b < highest else highest
        out[i] = b if b > 0 else np.int32(0)  # NaN and infinity become the least integer, and must stay inside too


@njit(error_model="numpy")
def _prune_row(row, drawn, binned, width, low, spread, at, bins, kept, begin):
    """Which entries of a row stay (`plait.methods.transforms.magprune`), as bytes from kept[begin].

    Magnitudes fall into bins by size. A bin's ranks bound the chances of its entries, which decides about almost all;
    the few whose draw lies between the bounds are ranked exactly.
    """
    bits, draws, places_of = _u32(row, width), _f32(drawn, width), _i32(binned, width)
    least = carray(_pointer(at, types.float64), (bins,))
    most = carray(_pointer(at + 8 * bins, types.float64), (bins,))
    places = _i32(at + 16 * bins, bins + 1)
    for b in range(bins + 1):
        places[b] = 0
    for i in range(width):
        places[places_of[i] + 1] += np.int32(1)
    last = width - 1
    for b in range(bins):
        held = places[b + 1]
        places[b + 1] = np.int32(places[b] + held)
        if held:
            least[b] = _chance(places[b], last, low, spread)
            most[b] = _chance(places[b + 1] - 1, last, low, spread)
    for i in range(width):
        kept[begin + i] = np.uint8(np.float64(draws[i]) < least[places_of[i]])
    # The places of the undecided take the place of the bins, which are no longer needed.
    count = 0
    for i in range(width):
        b = places_of[i]
        number = np.float64(draws[i])
        places_of[count] = np.int32(i)
        count += np.int64((number >= least[b]) & (number < most[b]))
    for j in range(count):
        i = np.int64(places_of[j])
        kept[begin + i] = np.uint8(np.float64(draws[i]) < _chance(_rank(bits, width, i), last, low, spread))


@cfunc(types.int64(*_POINTERS), nopython=True, error_model="numpy")
def prune(job_pointer, numbers_pointer):
    """Masks of a piece of whole rows: per expert packed bits at J.BITS, lowest first, where that is not 0.

    The doubles hold density − ε and ε of every expert. Scratch: `prune_bytes`.
    """
    count = carray(job_pointer, (J.HEAD,))[J.EXPERTS]
    job = carray(job_pointer, (J.HEAD + J.SIDE * count,))
    chances = carray(_pointer(job[J.DOUBLES], types.float64), (2 * count,))
    n, width, scratch = job[J.ENTRIES], job[J.WIDTH], job[J.SCRATCH]
    bins = max(64, min(4096, width >> 1))
    bits, row = _u32(scratch, width), scratch
    under, drawn = scratch + 4 * width, scratch + 8 * width
    binned = scratch + 12 * width
    at = ((scratch + 16 * width + 7) >> 3) << 3
    kept = _u8(at + 20 * bins + 64, n + 8)
    broken = np.int64(0)
    for k in range(count):
        side = J.HEAD + k * J.SIDE
        if job[side + J.BITS] == 0:
            continue
        for start in range(0, n, max(width, 1)):
            broken |= _widen(job[J.BASE_CODE], job[J.BASE_ADDRESS], start, width, under)
            broken |= _load(job, start, width, under, row, k)
            for i in range(width):
                bits[i] = np.uint32(bits[i] & _MAGNITUDE)
            _uniform(
                job[J.POSITION] + start, width,
                job[side + J.KEY], job[side + J.KEY + 1], job[side + J.KEY + 2], drawn,
            )  # fmt: skip
            _binned(row, width, bins, binned)
            _prune_row(row, drawn, binned, width, chances[k], chances[count + k], at, bins, kept, start)
        for i in range(n, (n + 7) // 8 * 8):
            kept[i] = np.uint8(0)
        packed = _u8(job[side + J.BITS], (n + 7) // 8)
        for word in range((n + 7) // 8):
            byte = np.uint8(0)
            for i in range(8):
                byte |= np.uint8(kept[8 * word + i] << i)
            packed[word] = byte
    return broken
