"""The inner loops of element-wise merging, for numba. Imported only where they are compiled (`build`).

One family for all methods: experts are widened to float32 chunk by chunk, sparsified, combined, put on the base and
rounded, while the chunk is in the first caches. Which sparsifier and which combination is a number in the job, chosen
outside of the loops. Every operation is the float32 operation of the torch path, in its order, so that both write the
same bytes; loops are free of branches where they can be, so that the compiler vectorises them.

Integers are cast back after every operation: numba widens them to 64 bits otherwise, which halves the vectors' width.
"""

# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import numpy as np
from numba import carray, cfunc, njit, types

from plait.kernels import job as J
from plait.kernels.memory import _MAGNITUDE, _POINTERS, _f32, _places, _pointer, _u8, _u32
from plait.kernels.product import product
from plait.kernels.rows import prune
from plait.kernels.sift import guess, patch
from plait.kernels.stages import _add_up, _combine, _fold, _loaded, _put, _sparsify, _variance


@cfunc(types.int64(*_POINTERS), nopython=True, error_model="numpy")
def merge(job_pointer, numbers_pointer):
    """One piece from the stored inputs to the written output; NOT_FINITE, TOO_LARGE, or 0."""
    count = carray(job_pointer, (J.HEAD,))[J.EXPERTS]
    job = carray(job_pointer, (J.HEAD + J.SIDE * count,))
    numbers = carray(numbers_pointer, (3 * count + 4,))
    n, scratch = job[J.ENTRIES], job[J.SCRATCH]
    chunks, spare = scratch + 4 * J.CHUNK, scratch + 4 * J.CHUNK * (count + 1)
    broken = np.int64(0)
    plain = job[J.SPARSIFY] == J.NOTHING and job[J.COMBINE] == J.SUM
    for start in range(0, n, J.CHUNK):
        m = min(J.CHUNK, n - start)
        if plain:
            broken |= _add_up(job, numbers, start, m, count, scratch, spare)
        else:
            broken |= _loaded(job, start, m, count, scratch)
            _sparsify(job, numbers, start, m, count, chunks, spare)
            _combine(job, numbers, m, count, chunks, spare)
        broken |= _put(job, numbers, start, m, count, scratch, spare)
    return broken


@cfunc(types.int64(*_POINTERS), nopython=True, error_model="numpy")
def magnitudes(job_pointer, numbers_pointer):
    """The bits of |values| of a piece, [K, n] (or of the variance over the experts, [1, n]), to the output."""
    count = carray(job_pointer, (J.HEAD,))[J.EXPERTS]
    job = carray(job_pointer, (J.HEAD + J.SIDE * count,))
    n, scratch = job[J.ENTRIES], job[J.SCRATCH]
    chunks, spare = scratch + 4 * J.CHUNK, scratch + 4 * J.CHUNK * (count + 1)
    broken = np.int64(0)
    for start in range(0, n, J.CHUNK):
        m = min(J.CHUNK, n - start)
        broken |= _loaded(job, start, m, count, scratch)
        if job[J.SPARSIFY] == J.SPREAD:
            _variance(chunks, count, m, spare, chunks)
        for k in range(1 if job[J.SPARSIFY] == J.SPREAD else count):
            bits, out = _u32(chunks + 4 * J.CHUNK * k, m), _u32(job[J.OUT_ADDRESS] + 4 * (n * k + start), m)
            for i in range(m):
                out[i] = np.uint32(bits[i] & _MAGNITUDE)
    return broken


@njit(error_model="numpy")
def _zeros(bits, m):
    zeros = np.int32(0)
    for i in range(m):
        zeros = np.int32(zeros + np.int32(np.uint32(bits[i] & _MAGNITUDE) == 0))
    return np.int64(zeros)


