"""The inner loops of element-wise merging, for numba. Imported only where they are compiled (`build`).

One family for all methods: experts are widened to float32 chunk by chunk, sparsified, combined, put on the base and
rounded, while the chunk is in the first caches. Which sparsifier and which combination is a number in the job, chosen
outside of the loops. Every operation is the float32 operation of the torch path, in its order, so that both write the
same bytes; loops are free of branches where they can be, so that the compiler vectorises them.

Integers are cast back after every operation: numba widens them to 64 bits otherwise, which halves the vectors' width.
"""

# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import numpy as np
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from plait.kernels import job as J

_EXPONENT, _MAGNITUDE = np.uint32(0x7F800000), np.uint32(0x7FFFFFFF)


@intrinsic
def _pointer(context, address, kind):
    """An address as a pointer to float32, uint32, uint16 or uint8."""
    del context
    target = kind.dtype if hasattr(kind, "dtype") else kind

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(target)(address, kind), generate


@njit(inline="always")
def _f32(address, n):
    return carray(_pointer(address, types.float32), (n,))


@njit(inline="always")
def _u32(address, n):
    return carray(_pointer(address, types.uint32), (n,))


@njit(inline="always")
def _u16(address, n):
    return carray(_pointer(address, types.uint16), (n,))


@njit(inline="always")
def _i32(address, n):
    return carray(_pointer(address, types.int32), (n,))


@njit(inline="always")
def _u8(address, n):
    return carray(_pointer(address, types.uint8), (n,))


@njit(error_model="numpy")
def _widen(code, address, start, m, target):
    """Entries [start, start + m) of a stored run as float32 at `target`; 1 where one is not finite, else 0."""
    out = _u32(target, m)
    broken = np.uint32(0)
    if code == J.BF16:
        short = _u16(address + 2 * start, m)
        for i in range(m):
            bits = np.uint32(np.uint32(short[i]) << np.uint32(16))
            out[i] = bits
            broken |= np.uint32(np.uint32(bits & _EXPONENT) == _EXPONENT)
    else:
        long = _u32(address + 4 * start, m)
        for i in range(m):
            bits = long[i]
            out[i] = bits
            broken |= np.uint32(np.uint32(bits & _EXPONENT) == _EXPONENT)
    return np.int64(broken)


@njit(error_model="numpy")
def _round(code, values, m, address, start):
    """float32 to what is written: as it is, or bfloat16 to nearest even."""
    bits = _u32(values, m)
    if code == J.BF16:
        out = _u16(address + 2 * start, m)
        for i in range(m):
            word = bits[i]
            odd = np.uint32(np.uint32(word >> np.uint32(16)) & np.uint32(1))
            up = np.uint32(np.uint32(np.uint32(word + np.uint32(0x7FFF)) + odd) >> np.uint32(16))
            out[i] = np.uint16(np.uint32(0x7FC0) if np.uint32(word & _MAGNITUDE) > _EXPONENT else up)
    else:
        out = _u32(address + 4 * start, m)
        for i in range(m):
            out[i] = bits[i]


@njit(error_model="numpy")
def _load(job, start, m, base, chunk, k):
    """Expert k of a chunk, as weights or as task vector, at `chunk`."""
    side = J.HEAD + k * J.SIDE
    broken = _widen(job[side + J.CODE], job[side + J.ADDRESS], start, m, chunk)
    if job[J.SOURCE] == J.DELTAS:
        values, under = _f32(chunk, m), _f32(base, m)
        for i in range(m):
            values[i] = values[i] - under[i]
    return broken


@njit(error_model="numpy")
def _cut(chunk, m, low, high):
    """Set to zero what does not lie in low <= bits < high."""
    bits = _u32(chunk, m)
    for i in range(m):
        word = bits[i]
        size = np.int32(np.uint32(word & _MAGNITUDE))
        bits[i] = word if (size >= low) & (size < high) else np.uint32(0)


@njit(error_model="numpy")
def _cut_equals(chunk, m, bits_equal, quota):
    """Of what equals a cut, keep the first `quota`; how many it were."""
    bits = _u32(chunk, m)
    seen = np.int64(0)
    for i in range(m):
        if np.int64(bits[i] & _MAGNITUDE) == bits_equal:
            seen += 1
            if seen > quota:
                bits[i] = np.uint32(0)
    return seen


