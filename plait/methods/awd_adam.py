"""Adam for AWD: element-wise, so δ leaves the span of the task vectors and must itself be held.

A step needs G, ⟨τ_k, δ⟩ and ⟨δ, δ⟩ before it touches δ, and yields the latter two of the new δ. So a step is one pass
over the granule's task vectors, which are read piece by piece and never held.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from plait.lazy import np, torch
from plait.methods.awd_descent import GONE, Found, Settings, found, products, slope, start_of
from plait.methods.block import Block
from plait.methods.combines import column
from plait.methods.stream import Piece
from plait.methods.survey import Model
from plait.methods.transforms import fold

FIRST_DECAY, SECOND_DECAY, TINY = 0.9, 0.999, 1e-8
"""Adam's usual constants (arXiv:1412.6980)."""


class Adam:
    """Adam on one granule, in the granule's unit of length. Holds δ and its two moments.

    Adam's steps are per entry, whatever the gradient's size. So with `scale: relative` β counts in the root mean square
    entry of a task vector, which in vectors of length 1 is β/√n.
    """

    def __init__(self, gram: np.ndarray, unit: float, numel: int, settings: Settings) -> None:
        self.gram, self.unit, self.settings = gram, unit, settings
        self.rate = settings.beta / (math.sqrt(numel) if settings.scale == "relative" else 1)
        self.start = start_of(gram, settings)
        self.inner, self.square = products(gram, self.start)
        self.at = slope(gram, self.inner, self.square, settings.alpha)
        self.first = float(self.at.loss)
        self.taken = 0
        self.deltas: dict[str, torch.Tensor] = {}
        self._held: dict[str, torch.Tensor] = {}  # per tensor [3, n]: δ, first and second moment

    def walk(self, block: Block) -> np.ndarray:
        """One step on one tensor: its shares of ⟨τ_k, δ⟩ and ⟨δ, δ⟩, [K + 1]."""
        step = self.taken + 1
        rate = self.rate / (1 - FIRST_DECAY**step)
        evening = math.sqrt(1 - SECOND_DECAY**step)

        def part(values: torch.Tensor, piece: Piece) -> np.ndarray:
            values /= math.sqrt(self.unit)
            if block.name not in self._held:
                self._held[block.name] = values.new_zeros((3, block.grid.numel))
            delta, first, second = self._held[block.name][:, piece.start : piece.stop]
            if step == 1:
                delta += fold(values * column(self.start.tolist(), values))
            gradient = fold(values * column(self.at.of_vectors.tolist(), values))
            gradient += delta * float(self.at.of_delta)
            first.lerp_(gradient, 1 - FIRST_DECAY)
            second.mul_(SECOND_DECAY).addcmul_(gradient, gradient, value=1 - SECOND_DECAY)
            delta.addcdiv_(first, (second.sqrt() / evening).add_(TINY), value=-rate)
            wide = delta.to(torch.float64)
            return torch.cat([values.to(torch.float64) @ wide, (wide @ wide).reshape(1)]).cpu().numpy()

        return np.sum([np.zeros(len(self.gram) + 1), *block.deltas.sweep(part)], axis=0)

    def take(self, shares: Sequence[np.ndarray]) -> None:
        """The step is done on all tensors of the granule."""
        *inner, square = np.sum(shares, axis=0)
        self.inner, self.square = np.array(inner), np.asarray(square)
        self.taken += 1
        with np.errstate(all="ignore"):
            self.at = slope(self.gram, self.inner, self.square, self.settings.alpha)

    def finish(self) -> None:
        """Drop the moments, and give δ its own length back."""
        self.deltas = {name: held[0].mul(math.sqrt(self.unit)).cpu() for name, held in self._held.items()}
        self._held = {}

    def found(self) -> Found:
        """The record; its coefficients are those of the nearest point in the span."""
        nearest = np.linalg.pinv(self.gram, rcond=GONE, hermitian=True) @ self.inner
        return found(
            self.gram, self.unit, nearest, self.inner, float(self.square), self.first, self.settings.alpha
        )  # fmt: skip


def descend_by_adam(
    model: Model, groups: Mapping[str, Sequence[str]], runs: Mapping[str, Adam], settings: Settings
) -> None:
    """All steps, one granule after another; where every granule is one tensor, in a single pass over the model."""
    if not runs:
        return

    def alone(block: Block) -> None:
        run = runs.get(block.name)
        if run is not None:
            for _ in range(settings.steps):
                run.take([run.walk(block)])
            run.finish()

    if settings.granularity == "tensor":
        model.each(alone)
        return
    for granule, run in runs.items():
        for _ in range(settings.steps):
            run.take(_pass(model, run, groups[granule]))
        run.finish()


def _pass(model: Model, run: Adam, names: Sequence[str]) -> list[np.ndarray]:
    own = set(names)
    shares = model.each(lambda block: run.walk(block) if block.name in own else None)
    return [share for share in shares.values() if share is not None]
