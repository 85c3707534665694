"""How many threads there are: ours, and those that torch would start inside of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from plait.lazy import torch


def usable_threads() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads, in each of which torch works alone.

    Our threads are the parallelism; torch's own would fight them, and change the order of sums. Where torch is not
    loaded yet it may be, or never be: then OpenMP is told beforehand.
    """
    if "torch" in sys.modules:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield pool
        finally:
            torch.set_num_threads(before)
        return
    given = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with ThreadPoolExecutor(count, initializer=_calm) as pool:
            yield pool
    finally:
        if given is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = given
        if "torch" in sys.modules:
            torch.set_num_threads(int(given) if given and given.isdigit() else usable_threads())


def _calm() -> None:
    if "torch" in sys.modules:
        torch.set_num_threads(1)
