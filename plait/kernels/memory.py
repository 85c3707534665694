"""What every compiled loop is made of: views of memory at an address, widening, rounding, random numbers.

Integers are cast back after every operation: numba widens them to 64 bits otherwise, which halves the vectors' width.
"""

# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from plait.kernels import job as J

_POINTERS = (types.CPointer(types.int64), types.CPointer(types.float32))
"""What an entry is called with: the job, and its float32 numbers."""
_EXPONENT, _MAGNITUDE = np.uint32(0x7F800000), np.uint32(0x7FFFFFFF)
_HALF_EXPONENT, _LEAST_HALF = np.uint32(0x7C00), np.uint32(0x38800000)
"""Of float16: the exponent that says infinity or NaN; and, as float32, the least number that is no subnormal one."""


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


@intrinsic
def _as_float(context, bits):
    """32 bits, read as a float."""
    del context

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@intrinsic
def _as_bits(context, value):
    """A float, read as 32 bits."""
    del context

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


@intrinsic
def _lowest(context, word):
    """The place of the lowest bit that is set in a word that is not zero."""
    del context

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], context.get_constant(types.boolean, True))

    return types.uint64(types.uint64), generate


@njit(error_model="numpy")
def _widen(code, address, start, m, target):
    """Entries [start, start + m) of a stored run as float32 at `target`; 1 where one is not finite, else 0.

    The largest exponent tells, in one instruction a vector: that of an infinity or NaN is above all others.
    """
    out = _u32(target, m)
    largest = np.uint32(0)
    if code == J.BF16:
        short = _u16(address + 2 * start, m)
        for i in range(m):
            bits = np.uint32(np.uint32(short[i]) << np.uint32(16))
            out[i] = bits
            largest = max(largest, np.uint32(bits & _EXPONENT))
    elif code == J.F16:
        return _widen_half(address, start, m, target)
    else:
        long = _u32(address + 4 * start, m)
        for i in range(m):
            bits = long[i]
            out[i] = bits
            largest = max(largest, np.uint32(bits & _EXPONENT))
    return np.int64(largest == _EXPONENT)


@njit(error_model="numpy")
def _widen_half(address, start, m, target):
    """The same of float16. Subnormal numbers are made from integers: no mode of the processor takes those for zero."""
    half, out = _u16(address + 2 * start, m), _f32(target, m)
    largest = np.uint32(0)
    for i in range(m):
        word = np.uint32(half[i])
        size = np.uint32(word & np.uint32(0x7FFF))
        small = np.float32(np.int32(size)) * np.float32(2.0**-24)
        large = _as_float(np.uint32(np.uint32(size << np.uint32(13)) + np.uint32(0x38000000)))
        number = small if size < np.uint32(0x400) else large
        out[i] = -number if word > np.uint32(0x7FFF) else number
        largest = max(largest, np.uint32(word & _HALF_EXPONENT))
    return np.int64(largest == _HALF_EXPONENT)


@njit(error_model="numpy")
def _round(code, values, m, address, start):
    """float32 to what is written: as it is, or to nearest even. TOO_LARGE where float16 cannot hold an entry."""
    bits = _u32(values, m)
    if code == J.BF16:
        out = _u16(address + 2 * start, m)
        for i in range(m):
            word = bits[i]
            odd = np.uint32(np.uint32(word >> np.uint32(16)) & np.uint32(1))
            up = np.uint32(np.uint32(np.uint32(word + np.uint32(0x7FFF)) + odd) >> np.uint32(16))
            out[i] = np.uint16(np.uint32(0x7FC0) if np.uint32(word & _MAGNITUDE) > _EXPONENT else up)
    elif code == J.F16:
        out, largest = _u16(address + 2 * start, m), np.uint32(0)
        for i in range(m):
            size = np.uint32(bits[i] & _MAGNITUDE)
            odd = np.uint32(np.uint32(size >> np.uint32(13)) & np.uint32(1))
            large = np.uint32(np.uint32(np.uint32(size - np.uint32(0x38000000)) + np.uint32(0xFFF)) + odd)
            # Beside a half, 2⁻²⁴ is the last place: the sum rounds as a subnormal float16 does.
            small = np.uint32(_as_bits(_as_float(size) + np.float32(0.5)) - np.uint32(0x3F000000))
            found = small if size < _LEAST_HALF else np.uint32(large >> np.uint32(13))
            found = found if size < np.uint32(0x47800000) else _HALF_EXPONENT
            largest = max(largest, found)
            out[i] = np.uint16(found | np.uint32(np.uint32(bits[i] >> np.uint32(16)) & np.uint32(0x8000)))
        return np.int64(J.TOO_LARGE) if largest >= _HALF_EXPONENT else np.int64(0)
    else:
        out = _u32(address + 4 * start, m)
        for i in range(m):
            out[i] = bits[i]
    return np.int64(0)


@njit(error_model="numpy")
def _load(job, start, m, base, chunk, k):
    """Expert k of a chunk, as weights or as task vector, at `chunk`; 1 where an entry is not finite."""
    side = J.HEAD + k * J.SIDE
    code, address = job[side + J.CODE], job[side + J.ADDRESS]
    if job[J.SOURCE] != J.DELTAS or job[side + J.OWN] != 0:
        return _widen(code, address, start, m, chunk)
    values, under = _f32(chunk, m), _f32(base, m)
    largest = np.uint32(0)
    if code == J.BF16:
        short = _u16(address + 2 * start, m)
        for i in range(m):
            bits = np.uint32(np.uint32(short[i]) << np.uint32(16))
            values[i] = _as_float(bits) - under[i]
            largest = max(largest, np.uint32(bits & _EXPONENT))
    elif code == J.F16:
        broken = _widen_half(address, start, m, chunk)
        for i in range(m):
            values[i] = values[i] - under[i]
        return broken
    else:
        long = _u32(address + 4 * start, m)
        for i in range(m):
            bits = long[i]
            values[i] = _as_float(bits) - under[i]
            largest = max(largest, np.uint32(bits & _EXPONENT))
    return np.int64(largest == _EXPONENT)


@njit(error_model="numpy")
def _places(marks, m, target):
    """Where among m bytes of 0 and 1 (in a room of whole 64) the ones are, in order, at `target`; how many there are.

    64 marks become the bits of a word: a loop over its ones has one branch that cannot be foretold in 64 entries.
    Indices are unsigned, as numba looks whether a signed one counts from the end.
    """
    marked, words, out = _u8(marks, J.CHUNK), carray(_pointer(marks, types.uint64), (J.CHUNK // 8,)), _u32(target, m)
    for i in range(m, (m + 63) // 64 * 64):
        marked[i] = np.uint8(0)
    found = np.uint64(0)
    for group in range(np.uint64((m + 63) // 64)):
        first = np.uint64(group * np.uint64(8))
        left = np.uint64(0)
        for j in range(np.uint64(8)):
            byte = np.uint64(words[first + j] * np.uint64(0x0102040810204080)) >> np.uint64(56)
            left |= byte << np.uint64(np.uint64(8) * j)
        while left != np.uint64(0):
            out[found] = np.uint32(np.uint64(first * np.uint64(8)) + _lowest(left))
            found += np.uint64(1)
            left &= left - np.uint64(1)
    return np.int64(found)


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
