"""The stages of a merge over one chunk: what is done to each expert, and how they become one.

Every operation is the float32 operation of the torch path, in its order, so that both write the same bytes.
"""

# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import numpy as np
from numba import carray, njit, types

from plait.kernels import job as J
from plait.kernels.memory import _MAGNITUDE, _f32, _load, _places, _pointer, _round, _u8, _u32, _uniform, _widen


@njit(error_model="numpy")
def _cut(chunk, m, low, high):
    """Set to zero what does not lie in low <= bits < high."""
    bits = _u32(chunk, m)
    for i in range(m):
        word = bits[i]
        size = np.int32(np.uint32(word & _MAGNITUDE))
        bits[i] = word if (size >= low) & (size < high) else np.uint32(0)


@njit(error_model="numpy")
def _split_equals(chunk, m, bits_equal, quota, keep_first, marks):
    """Of what equals a cut, keep the first `quota` alone, or drop them alone; how many it were."""
    bits, marked, places = _u32(chunk, m), _u8(marks, m), marks + 4 * J.CHUNK
    equal = np.int32(bits_equal)
    for i in range(m):
        marked[i] = np.uint8(np.int32(np.uint32(bits[i] & _MAGNITUDE)) == equal)
    seen = _places(marks, m, places)
    first = min(max(quota, 0), seen)
    begin, end = (first, seen) if keep_first else (np.int64(0), first)
    at = _u32(places, seen)
    for j in range(np.uint64(begin), np.uint64(end)):
        bits[at[j]] = np.uint32(0)
    return seen


@njit(error_model="numpy")
def _drop(chunk, m, draws, density, divide):
    values, numbers = _f32(chunk, m), _f32(draws, m)
    for i in range(m):
        values[i] = values[i] * (np.float32(1) if numbers[i] < density else np.float32(0))
    if divide:
        for i in range(m):
            values[i] = values[i] / density


@njit(error_model="numpy")
def _mask(chunk, m, address, start, spare):
    """Multiply by packed bits, lowest bit first, which become bytes at `spare`: eight at once in a 64-bit word."""
    count = (m + 7) // 8
    packed, words = _u8(address + start // 8, count), carray(_pointer(spare, types.uint64), (count,))
    for word in range(count):
        each = np.uint64(packed[word]) * np.uint64(0x0101010101010101) & np.uint64(0x8040201008040201)
        words[word] = (each + np.uint64(0x7F7F7F7F7F7F7F7F)) >> np.uint64(7) & np.uint64(0x0101010101010101)
    values, stays = _f32(chunk, m), _u8(spare, m)
    for i in range(m):
        values[i] = values[i] * np.float32(stays[i])


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
            job[side + J.QUOTA] -= _split_equals(
                spare + 4 * J.CHUNK, m, job[side + J.EQUAL], job[side + J.QUOTA], True, spare + 8 * J.CHUNK
            )
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
                    job[side + J.QUOTA] -= _split_equals(
                        chunk, m, job[side + J.EQUAL], job[side + J.QUOTA], True, spare
                    )
                if job[side + J.EQUAL_TOP] >= 0:
                    job[side + J.QUOTA_TOP] -= _split_equals(
                        chunk, m, job[side + J.EQUAL_TOP], job[side + J.QUOTA_TOP], False, spare
                    )
                _cut(chunk, m, np.int32(job[side + J.LOW]), np.int32(job[side + J.HIGH]))
            elif kind == J.DROP and numbers[count + k] < 1:
                _uniform(
                    job[J.POSITION] + start, m,
                    job[side + J.KEY], job[side + J.KEY + 1], job[side + J.KEY + 2], spare,
                )  # fmt: skip
                _drop(chunk, m, spare, numbers[count + k], job[J.DIVIDE] != 0)
            elif kind == J.MASKED and job[side + J.BITS] != 0:
                _mask(chunk, m, job[side + J.BITS], start, spare)
            if job[J.RESCALE] != 0:
                _scale(chunk, m, numbers[2 * count + k])


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
        weight, first, subtract = numbers[k], k == 0, job[J.SOURCE] == J.DELTAS and job[side + J.OWN] == 0
        if subtract and job[J.WEIGH] != 0:
            for i in range(m):
                part = (each[i] - under[i]) * weight
                out[i] = part if first else out[i] + part
        elif subtract:
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


@njit(error_model="numpy")
def _put(job, numbers, start, m, count, base, total):
    """What was combined at `total`, scaled, on the base, and rounded to the output; TOO_LARGE or 0."""
    if job[J.SCALE] != 0:
        _scale(total, m, numbers[3 * count + 1])
    if job[J.ON_BASE] != 0:
        values, under = _f32(total, m), _f32(base, m)
        for i in range(m):
            values[i] = under[i] + values[i]
    return _round(job[J.OUT_CODE], total, m, job[J.OUT_ADDRESS], start)
