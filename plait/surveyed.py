"""What a method's pass over the whole model is given."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from plait.decide import TensorPlan
from plait.lazy import torch
from plait.methods.block import Block
from plait.stages import Progress

R = TypeVar("R")


class Jobs(Protocol):
    """What carries out a pass: an engine."""

    memory: int
    progress: Progress

    def each(self, tensors: list[TensorPlan], job: Callable[[TensorPlan], R]) -> list[R]:
        """job of every tensor."""
        ...

    def block(self, tensor: TensorPlan, seed: int) -> Block:
        """The block of one tensor."""
        ...


class Surveyed:
    """Every merged tensor once (tied twins share a key), in sorted order of names."""

    def __init__(self, engine: Jobs, tensors: list[TensorPlan], seed: int) -> None:
        self.engine, self.seed = engine, seed
        by_key = {tensor.key: tensor for tensor in tensors}
        self.tensors = [by_key[key] for key in sorted(by_key)]
        self.params: Mapping[str, Mapping[str, Any]] = {tensor.key: tensor.keywords for tensor in self.tensors}
        self.passes = 0

    @property
    def numel(self) -> int:
        """Entries of all tensors."""
        return sum(tensor.spec.numel for tensor in self.tensors)

    @property
    def memory(self) -> int:
        """Bytes of the budget."""
        return self.engine.memory

    def each(self, fn: Callable[[Block], R]) -> dict[str, R]:
        """fn of every block, on the engine's threads."""
        self.passes += 1
        self.engine.progress.stage(f"survey {self.passes}", sum(tensor.bytes_in for tensor in self.tensors))

        def job(tensor: TensorPlan) -> R:
            result = fn(self.engine.block(tensor, self.seed))
            self.engine.progress.advance(tensor.bytes_in)
            return result

        results = self.engine.each(self.tensors, job)
        return {tensor.key: result for tensor, result in zip(self.tensors, results, strict=True)}

    def total(self, fn: Callable[[Block], torch.Tensor]) -> torch.Tensor:
        """Sum of fn over the blocks that have entries, added up as they come: whole numbers do not mind the order."""
        lock, held = threading.Lock(), []

        def add(block: Block) -> None:
            if not block.grid.numel:
                return
            part = fn(block).cpu()
            with lock:
                if held:
                    held[0] += part
                else:
                    held.append(part.clone())

        self.each(add)
        return held[0] if held else torch.zeros(())