@njit(error_model="numpy")
def _draws(low, first, second, third, n, target):
    """Numbers in [0, 1) from 32-bit counters that begin at `low` (`plait.methods.draws` says how)."""
    out = _f32(target, n)
    for i in range(n):
        x = np.uint32(np.uint32(low + np.uint32(i)) ^ first)
        x = np.uint32(x ^ np.uint32(x >> np.uint32(16)))
        x = np.uint32(x * np.uint32(0x7FEB352D))
        x = np.uint32(x ^ np.uint32(x >> np.uint32(15)))
        x = np.uint32(x * np.uint32(0x846CA68B))
        x = np.uint32(x ^ np.uint32(x >> np.uint32(16)))
        x = np.uint32(x ^ second)
        x = np.uint32(x ^ np.uint32(x >> np.uint32(16)))
        x = np.uint32(x * np.uint32(0x7FEB352D))
        x = np.uint32(x ^ np.uint32(x >> np.uint32(15)))
        x = np.uint32(x * np.uint32(0x846CA68B))
        x = np.uint32(x ^ np.uint32(x >> np.uint32(16)))
        x = np.uint32(x + third)
        out[i] = np.float32(np.int32(np.uint32(x >> np.uint32(8)))) * np.float32(2.0**-24)


@njit(error_model="numpy")
def _uniform(position, m, key0, key1, key2, target):
    """Numbers of positions [position, position + m)."""
    done = np.int64(0)
    while done < m:  # at most twice: a chunk may straddle a multiple of 2³²
        at = np.uint64(position + done)
        count = min(m - done, np.int64(0x100000000) - np.int64(at & np.uint64(0xFFFFFFFF)))
        second = np.uint32(np.uint32(key1) ^ np.uint32(np.uint32(at >> np.uint64(32)) * np.uint32(0x9E3779B9)))
        _draws(np.uint32(at), np.uint32(key0), second, np.uint32(key2), count, target + 4 * done)
        done += count


@njit(error_model="numpy")
def _drop(chunk, m, draws, density, divide):
    values, numbers = _f32(chunk, m), _f32(draws, m)
    for i in range(m):
        values[i] = values[i] * (np.float32(1) if numbers[i] < density else np.float32(0))
    if divide:
        for i in range(m):
            values[i] = values[i] / density