@njit(error_model="numpy")
def _tally(bits, m, low, high, out, room, found, marks):
    """Count bits > high; put those in low <= bits <= high side by side at `out`, where `found` of them are already.

    → (how many are above, `found` as it is now; more than `room` when they do not fit). With low = high nothing is put
    anywhere, and `found` only counts.
    """
    if low == high:  # nothing to tell apart: counted is enough
        over, equal = np.int32(0), np.int32(0)
        for i in range(m):
            size = np.int32(np.uint32(bits[i] & _MAGNITUDE))
            over = np.int32(over + np.int32(size > high))
            equal = np.int32(equal + np.int32(size == high))
        return np.int64(over), found + np.int64(equal)
    marked, places = _u8(marks, J.CHUNK), marks + 4 * J.CHUNK
    above = np.int32(0)
    for i in range(m):
        size = np.int32(np.uint32(bits[i] & _MAGNITUDE))
        above = np.int32(above + np.int32(size > high))
        marked[i] = np.uint8((size >= low) & (size <= high))
    more = _places(marks, m, places)
    if found + more > room:
        return np.int64(above), room + 1
    at, kept = _u32(places, m), _u32(out + 4 * found, more)
    for j in range(np.uint64(more)):
        kept[j] = np.uint32(bits[at[j]] & _MAGNITUDE)
    return np.int64(above), found + more


@cfunc(types.int64(*_POINTERS), nopython=True, error_model="numpy")
def tally(job_pointer, numbers_pointer):
    """Per expert: how many magnitudes lie above `high`, and which lie in [low, high]: `room` at most are kept.

    Adds to J.ABOVE, and for variances to J.QUOTA the number of zeros; writes J.FOUND, more than the room if there were
    more.
    """
    count = carray(job_pointer, (J.HEAD,))[J.EXPERTS]
    job = carray(job_pointer, (J.HEAD + J.SIDE * count,))
    n, scratch = job[J.ENTRIES], job[J.SCRATCH]
    chunks, spare = scratch + 4 * J.CHUNK, scratch + 4 * J.CHUNK * (count + 1)
    broken = np.int64(0)
    for start in range(0, n, J.CHUNK):
        m = min(J.CHUNK, n - start)
        broken |= _loaded(job, start, m, count, scratch)
        if job[J.SPARSIFY] == J.SPREAD:
            _variance(chunks, count, m, spare, chunks)
        for k in range(1 if job[J.SPARSIFY] == J.SPREAD else count):
            side = J.HEAD + k * J.SIDE
            room = job[side + J.ROOM]
            bits = _u32(chunks + 4 * J.CHUNK * k, m)
            above, job[side + J.FOUND] = _tally(
                bits, m, np.int32(job[side + J.LOW]), np.int32(job[side + J.HIGH]),
                job[side + J.FOUND_AT], room, job[side + J.FOUND], spare,
            )  # fmt: skip
            job[side + J.ABOVE] += above
            if job[J.SPARSIFY] == J.SPREAD:
                job[side + J.QUOTA] += _zeros(bits, m)
    return broken


