"""Reads ahead: while tensors are merged, the system brings the next ones from the disk into its page cache."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from itertools import accumulate

from plait.decide import TensorPlan
from plait.sources.safetensors import SafetensorsSource

DEPTH = 64 << 20
"""Bytes beyond the jobs that have begun. They are the page cache's and no part of the memory budget."""


class ReadAhead:
    """A thread that goes through the jobs' tensors just before the jobs do, which take them in this order.

    Of a tensor it brings the beginning (of all its inputs alike); once a job is in it, the system's own reading ahead
    goes by the job's reads. What is in the page cache already costs two system calls. Where the system takes no advice
    nothing is done.
    """

    def __init__(self, tensors: Sequence[TensorPlan]) -> None:
        self._tensors = tensors
        self._ends = [0, *accumulate(min(tensor.bytes_in, DEPTH) for tensor in tensors)]
        self._begun, self._stopped = 0, False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="plait-ahead", daemon=True)

    def __enter__(self) -> ReadAhead:
        if hasattr(os, "posix_fadvise"):
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """No more; afterwards it touches no file."""
        with self._change:
            self._stopped = True
            self._change.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def begun(self) -> None:
        """One more job has begun."""
        with self._change:
            self._begun += 1
            self._change.notify()

    def _run(self) -> None:
        for place, tensor in enumerate(self._tensors):
            with self._change:
                self._change.wait_for(
                    lambda place=place: self._stopped or self._ends[place] - self._ends[self._begun] <= DEPTH
                )
                if self._stopped:
                    return
                if place < self._begun:
                    continue
            parties = [*tensor.inputs, *([] if tensor.base is None else [tensor.base])]
            for item in parties:
                if item.update is None and isinstance(item.source, SafetensorsSource):
                    item.source.soon(item.stored, DEPTH // len(parties))
