"""DELLA's ranks: which entries of whole rows stay.

Almost no entry needs its rank. A draw below the least chance of the row always stays, one from the greatest on always
goes; for those between, counts of magnitudes by their upper bits bound the rank; what is then still open is counted
exactly, or, where very many are equal, by sorting the row. Only loops over single entries that have no branch in them
are worth anything here: a branch that depends on a draw is mispredicted half the time.

Numbers that are indices are unsigned: numba asks of every signed one whether it is negative.
"""

# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import numpy as np
from numba import carray, cfunc, njit, types

from plait.kernels import job as J
from plait.kernels.memory import (
    _MAGNITUDE,
    _POINTERS,
    _f32,
    _i32,
    _load,
    _pointer,
    _u8,
    _u16,
    _u32,
    _uniform,
    _widen,
)  # fmt: skip

_DIGIT = 11
"""Bits that a row is sorted by at once."""
_TABLES = 4
"""Entries are counted in turn in so many tables: adding to a place that was just written waits for it."""


@njit(error_model="numpy")
def _chances(target, width, low, spread):
    """Of every rank the least number, a multiple of 2⁻²⁴ as draws are, that is not below its chance to stay."""
    out, last = _f32(target, width), width - 1
    for rank in range(width):
        share = np.float64(rank) / np.float64(last) if last else 0.5
        chance = (low + share * 2.0 * spread) * 2.0**24
        chance = chance if chance > 0.0 else 0.0
        chance = chance if chance < 2.0**24 else 2.0**24
        whole = np.int32(chance)
        whole = np.int32(whole + np.int32(np.float64(whole) < chance))
        out[rank] = np.float32(whole) * np.float32(2.0**-24)


@njit(error_model="numpy")
def _opened(row, drawn, width, least, most, kept, open_):
    """Bits to magnitudes, in place. What stays at any rank, and what depends on it, as bytes. → the largest bits."""
    bits, draws, stays, depends = _i32(row, width), _f32(drawn, width), _u8(kept, width), _u8(open_, width)
    top = np.int32(0)
    for i in range(width):
        size = np.int32(bits[i] & np.int32(_MAGNITUDE))
        bits[i] = size
        top = size if size > top else top
        stays[i] = np.uint8(draws[i] < least)
        depends[i] = np.uint8((draws[i] >= least) & (draws[i] < most))
    return top


@njit(error_model="numpy")
def _counted(row, width, top, shift, bins, binned, counts, below):
    """Into which bin, by its upper bits, each magnitude falls, and how many lie below each bin. The top is in the last.

    The lowest bin takes all that is less than 2⁻⁸ of the top.
    """
    bits, out = _i32(row, width), _u16(binned, width)
    first = np.int32(np.int32(top >> shift) - np.int32(bins - 1))
    for i in range(width):
        b = np.int32(np.int32(bits[i] >> shift) - first)
        out[i] = np.uint16(b if b > 0 else np.int32(0))
    a, b = _u32(counts, bins), _u32(counts + 4 * bins, bins)
    c, d = _u32(counts + 8 * bins, bins), _u32(counts + 12 * bins, bins)
    for i in range(bins):
        a[i] = b[i] = c[i] = d[i] = np.uint32(0)
    even = width // _TABLES * _TABLES
    for i in range(0, even, _TABLES):
        a[out[i]] += np.uint32(1)
        b[out[i + 1]] += np.uint32(1)
        c[out[i + 2]] += np.uint32(1)
        d[out[i + 3]] += np.uint32(1)
    for i in range(even, width):
        a[out[i]] += np.uint32(1)
    for i in range(bins):
        a[i] = np.uint32(np.uint32(a[i] + b[i]) + np.uint32(c[i] + d[i]))
    places, total = _u32(below, bins + 1), np.uint32(0)
    for i in range(bins):
        places[i] = total
        total = np.uint32(total + a[i])
    places[bins] = total


@njit(error_model="numpy")
def _bounded(drawn, binned, below, chances, width, bins, kept, open_, listed):
    """Decide by the least and the greatest rank in an entry's bin. → how many are still open, their places listed."""
    draws, numbers, places = _f32(drawn, width), _u16(binned, width), _u32(below, bins + 1)
    limits, stays, depends, out = _f32(chances, width), _u8(kept, width), _u8(open_, width), _u32(listed, width)
    count = np.uint64(0)
    for i in range(width):
        out[count] = np.uint32(i)
        count += np.uint64(depends[i])
    left = np.uint64(0)
    for j in range(count):
        i = out[np.uint64(j)]
        b = numbers[i]
        draw, above = draws[i], np.uint32(b) + np.uint32(1)
        least, most = limits[places[b]], limits[np.uint32(places[np.uint32(above)] - np.uint32(1))]
        stays[i] = np.uint8(draw < least)
        out[left] = i
        left += np.uint64((draw >= least) & (draw < most))
    return left


@njit(error_model="numpy")
def _rank(row, width, i):
    """Rank of entry i from below; among equals the lower position ranks higher."""
    bits, before, behind = _i32(row, width), _i32(row, i), _i32(row + 4 * (i + 1), width - 1 - i)
    own, below = bits[i], np.int32(0)
    for j in range(i):
        below = np.int32(below + np.int32(before[j] < own))
    for j in range(width - 1 - i):
        below = np.int32(below + np.int32(behind[j] <= own))
    return np.uint32(below)


