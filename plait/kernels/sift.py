"""Merging before the cuts are known: what lies outside of the bounds is final, the rest is put aside."""

# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import numpy as np
from numba import carray, cfunc, njit, types

from plait.kernels import job as J
from plait.kernels.memory import _MAGNITUDE, _POINTERS, _places, _u8, _u16, _u32
from plait.kernels.stages import _combine, _loaded, _put


@njit(error_model="numpy")
def _sift(chunk, m, low, high, low_top, high_top, marks):
    """Mark what lies in [low, high] or [low_top, high_top]; set to zero what does not lie between the two.

    → how many magnitudes are above `high`, and how many above `high_top`.
    """
    bits, marked = _u32(chunk, m), _u8(marks, m)
    above, over = np.int32(0), np.int32(0)
    if low_top == J.TOP:
        for i in range(m):
            word = bits[i]
            size = np.int32(np.uint32(word & _MAGNITUDE))
            above = np.int32(above + np.int32(size > high))
            marked[i] = np.uint8(marked[i] | np.uint8((size >= low) & (size <= high)))
            bits[i] = word if size > high else np.uint32(0)
        return np.int64(above), np.int64(0)
    for i in range(m):
        word = bits[i]
        size = np.int32(np.uint32(word & _MAGNITUDE))
        above = np.int32(above + np.int32(size > high))
        over = np.int32(over + np.int32(size > high_top))
        inside = ((size >= low) & (size <= high)) | ((size >= low_top) & (size <= high_top))
        marked[i] = np.uint8(marked[i] | np.uint8(inside))
        bits[i] = word if (size > high) & (size < low_top) else np.uint32(0)
    return np.int64(above), np.int64(over)


@njit(error_model="numpy")
def _take(code, address, start, places, n, target, at):
    """Stored entries at `places` behind `start`, side by side from the `at`-th at `target`."""
    where = _u32(places, n)
    if code != J.F32:
        short, out = _u16(address + 2 * start, J.CHUNK), _u16(target + 2 * at, n)
        for j in range(np.uint64(n)):
            out[j] = short[where[j]]
    else:
        long, wide = _u32(address + 4 * start, J.CHUNK), _u32(target + 4 * at, n)
        for j in range(np.uint64(n)):
            wide[j] = long[where[j]]


@cfunc(types.int64(*_POINTERS), nopython=True, error_model="numpy")
def guess(job_pointer, numbers_pointer):
    """A piece merged as if nothing in [J.LOW, J.HIGH] or [J.LOW_TOP, J.HIGH_TOP] were kept; what is wrong.

    Entries of which an expert lies there are put aside as they are stored: J.LISTED of them, more than the room if they
    did not fit. Adds to J.ABOVE and J.ABOVE_TOP how many magnitudes lie above the bounds.
    """
    count = carray(job_pointer, (J.HEAD,))[J.EXPERTS]
    job = carray(job_pointer, (J.HEAD + J.SIDE * count,))
    numbers = carray(numbers_pointer, (3 * count + 4,))
    n, scratch = job[J.ENTRIES], job[J.SCRATCH]
    chunks, spare = scratch + 4 * J.CHUNK, scratch + 4 * J.CHUNK * (count + 1)
    places = spare + 4 * J.CHUNK
    broken = np.int64(0)
    for start in range(0, n, J.CHUNK):
        m = min(J.CHUNK, n - start)
        broken |= _loaded(job, start, m, count, scratch)
        marked = _u8(spare, m)
        for i in range(m):
            marked[i] = np.uint8(0)
        for k in range(count):
            side = J.HEAD + k * J.SIDE
            above, over = _sift(
                chunks + 4 * J.CHUNK * k, m, np.int32(job[side + J.LOW]), np.int32(job[side + J.HIGH]),
                np.int32(job[side + J.LOW_TOP]), np.int32(job[side + J.HIGH_TOP]), spare,
            )  # fmt: skip
            job[side + J.ABOVE] += above
            job[side + J.ABOVE_TOP] += over
        more, listed = _places(spare, m, places), job[J.LISTED]
        if listed + more > job[J.LIST_ROOM]:
            job[J.LISTED] = job[J.LIST_ROOM] + 1
            return broken
        where, out = _u32(places, more), _u32(job[J.PLACES] + 4 * listed, more)
        for j in range(np.uint64(more)):
            out[j] = np.uint32(where[j] + np.uint32(start))
        if job[J.BASE_ADDRESS] != 0:
            _take(job[J.BASE_CODE], job[J.BASE_ADDRESS], start, places, more, job[J.LISTED_BASE], listed)
        for k in range(count):
            side = J.HEAD + k * J.SIDE
            _take(job[side + J.CODE], job[side + J.ADDRESS], start, places, more, job[side + J.FOUND_AT], listed)
        job[J.LISTED] = listed + more
        _combine(job, numbers, m, count, chunks, spare)
        broken |= _put(job, numbers, start, m, count, scratch, spare)
    return broken


@cfunc(types.int64(*_POINTERS), nopython=True, error_model="numpy")
def patch(job_pointer, numbers_pointer):
    """J.LISTED output entries at J.BASE_ADDRESS, each to its place (J.PLACES) of a piece."""
    job = carray(job_pointer, (J.HEAD,))
    n = job[J.LISTED]
    where = _u32(job[J.PLACES], n)
    if job[J.OUT_CODE] != J.F32:
        short, out = _u16(job[J.BASE_ADDRESS], n), _u16(job[J.OUT_ADDRESS], job[J.ENTRIES])
        for j in range(np.uint64(n)):
            out[where[j]] = short[j]
    else:
        long, wide = _u32(job[J.BASE_ADDRESS], n), _u32(job[J.OUT_ADDRESS], job[J.ENTRIES])
        for j in range(np.uint64(n)):
            wide[where[j]] = long[j]
    return 0