@njit(error_model="numpy")
def _mask(chunk, m, address, start):
    """Multiply by packed bits, lowest bit first."""
    values, packed = _f32(chunk, m), _u8(address + start // 8, (m + 7) // 8)
    for i in range(m):
        values[i] = values[i] * np.float32((packed[i >> 3] >> np.uint8(i & 7)) & np.uint8(1))


@njit(error_model="numpy")
def _fold(chunks, count, m, target):
    """Sum over the experts, one after another."""
    out, first = _f32(target, m), _f32(chunks, m)
    for i in range(m):
        out[i] = first[i]
    for k in range(1, count):
        values = _f32(chunks + 4 * J.CHUNK * k, m)
        for i in range(m):
            out[i] = out[i] + values[i]


@njit(error_model="numpy")
def _scale(target, m, factor):
    values = _f32(target, m)
    for i in range(m):
        values[i] = values[i] * factor


@njit(error_model="numpy")
def _sign(total, m, zero_is_positive):
    """The elected sign of a sum, in its place."""
    values = _f32(total, m)
    bits = _u32(total, m)
    for i in range(m):
        negative = (np.uint32(bits[i] >> np.uint32(31)) != 0) | ((values[i] == 0) & (not zero_is_positive))
        values[i] = np.float32(-1) if negative else np.float32(1)


@njit(error_model="numpy")
def _agreeing(chunks, count, m, sign, numbers, weigh, result, divisor):
    """result = sign · Σ of what agrees (weighed for `weigh`), divisor = Σ of the weights of the experts that do."""
    signs, total, parts = _f32(sign, m), _f32(result, m), _f32(divisor, m)
    for k in range(count):
        values, weight = _f32(chunks + 4 * J.CHUNK * k, m), numbers[k]
        for i in range(m):
            agrees = values[i] * signs[i]
            agrees = agrees if agrees >= 0 else np.float32(0)
            one = (np.float32(1) if agrees > 0 else np.float32(0)) * weight
            agrees = agrees * weight if weigh else agrees
            total[i] = agrees if k == 0 else total[i] + agrees
            parts[i] = one if k == 0 else parts[i] + one
    for i in range(m):
        total[i] = total[i] * signs[i]


@njit(error_model="numpy")
def _variance(chunks, count, m, mean, target):
    """Population variance over the experts."""
    _fold(chunks, count, m, mean)
    middle, out, size = _f32(mean, m), _f32(target, m), np.float32(count)
    for i in range(m):
        middle[i] = middle[i] / size
    for k in range(count):
        values = _f32(chunks + 4 * J.CHUNK * k, m)
        for i in range(m):
            away = values[i] - middle[i]
            square = away * away
            out[i] = square if k == 0 else out[i] + square
    for i in range(m):
        out[i] = out[i] / size


@njit(error_model="numpy")
def _keep_where(chunks, count, m, keep):
    """Multiply all experts by a row of ones and zeros."""
    ones = _f32(keep, m)
    for k in range(count):
        values = _f32(chunks + 4 * J.CHUNK * k, m)
        for i in range(m):
            values[i] = values[i] * ones[i]


@njit(error_model="numpy")
def _consensus(chunks, count, m, mu, votes, total, counted):
    _fold(chunks, count, m, total)
    together, ones = _f32(total, m), _f32(counted, m)
    for i in range(m):
        ones[i] = np.float32(0)
    for k in range(count):
        values = _f32(chunks + 4 * J.CHUNK * k, m)
        for i in range(m):
            rest = together[i] - values[i]
            rest = (rest if rest >= 0 else -rest) * mu
            size = values[i] if values[i] >= 0 else -values[i]
            ones[i] = ones[i] + (np.float32(1) if size >= rest else np.float32(0))
    for i in range(m):
        ones[i] = np.float32(1) if ones[i] >= votes else np.float32(0)
    _keep_where(chunks, count, m, counted)


@njit(error_model="numpy")
def _sparsify(job, numbers, start, m, count, chunks, spare):
    """What is done to each task vector before they are combined."""
    kind = job[J.SPARSIFY]
    if kind == J.CONSENSUS:
        _consensus(chunks, count, m, numbers[3 * count + 3], np.float32(job[J.VOTES]), spare, spare + 4 * J.CHUNK)
    elif kind == J.AGREE:
        _fold(chunks, count, m, spare)
        _sign(spare, m, True)
        signs = _f32(spare, m)
        for k in range(count):
            values = _f32(chunks + 4 * J.CHUNK * k, m)
            for i in range(m):
                values[i] = values[i] * (np.float32(1) if values[i] * signs[i] > 0 else np.float32(0))
    elif kind == J.SPREAD:
        _variance(chunks, count, m, spare, spare + 4 * J.CHUNK)
        bits, ones = _u32(spare + 4 * J.CHUNK, m), _f32(spare + 4 * J.CHUNK, m)
        side = J.HEAD
        if job[side + J.EQUAL] >= 0:
            job[side + J.QUOTA] -= _cut_equals(spare + 4 * J.CHUNK, m, job[side + J.EQUAL], job[side + J.QUOTA])
        low = np.int32(job[side + J.LOW])
        for i in range(m):
            ones[i] = np.float32(1) if np.int32(bits[i]) >= low else np.float32(0)
        _keep_where(chunks, count, m, spare + 4 * J.CHUNK)
    else:
        for k in range(count):
            side = J.HEAD + k * J.SIDE
            chunk = chunks + 4 * J.CHUNK * k
            if kind == J.CUT:
                if job[side + J.EQUAL] >= 0:
                    job[side + J.QUOTA] -= _cut_equals(chunk, m, job[side + J.EQUAL], job[side + J.QUOTA])
                if job[side + J.EQUAL_TOP] >= 0:
                    job[side + J.QUOTA_TOP] -= _drop_equals(chunk, m, job[side + J.EQUAL_TOP], job[side + J.QUOTA_TOP])
                _cut(chunk, m, np.int32(job[side + J.LOW]), np.int32(job[side + J.HIGH]))
            elif kind == J.DROP and numbers[count + k] < 1:
                _uniform(
                    job[J.POSITION] + start, m,
                    job[side + J.KEY], job[side + J.KEY + 1], job[side + J.KEY + 2], spare,
                )  # fmt: skip
                _drop(chunk, m, spare, numbers[count + k], job[J.DIVIDE] != 0)
            elif kind == J.MASKED and job[side + J.BITS] != 0:
                _mask(chunk, m, job[side + J.BITS], start)
            if job[J.RESCALE] != 0:
                _scale(chunk, m, numbers[2 * count + k])


@njit(error_model="numpy")
def _drop_equals(chunk, m, bits_equal, quota):
    """Of what equals the upper cut, drop the first `quota`; how many it were."""
    bits = _u32(chunk, m)
    seen = np.int64(0)
    for i in range(m):
        if np.int64(bits[i] & _MAGNITUDE) == bits_equal:
            seen += 1
            if seen <= quota:
                bits[i] = np.uint32(0)
    return seen


@njit(error_model="numpy")
def _combine(job, numbers, m, count, chunks, spare):
    """K vectors → one, at `spare`."""
    kind = job[J.COMBINE]
    if job[J.WEIGH] != 0 and kind != J.SCE:
        for k in range(count):
            _scale(chunks + 4 * J.CHUNK * k, m, numbers[k])
    _fold(chunks, count, m, spare)
    if kind == J.ELECT or kind == J.SCE:
        sign, divisor = spare + 4 * J.CHUNK, spare + 8 * J.CHUNK
        total, signs = _f32(spare, m), _f32(sign, m)
        for i in range(m):
            signs[i] = total[i]
        _sign(sign, m, job[J.ZERO_IS_POSITIVE] != 0)
        _agreeing(chunks, count, m, sign, numbers, kind == J.SCE, spare, divisor)
        parts = _f32(divisor, m)
        if kind == J.SCE:
            least = numbers[3 * count + 2]
            for i in range(m):
                total[i] = total[i] / (parts[i] if parts[i] >= least else least)
        elif job[J.NORMALIZE] != 0:
            for i in range(m):
                total[i] = total[i] / (parts[i] + (np.float32(1) if parts[i] == 0 else np.float32(0)))
    elif job[J.NORMALIZE] != 0:
        total, size = _f32(spare, m), numbers[3 * count]
        for i in range(m):
            total[i] = total[i] / size


@njit(error_model="numpy")
def _add_up(job, numbers, start, m, count, scratch, total):
    """A plain or weighted sum of a chunk, without a place for every expert: what `_loaded` and `_combine` give."""
    broken = np.int64(0)
    base, values = scratch, scratch + 4 * J.CHUNK
    if job[J.BASE_ADDRESS] != 0:
        broken |= _widen(job[J.BASE_CODE], job[J.BASE_ADDRESS], start, m, base)
    out, each, under = _f32(total, m), _f32(values, m), _f32(base, m)
    for k in range(count):
        side = J.HEAD + k * J.SIDE
        broken |= _widen(job[side + J.CODE], job[side + J.ADDRESS], start, m, values)
        weight, first = numbers[k], k == 0
        if job[J.SOURCE] == J.DELTAS and job[J.WEIGH] != 0:
            for i in range(m):
                part = (each[i] - under[i]) * weight
                out[i] = part if first else out[i] + part
        elif job[J.SOURCE] == J.DELTAS:
            for i in range(m):
                part = each[i] - under[i]
                out[i] = part if first else out[i] + part
        elif job[J.WEIGH] != 0:
            for i in range(m):
                part = each[i] * weight
                out[i] = part if first else out[i] + part
        else:
            for i in range(m):
                out[i] = each[i] if first else out[i] + each[i]
    if job[J.NORMALIZE] != 0:
        size = numbers[3 * count]
        for i in range(m):
            out[i] = out[i] / size
    return broken


@njit(error_model="numpy")
def _loaded(job, start, m, count, scratch):
    """Base and experts of a chunk; 1 where something is not finite."""
    broken = np.int64(0)
    if job[J.BASE_ADDRESS] != 0:
        broken |= _widen(job[J.BASE_CODE], job[J.BASE_ADDRESS], start, m, scratch)
    for k in range(count):
        broken |= _load(job, start, m, scratch, scratch + 4 * J.CHUNK * (k + 1), k)
    return broken


_POINTERS = (types.CPointer(types.int64), types.CPointer(types.float32))


@cfunc(types.int64(*_POINTERS), nopython=True, error_model="numpy")
def merge(job_pointer, numbers_pointer):
    """One piece from the stored inputs to the written output; 1 where an input is not finite, else 0."""
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
        if job[J.SCALE] != 0:
            _scale(spare, m, numbers[3 * count + 1])
        if job[J.ON_BASE] != 0:
            total, under = _f32(spare, m), _f32(scratch, m)
            for i in range(m):
                total[i] = under[i] + total[i]
        _round(job[J.OUT_CODE], spare, m, job[J.OUT_ADDRESS], start)
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
def _tally(bits, m, low, high, out, room, found, marks):
    """Count bits > high; put those in low <= bits <= high side by side at `out`, where `found` of them are already.

    → (how many are above, how many are zero, `found` as it is now; more than `room` when they do not fit). With
    low = high nothing is put anywhere, and `found` only counts.
    """
    zeros = np.int32(0)
    for i in range(m):
        zeros = np.int32(zeros + np.int32(np.uint32(bits[i] & _MAGNITUDE) == 0))
    if low == high:  # nothing to tell apart: counted is enough
        over, equal = np.int32(0), np.int32(0)
        for i in range(m):
            size = np.int32(np.uint32(bits[i] & _MAGNITUDE))
            over = np.int32(over + np.int32(size > high))
            equal = np.int32(equal + np.int32(size == high))
        return np.int64(over), np.int64(zeros), found + np.int64(equal)
    marked, words = _u8(marks, J.CHUNK), carray(_pointer(marks, types.uint64), (J.CHUNK // 8,))
    above = np.int32(0)
    for i in range(m):
        size = np.int32(np.uint32(bits[i] & _MAGNITUDE))
        above = np.int32(above + np.int32(size > high))
        marked[i] = np.uint8((size >= low) & (size <= high))
    for i in range(m, (m + 7) // 8 * 8):
        marked[i] = np.uint8(0)
    for word in range((m + 7) // 8):
        if words[word] != 0:
            if found + 8 > room:
                return np.int64(above), np.int64(zeros), room + 1
            for i in range(8 * word, min(8 * word + 8, m)):
                out[found] = np.uint32(bits[i] & _MAGNITUDE)
                found += np.int64(marked[i])
    return np.int64(above), np.int64(zeros), found


@cfunc(types.int64(*_POINTERS), nopython=True, error_model="numpy")
def tally(job_pointer, numbers_pointer):
    """Per expert: how many magnitudes lie above `high`, and which lie in [low, high]: `room` at most are kept.

    Adds to J.ABOVE, and to J.QUOTA the number of zeros; writes J.FOUND, more than the room if there were more.
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
            above, zeros, job[side + J.FOUND] = _tally(
                _u32(chunks + 4 * J.CHUNK * k, m), m, np.int32(job[side + J.LOW]), np.int32(job[side + J.HIGH]),
                _u32(job[side + J.FOUND_AT], room), room, job[side + J.FOUND], spare,
            )  # fmt: skip
            job[side + J.ABOVE] += above
            job[side + J.QUOTA] += zeros
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
    counts = carray(_pointer(job[J.SCRATCH], types.int64), (1024,))
    while True:
        shift = 0
        while (high - low) >> shift >= 1024:
            shift += 1
        for b in range(1024):
            counts[b] = 0
        for i in range(n):
            number = np.int64(numbers[i])
            if number >= low and number <= high:
                counts[(number - low) >> shift] += 1
        b = 1023
        while counts[b] < wanted:
            wanted -= counts[b]
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


@njit(error_model="numpy")
def _run_sum(values, m, squared, doubles):
    """Σ |v| or Σ v² of one run in float64, halved until one is left (`plait.methods.sums`)."""
    numbers, out = _f32(values, m), carray(_pointer(doubles, types.float64), (J.CHUNK,))
    for i in range(m):
        wide = np.float64(numbers[i])
        out[i] = wide * wide if squared else abs(wide)
    for i in range(m, J.CHUNK):
        out[i] = 0.0
    half = J.CHUNK >> 1
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


ENTRIES = {
    "merge": merge, "magnitudes": magnitudes, "tally": tally, "pick": pick, "votes": votes, "norms": norms,
    "prune": prune,
}  # fmt: skip
"""What is compiled, by the name it is called by."""
