"""The least code that merges linearly at speed: mapped files, one compiled loop, two threads, written in place.

    python bench/prototype.py OUT MODEL...        folders of bfloat16 shards, alike in names and layout

No checks, no hashes, no resuming, no names aligned, no header of its own. bench/speed.py runs it beside `plait merge`,
which does all that, in a process of its own with the loop compiled before. Prints the seconds of its merge alone.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np

PIECE = 1 << 18


@numba.njit(nogil=True, cache=True)
def mean(stored, out):
    count = np.float32(len(stored))
    for i in range(len(out)):
        total = np.float32(0)
        for k in range(len(stored)):
            total += np.uint32(np.uint32(stored[k][i]) << np.uint32(16)).view(np.float32)
        bits = np.float32(total / count).view(np.uint32)
        out[i] = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


def merge(shard: str, models: list[Path], out: Path, pool: ThreadPoolExecutor) -> None:
    """Merge one file."""
    size = (models[0] / shard).stat().st_size
    begin = 8 + int.from_bytes((models[0] / shard).open("rb").read(8), "little")
    inputs = tuple(np.memmap(model / shard, np.uint16, "r", begin) for model in models)
    target = os.open(out / shard, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.posix_fallocate(target, 0, size)
    os.pwrite(target, (models[0] / shard).open("rb").read(begin), 0)

    def piece(at: int) -> None:
        parts = tuple(values[at : at + PIECE] for values in inputs)
        merged = np.empty(len(parts[0]), np.uint16)
        mean(parts, merged)
        os.pwrite(target, merged.data, begin + 2 * at)

    list(pool.map(piece, range(0, len(inputs[0]), PIECE)))
    os.fsync(target)


def main() -> None:
    out, models = Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]
    out.mkdir(parents=True, exist_ok=True)
    some = np.memmap(sorted(models[0].glob("*.safetensors"))[0], np.uint16, "r")[:16]
    mean((some,) * len(models), np.empty(16, np.uint16))  # compiled, or out of numba's cache
    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        for path in sorted(models[0].glob("*.safetensors")):
            merge(path.name, models, out, pool)
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
