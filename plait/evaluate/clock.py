"""How long a model takes for a sample: the model alone, without reading and preparing its inputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds of a model over the batches of an evaluation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._running = 0.0
        self._batches: list[tuple[int, float]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside; work that a GPU was only told to do is waited for."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self._running += time.perf_counter() - start

    def lap(self, samples: int) -> None:
        """A batch of so many samples has ended."""
        self._batches.append((samples, self._running))
        self._running = 0.0

    def latency(self) -> float:
        """Seconds for a sample: the median of the largest batches, so that a first, slow one does not count."""
        size = max(samples for samples, _ in self._batches)
        return statistics.median(seconds for samples, seconds in self._batches if samples == size) / size

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
