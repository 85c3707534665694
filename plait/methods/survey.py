"""Passes over the whole model that some methods need before any tensor can be merged.

A survey is given `each`, which runs a function on every merged tensor's block (in any order, on any thread) and
returns the results in canonical (name) order, and the parameters of every tensor. Its result is the blocks' `state`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from plait.errors import RecipeError
from plait.methods.block import Block, per_model
from plait.methods.select import Cut, Histograms, count_of, equal_counts
from plait.methods.transforms import fold

R = TypeVar("R")


class Model(Protocol):
    """All tensors that will be merged."""

    def each(self, fn: Callable[[Block], R]) -> dict[str, R]:
        """fn of every block, by tensor name, in sorted order of the names."""
        ...

    @property
    def params(self) -> Mapping[str, Mapping[str, Any]]:
        """Keyword arguments of the method, per tensor name."""
        ...


@dataclass
class TrimState:
    """Whole-model trim: per tensor and expert where to cut, and the majority sign of the merged vector."""

    cuts: Mapping[str, Sequence[Sequence[Cut]]]
    majority: int = 1


def survey_trim(model: Model) -> TrimState | None:
    """One threshold per expert over all tensors (TIES, the paper's trim), exact, in two sweeps of the model.

    Equal magnitudes are kept in sorted order of tensor names, then by position. A further sweep takes the majority
    sign that entries whose elected sign is zero get in the authors' code.
    """
    names = sorted(model.params)
    if not names or model.params[names[0]].get("trim", "tensor") != "model":
        return None
    densities = _one_density(model.params)

    def high(block: Block) -> tuple[int, torch.Tensor]:
        total = block.deltas.total(lambda values: Histograms.high(values.abs()))
        return block.grid.numel, total.cpu()

    found = model.each(high)
    numel = sum(count for count, _ in found.values())
    tasks = next((total.shape[0] for _, total in found.values() if total.ndim == 2), 0)
    if not tasks:
        return None
    search = Histograms([[count_of(d, numel)] for d in per_model(densities, tasks)], numel)
    search.choose(sum_of([total for _, total in found.values() if total.ndim == 2]))
    lows = model.each(lambda block: block.deltas.total(lambda values: search.low(values.abs())).cpu())
    cuts = search.cuts(sum_of([low for low in lows.values() if low.ndim == 3]))
    per_tensor = _spread_equals(model, cuts)

    def votes(block: Block) -> torch.Tensor:
        def count(values: torch.Tensor, piece: Any) -> torch.Tensor:
            for k, (cut,) in enumerate(per_tensor[block.name]):
                values[k] *= cut.mask(values[k].abs(), piece)
            return torch.sign(fold(values)).sum(dtype=torch.float64).cpu()

        return sum_of([torch.zeros((), dtype=torch.float64), *block.deltas.sweep(count)])

    majority = float(sum_of(list(model.each(votes).values())))
    return TrimState(per_tensor, -1 if majority < 0 else 1)


def sum_of(parts: list[torch.Tensor]) -> torch.Tensor:
    """Sum in the order given."""
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


def _one_density(params: Mapping[str, Mapping[str, Any]]) -> Any:
    values = {name: given.get("density", 1.0) for name, given in params.items()}
    first = next(iter(values.values()))
    for name, value in values.items():
        if value != first:
            raise RecipeError(
                f"density: trim: model takes one density per model, but '{name}' has {value} and others {first}; "
                "use trim: tensor with gradients and filters"
            )
    return first


def _spread_equals(model: Model, cuts: list[list[Cut]]) -> dict[str, list[list[Cut]]]:
    """Give every tensor its own cuts; where a cut falls among equals, count them tensor by tensor, piece by piece."""
    if all(cut.quota >= cut.equals for row in cuts for cut in row):
        return dict.fromkeys(model.params, cuts)
    counted = model.each(lambda block: block.deltas.sweep(lambda values, _: equal_counts(values.abs(), cuts)))
    result = {}
    running = [[0] * len(row) for row in cuts]
    for name, pieces in counted.items():
        own = [[Cut(cut.bits, cut.quota, cut.equals) for cut in row] for row in cuts]
        for counts in pieces:
            for k, row in enumerate(own):
                for c, cut in enumerate(row):
                    cut.before.append(running[k][c])
                    running[k][c] += counts[k][c]
        result[name] = own
    return result
