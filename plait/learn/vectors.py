"""The task vectors that a fit needs again and again: written once to a mapped scratch file, read as a stream.

A step needs base + λ·V and V·gradient of one tensor after the other, so nothing is held K times: what stays in memory
is the operating system's cache, which gives way.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plait.decide import TensorPlan
from plait.engine import Engine
from plait.methods.stream import Stream
from plait.plan import Plan

_ALIGN = 64


class TaskVectors:
    """θ0 [n] and the K vectors [K, n] of every merged tensor, float32. Tensors that no expert changes are left out."""

    def __init__(self, plan: Plan, engine: Engine, path: Path, vectors: Callable[..., Stream]) -> None:
        self.tasks = [model.name for model in plan.models]
        by_key = {tensor.key: tensor for tensor in plan.merged}
        self._tensors = {key: by_key[key] for key in sorted(by_key)}
        count = len(self.tasks)
        self._places: dict[str, int] = {}
        at = 0
        for key, tensor in self._tensors.items():
            self._places[key] = at
            at += -(-tensor.spec.numel * (count + 1) // _ALIGN) * _ALIGN
        # Written through the file and not through a map: a full disk is then an error, and not the end of the process.
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        changed: dict[str, bool] = {}

        def write(tensor: TensorPlan) -> None:
            changed[tensor.key] = self._write(tensor, engine, plan.recipe.seed, state, vectors)

        try:
            os.ftruncate(self._file, max(at, 1) * 4)
            state = engine.survey(plan.method, plan.merged, plan.recipe.seed)
            engine.progress.stage("task vectors", sum(tensor.bytes_in for tensor in self._tensors.values()))
            engine.each(list(self._tensors.values()), write)
        finally:
            os.close(self._file)
        self._map = np.memmap(path, np.float32, "r")
        # What no step reads is not kept: frozen layers leave holes in the file.
        self.names = [key for key in self._tensors if changed[key]]

    def base(self, name: str) -> torch.Tensor:
        """[n]: θ0. Not to be written into."""
        place, size = self._places[name], self._tensors[name].spec.numel
        return self._read(place, size)

    def rows(self, name: str) -> torch.Tensor:
        """[K, n]: the vectors. Not to be written into."""
        place, size = self._places[name], self._tensors[name].spec.numel
        return self._read(place + size, size * len(self.tasks)).view(len(self.tasks), size)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor."""
        return self._tensors[name].shape

    def _read(self, place: int, size: int) -> torch.Tensor:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch notes that the map is read-only; so it should be
            return torch.from_numpy(self._map[place : place + size])

    def _write(self, tensor: TensorPlan, engine: Engine, seed: int, state: Any, vectors: Callable[..., Stream]) -> bool:
        block = engine.block(tensor, seed, state)
        stream = vectors(block, **tensor.keywords)
        place, size = self._places[tensor.key], tensor.spec.numel
        changed = False
        for piece in tensor.grid:
            values = stream(piece)
            if torch.count_nonzero(values):
                changed = True
                for k, row in enumerate(values):
                    self._put(place + size * (k + 1) + piece.start, row)
            self._put(place + piece.start, block.base(piece))
            engine.progress.advance(int(tensor.bytes_in * piece.numel / max(size, 1)))
        return changed

    def _put(self, place: int, values: torch.Tensor) -> None:
        data = values.float().cpu().contiguous().numpy().data.cast("B")
        at = place * 4
        while data:
            count = os.pwrite(self._file, data, at)
            data, at = data[count:], at + count
