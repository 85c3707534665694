"""The least a merge can take: read every input byte once, write as many bytes as the output has, in the same way.

    python bench/floor.py OUT SIZE FILE...

One thread reads the files through one reused buffer (with a warm page cache this copies memory) and writes SIZE bytes
to OUT, allocated beforehand and synced as a merge does before its rename. Prints seconds of the clock and of the CPU.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

BUFFER = 1 << 20


def floor(out: Path, size: int, files: list[Path]) -> tuple[float, float]:
    """Seconds of the clock, and of the processor."""
    buffer = memoryview(bytearray(BUFFER))
    start, cpu = time.perf_counter(), time.process_time()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    descriptor = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.posix_fallocate(descriptor, 0, size)
    for at in range(0, size, BUFFER):
        os.pwrite(descriptor, buffer[: size - at], at)
    os.fsync(descriptor)
    os.close(descriptor)
    return time.perf_counter() - start, time.process_time() - cpu


if __name__ == "__main__":
    print(*floor(Path(sys.argv[1]), int(sys.argv[2]), [Path(name) for name in sys.argv[3:]]))
