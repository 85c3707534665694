"""Sums in one order, everywhere: float64, in runs of CHUNK entries that are halved until one is left.

torch and compiled loops add up in orders of their own; a norm that decides about bytes must not depend on who adds.
"""

from __future__ import annotations

from plait.kernels.job import CHUNK, SQUARE
from plait.lazy import torch
from plait.methods.block import Block
from plait.methods.stream import Stream


def ordered_sum(values: torch.Tensor) -> torch.Tensor:
    """[K, n] → [K], in float64: each run's upper half is added to its lower half; runs follow one another."""
    k, n = values.shape
    runs = values.new_zeros((k, -(-n // CHUNK) * CHUNK), dtype=torch.float64)
    runs[:, :n] = values
    runs = runs.view(k, -1, CHUNK)
    while runs.shape[-1] > 1:
        half = runs.shape[-1] // 2
        runs = runs[..., :half] + runs[..., half:]
    total = torch.zeros(k, dtype=torch.float64, device=values.device)
    for run in runs[..., 0].unbind(1):
        total += run
    return total


def totals(block: Block, vectors: Stream, what: int) -> list[float]:
    """Per expert Σ |v| (`job.ABSOLUTE`) or Σ v² (`job.SQUARE`) of a stream [K, n] over its tensor."""
    if vectors.fused is not None and vectors.fused.combine is None and vectors.fused.block.raw is not None:
        return vectors.fused.block.raw.worker.norms(vectors.fused, what)

    def add(values: torch.Tensor) -> torch.Tensor:
        wide = values.to(torch.float64)
        return ordered_sum(wide.square() if what == SQUARE else wide.abs())

    found = vectors.total(add)
    return found.tolist() if found.ndim else [0.0] * len(block.tasks)  # an empty tensor has no piece