@njit(error_model="numpy")
def _sorted(row, width, order, spare, counts):
    """Sort the places of a row by magnitude, of equals the last first. → where they lie, `order` or `spare`."""
    bits = _u32(row, width)
    count = _u32(counts, 1 << _DIGIT)
    source, target = order, spare
    first = _u32(source, width)
    for i in range(width):
        first[i] = np.uint32(width - 1 - i)
    for shift in range(0, 31, _DIGIT):
        mask, by = np.uint32((1 << _DIGIT) - 1), np.uint32(shift)
        for b in range(1 << _DIGIT):
            count[b] = np.uint32(0)
        for i in range(width):
            count[np.uint32(np.uint32(bits[i] >> by) & mask)] += np.uint32(1)
        if count[np.uint32(np.uint32(bits[0] >> by) & mask)] == width:
            continue  # all alike: the lower bits of differences of bfloat16 are zero
        total = np.uint32(0)
        for b in range(1 << _DIGIT):
            held = count[b]
            count[b] = total
            total = np.uint32(total + held)
        given, out = _u32(source, width), _u32(target, width)
        for j in range(width):
            i = given[j]
            digit = np.uint32(np.uint32(bits[i] >> by) & mask)
            out[count[digit]] = i
            count[digit] += np.uint32(1)
        source, target = target, source
    return source


@njit(error_model="numpy")
def _prune_row(row, drawn, chances, width, bins, shift, kept, scratch):
    """Which entries of a row stay (`plait.methods.transforms.magprune`), as bytes at `kept`; `row` is its bits."""
    open_, binned, listed = scratch, scratch + 4 * width, scratch + 8 * width
    counts = scratch + 12 * width
    below = counts + max(4 * _TABLES * bins, 4 << _DIGIT)
    limits, draws, stays = _f32(chances, width), _f32(drawn, width), _u8(kept, width)
    top = _opened(row, drawn, width, limits[0], limits[width - 1], kept, open_)
    _counted(row, width, top, shift, bins, binned, counts, below)
    left = _bounded(drawn, binned, below, chances, width, bins, kept, open_, listed)
    if left < J.EXACTLY:
        places = _u32(listed, width)
        for j in range(left):
            i = places[np.uint64(j)]
            stays[i] = np.uint8(draws[i] < limits[_rank(row, width, np.int64(i))])
    else:
        places = _u32(_sorted(row, width, open_, listed, counts), width)
        for rank in range(width):
            i = places[rank]
            stays[i] = np.uint8(draws[i] < limits[rank])


@njit(error_model="numpy")
def _pack(kept, n, target):
    """Bytes that are 0 or 1 to bits, lowest first; `kept` is a multiple of 8, and has room to the next."""
    flags, count = _u8(kept, n + 8), (n + 7) // 8
    for i in range(n, 8 * count):
        flags[i] = np.uint8(0)
    words, packed = carray(_pointer(kept, types.uint64), (count,)), _u8(target, count)
    for word in range(count):  # the product's top byte gathers the eight lowest bits, in their order
        packed[word] = np.uint8((words[word] * np.uint64(0x0102040810204080)) >> np.uint64(56))


@cfunc(types.int64(*_POINTERS), nopython=True, error_model="numpy")
def prune(job_pointer, numbers_pointer):
    """Masks of a piece of whole rows: per expert packed bits at J.BITS, lowest first, where that is not 0.

    The doubles hold density − ε and ε of every expert. Scratch: `prune_bytes`.
    """
    count = carray(job_pointer, (J.HEAD,))[J.EXPERTS]
    job = carray(job_pointer, (J.HEAD + J.SIDE * count,))
    shares = carray(_pointer(job[J.DOUBLES], types.float64), (2 * count,))
    n, width, at = job[J.ENTRIES], job[J.WIDTH], (job[J.SCRATCH] + 63) // 64 * 64
    bins, shift = np.int64(64), np.int32(20)  # eight powers of two below the top
    while 4 * bins < width and bins < J.BINS:
        bins, shift = bins * 2, np.int32(shift - 1)
    under, row, drawn = at, at + 4 * width, at + 8 * width
    chances, each = at + 12 * width, (n + 15) // 8 * 8
    kept = (at + (12 + 4 * count) * width + 7) // 8 * 8
    scratch = kept + count * each
    for k in range(count):
        _chances(chances + 4 * width * k, width, shares[k], shares[count + k])
    broken = np.int64(0)
    for start in range(0, n, max(width, 1)):
        broken |= _widen(job[J.BASE_CODE], job[J.BASE_ADDRESS], start, width, under)
        for k in range(count):
            side = J.HEAD + k * J.SIDE
            if job[side + J.BITS] != 0:
                broken |= _load(job, start, width, under, row, k)
                _uniform(
                    job[J.POSITION] + start, width,
                    job[side + J.KEY], job[side + J.KEY + 1], job[side + J.KEY + 2], drawn,
                )  # fmt: skip
                _prune_row(
                    row, drawn, chances + 4 * width * k, width, bins, shift, kept + k * each + start, scratch
                )  # fmt: skip
    for k in range(count):
        target = job[J.HEAD + k * J.SIDE + J.BITS]
        if target != 0:
            _pack(kept + k * each, n, target)
    return broken
