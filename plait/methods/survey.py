"""Passes over the whole model that some methods need before any tensor can be merged.

A survey is given `each`, which runs a function on every merged tensor's block (in any order, on any thread) and
returns the results in canonical (name) order, and the parameters of every tensor. Its result is the blocks' `state`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from plait.errors import RecipeError
from plait.lazy import torch
from plait.methods.block import Block, per_model
from plait.methods.select import Cut, Histograms, count_of, equal_counts
from plait.methods.transforms import fold

R = TypeVar("R")


class Model(Protocol):
    """All tensors that will be merged."""

    def each(self, fn: Callable[[Block], R]) -> dict[str, R]:
        """fn of every block, by tensor name, in sorted order of the names."""
        ...

    def total(self, fn: Callable[[Block], torch.Tensor]) -> torch.Tensor:
        """Sum of fn over all blocks, kept in one tensor. fn gives whole numbers, so that the order is free, and leaves
        nothing behind, so that it may run in other processes (that of `each` runs in this one)."""
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

    high = model.total(lambda block: block.deltas.total(lambda values: Histograms.high(values.abs())))
    if high.ndim < 2:
        return None  # every tensor is empty
    numel = int(high[0].sum())
    search = Histograms([[count_of(d, numel)] for d in per_model(densities, len(high))], numel)
    search.choose(high)
    cuts = search.cuts(model.total(lambda block: block.deltas.total(lambda values: search.low(values.abs()))))
    per_tensor = _spread_equals(model, cuts)

    def votes(block: Block) -> torch.Tensor:
        def count(values: torch.Tensor, piece: Any) -> torch.Tensor:
            for k, (cut,) in enumerate(per_tensor[block.name]):
                cut.keep_(values[k], piece)
            return torch.sign(fold(values)).sum(dtype=torch.float64)

        return torch.stack([torch.zeros((), dtype=torch.float64), *block.deltas.sweep(count)]).sum()

    return TrimState(per_tensor, -1 if float(model.total(votes)) < 0 else 1)


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
        for k, row in enumerate(own):
            for c, cut in enumerate(row):
                cut.before.append(running[k][c])
        result[name] = own
    return result
