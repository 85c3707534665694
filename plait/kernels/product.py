"""Low-rank task vectors, multiplied out: ΔW = scale·Σ_r left[r, row]·right[r, column], from the first r upwards.

Every product and every sum is rounded by itself, as in the torch path, so an entry depends on its place alone.
"""

# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import numpy as np
from numba import carray, cfunc, njit, types

from plait.kernels import job as J
from plait.kernels.memory import _POINTERS, _f32, _widen

_BLOCK = 512
"""Columns that are worked on at once: of sixteen ranks they fill a first cache."""


@njit(error_model="numpy")
def _run(factors, stride, right, columns, rank, m, scale, target):
    """m entries of one row. `factors`: the row's in the first rank, `stride` entries before that in the next."""
    out, r = _f32(target, m), np.int64(0)
    while r < rank:
        a = _f32(factors + 4 * stride * r, 1)[0]
        x = _f32(right + 4 * columns * r, m)
        if r == 0:
            for i in range(m):
                out[i] = a * x[i]
            r += 1
        elif r + 4 <= rank:
            b, c, d = (
                _f32(factors + 4 * stride * (r + 1), 1)[0], _f32(factors + 4 * stride * (r + 2), 1)[0],
                _f32(factors + 4 * stride * (r + 3), 1)[0],
            )  # fmt: skip
            y, z = _f32(right + 4 * columns * (r + 1), m), _f32(right + 4 * columns * (r + 2), m)
            w = _f32(right + 4 * columns * (r + 3), m)
            for i in range(m):
                out[i] = (((out[i] + a * x[i]) + b * y[i]) + c * z[i]) + d * w[i]
            r += 4
        else:
            for i in range(m):
                out[i] = out[i] + a * x[i]
            r += 1
    for i in range(m):
        out[i] = out[i] * scale


@cfunc(types.int64(*_POINTERS), nopython=True, error_model="numpy")
def product(job_pointer, numbers_pointer):
    """Entries [J.FIRST, J.FIRST + J.ENTRIES) of ΔW, flat; on what is stored at J.UNDER_ADDRESS, if that is not 0."""
    job, scale = carray(job_pointer, (J.PRODUCT,)), carray(numbers_pointer, (1,))[0]
    start, stop, columns, target = job[J.FIRST], job[J.FIRST] + job[J.ENTRIES], job[J.COLUMNS], job[J.TARGET]
    for block in range(0, columns, _BLOCK):
        for row in range(start // columns, (stop - 1) // columns + 1):
            begin = max(row * columns + block, start)
            end = min(row * columns + min(block + _BLOCK, columns), stop)
            if begin < end:
                _run(
                    job[J.LEFT] + 4 * row, job[J.ROWS], job[J.RIGHT] + 4 * (begin - row * columns), columns,
                    job[J.RANK], end - begin, scale, target + 4 * (begin - start),
                )  # fmt: skip
    if job[J.UNDER_ADDRESS] == 0:
        return 0
    for at in range(0, stop - start, J.CHUNK):
        m = min(J.CHUNK, stop - start - at)
        _widen(job[J.UNDER_CODE], job[J.UNDER_ADDRESS], at, m, job[J.SPARE])
        under, out = _f32(job[J.SPARE], m), _f32(target + 4 * at, m)
        for i in range(m):
            out[i] = under[i] + out[i]
    return 0