@cfunc(types.int64(*_POINTERS), nopython=True, error_model="numpy")
def pick(job_pointer, numbers_pointer):
    """The J.QUOTA-th largest of J.FOUND numbers at J.FOUND_AT, which lie in [J.LOW, J.HIGH], of one side.

    Writes J.EQUAL, the number; J.QUOTA, how many that equal it are among the wanted; J.ABOVE, how many equal it.
    Counts by ever finer bins, so that many equal numbers cost nothing.
    """
    job = carray(job_pointer, (J.HEAD + J.SIDE,))
    n, wanted = job[J.HEAD + J.FOUND], job[J.HEAD + J.QUOTA]
    low, high = job[J.HEAD + J.LOW], job[J.HEAD + J.HIGH]
    numbers = _u32(job[J.HEAD + J.FOUND_AT], n)
    counts, others = _u32(job[J.SCRATCH], 1025), _u32(job[J.SCRATCH] + J.PICK_BYTES // 2, 1025)
    while True:
        shift = 0
        while (high - low) >> shift >= 1024:
            shift += 1
        for b in range(1025):
            counts[b] = others[b] = np.uint32(0)
        # What lies outside goes to one bin more; two rows, as equal neighbours would wait for one another.
        least, by, even = np.uint32(low), np.uint32(shift), np.uint64(n // 2 * 2)
        for i in range(np.uint64(0), even, np.uint64(2)):
            one = np.uint32(np.uint32(numbers[i] - least) >> by)
            two = np.uint32(np.uint32(numbers[i + np.uint64(1)] - least) >> by)
            counts[min(one, np.uint32(1024))] += np.uint32(1)
            others[min(two, np.uint32(1024))] += np.uint32(1)
        if n % 2:
            counts[min(np.uint32(np.uint32(numbers[even] - least) >> by), np.uint32(1024))] += np.uint32(1)
        for b in range(1024):
            counts[b] += others[b]
        b = (high - low) >> shift
        while np.int64(counts[b]) < wanted:
            wanted -= np.int64(counts[b])
            b -= 1
        if shift == 0:
            job[J.HEAD + J.EQUAL], job[J.HEAD + J.QUOTA], job[J.HEAD + J.ABOVE] = low + b, wanted, counts[b]
            return 0
        low, high = low + (b << shift), min(high, low + ((b + 1) << shift) - 1)


@cfunc(types.int64(*_POINTERS), nopython=True, error_model="numpy")
def votes(job_pointer, numbers_pointer):
    """Σ sign(Σ_k values) of a piece after sparsifying, added to J.VOTES."""
    count = carray(job_pointer, (J.HEAD,))[J.EXPERTS]
    job = carray(job_pointer, (J.HEAD + J.SIDE * count,))
    numbers = carray(numbers_pointer, (3 * count + 4,))
    n, scratch = job[J.ENTRIES], job[J.SCRATCH]
    chunks, spare = scratch + 4 * J.CHUNK, scratch + 4 * J.CHUNK * (count + 1)
    broken = np.int64(0)
    for start in range(0, n, J.CHUNK):
        m = min(J.CHUNK, n - start)
        broken |= _loaded(job, start, m, count, scratch)
        _sparsify(job, numbers, start, m, count, chunks, spare)
        _fold(chunks, count, m, spare)
        total = _f32(spare, m)
        balance = np.int32(0)
        for i in range(m):
            balance = np.int32(balance + np.int32(total[i] > 0) - np.int32(total[i] < 0))
        job[J.VOTES] += np.int64(balance)
    return broken


@njit(inline="always")
def _size(number, squared):
    wide = np.float64(number)
    return wide * wide if squared else abs(wide)


@njit(error_model="numpy")
def _run_sum(values, m, squared, doubles):
    """Σ |v| or Σ v² of one run in float64, halved until one is left (`plait.methods.sums`): three times at once first.

    Writes zeros behind a short run.
    """
    numbers, part = _f32(values, J.CHUNK), J.CHUNK >> 3
    out = carray(_pointer(doubles, types.float64), (part,))
    for i in range(m, J.CHUNK):
        numbers[i] = np.float32(0)
    for i in range(part):
        even = _size(numbers[i], squared) + _size(numbers[4 * part + i], squared)
        even += _size(numbers[2 * part + i], squared) + _size(numbers[6 * part + i], squared)
        odd = _size(numbers[part + i], squared) + _size(numbers[5 * part + i], squared)
        odd += _size(numbers[3 * part + i], squared) + _size(numbers[7 * part + i], squared)
        out[i] = even + odd
    half = part >> 1
    while half > 0:
        for i in range(half):
            out[i] = out[i] + out[half + i]
        half >>= 1
    return out[0]


@cfunc(types.int64(*_POINTERS), nopython=True, error_model="numpy")
def norms(job_pointer, numbers_pointer):
    """Per expert Σ |v| (or Σ v²) of a piece after sparsifying, written to the first K doubles."""
    count = carray(job_pointer, (J.HEAD,))[J.EXPERTS]
    job = carray(job_pointer, (J.HEAD + J.SIDE * count,))
    numbers = carray(numbers_pointer, (3 * count + 4,))
    totals = carray(_pointer(job[J.DOUBLES], types.float64), (count,))
    n, scratch = job[J.ENTRIES], job[J.SCRATCH]
    chunks, spare = scratch + 4 * J.CHUNK, scratch + 4 * J.CHUNK * (count + 1)
    for k in range(count):
        totals[k] = 0.0
    broken = np.int64(0)
    for start in range(0, n, J.CHUNK):
        m = min(J.CHUNK, n - start)
        broken |= _loaded(job, start, m, count, scratch)
        _sparsify(job, numbers, start, m, count, chunks, spare)
        for k in range(count):
            totals[k] += _run_sum(chunks + 4 * J.CHUNK * k, m, job[J.VOTES] == J.SQUARE, spare)
    return broken


ENTRIES = {
    "merge": merge, "magnitudes": magnitudes, "tally": tally, "pick": pick, "votes": votes, "norms": norms,
    "prune": prune, "guess": guess, "patch": patch, "product": product,
}  # fmt: skip
"""What is compiled, by the name it is called by."""
