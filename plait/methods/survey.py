"""Passes over the whole model that some methods need before any tensor can be merged.

A survey is given `each`, which runs a function on every merged tensor's block (in any order, on any thread) and
returns the results in canonical (name) order, and the parameters of every tensor. Its result is the blocks' `state`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from plait.errors import RecipeError
from plait.kernels import job as J
from plait.kernels import selection
from plait.kernels.fused import described
from plait.lazy import torch
from plait.methods.block import Block, per_model
from plait.methods.select import Cut, Histograms, count_of, equal_counts, trivial
from plait.methods.transforms import fold

R = TypeVar("R")


class Model(Protocol):
    """All tensors that will be merged."""

    def each(self, fn: Callable[[Block], R]) -> dict[str, R]:
        """fn of every block, by tensor name, in sorted order of the names."""
        ...

    def total(self, fn: Callable[[Block], torch.Tensor]) -> torch.Tensor:
        """Sum of fn over all blocks, kept in one tensor. fn gives whole numbers, so that the order is free."""
        ...

    @property
    def numel(self) -> int:
        """Entries of all blocks."""
        ...

    @property
    def memory(self) -> int:
        """Bytes that the merge may use."""
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

    per_tensor = _by_tally(model, densities) or _by_histogram(model, densities)
    if per_tensor is None:
        return None  # every tensor is empty

    def votes(block: Block) -> torch.Tensor:
        def count(values: torch.Tensor, piece: Any) -> torch.Tensor:
            for k, (cut,) in enumerate(per_tensor[block.name]):
                cut.keep_(values[k], piece)
            return torch.sign(fold(values)).sum(dtype=torch.float64)

        return torch.stack([torch.zeros((), dtype=torch.float64), *block.deltas.sweep(count)]).sum()

    def balance(block: Block) -> int:
        trimmed = described(block.deltas, sparsify=J.CUT, cuts=per_tensor[block.name])
        if trimmed is None or block.raw is None:
            return int(votes(block))
        return sum(block.raw.worker.votes(trimmed, piece) for piece in block.grid)

    return TrimState(per_tensor, -1 if sum(model.each(balance).values()) < 0 else 1)


def _by_tally(model: Model, densities: Any) -> dict[str, list[list[Cut]]] | None:
    """The cuts by two passes of compiled loops, or None where they cannot."""
    rate = selection.rate_of(model.numel)
    sampled = model.each(lambda block: selection.sample_of(block, rate))
    samples = [found for found in sampled.values() if found is not None]
    if not samples or len(samples) < len(sampled):
        return None
    tasks = max(len(found.sizes) for found in samples)
    if not selection.fits(model.numel, tasks, min(selection.KEPT, model.memory // 2)):
        return None
    counts = [count_of(d, model.numel) for d in per_model(densities, tasks)]
    bounds = selection.bounds_of(samples, counts, model.numel)
    tallied = model.each(lambda block: selection.tally_of(block, bounds))
    if None in tallied.values():
        return None
    cuts: list[Cut] = []
    for k, wanted in enumerate(counts):
        if not 0 < wanted < model.numel:
            cuts.append(trivial(wanted))
            continue
        rows = [found[k] for found in tallied.values() if found]
        located = selection.locate(rows, wanted - sum(row.above for row in rows))
        if located is None:
            return None
        cuts.append(Cut(*located))
    result: dict[str, list[list[Cut]]] = {}
    running = [0] * len(cuts)
    for name, found in tallied.items():
        own = [[Cut(cut.bits, cut.quota, cut.equals)] for cut in cuts]
        for k, ((cut,), row) in enumerate(zip(own, found or (), strict=False)):
            if cut.quota < cut.equals:
                cut.before = [running[k] + count for count in selection.before(row, cut.bits)]
                running[k] = cut.before[-1]
        result[name] = own
    return result


def _by_histogram(model: Model, densities: Any) -> dict[str, list[list[Cut]]] | None:
    """The cuts by two histograms; None where every tensor is empty."""
    high = model.total(lambda block: block.deltas.total(lambda values: Histograms.high(values.abs())))
    if high.ndim < 2:
        return None
    search = Histograms([[count_of(d, model.numel)] for d in per_model(densities, len(high))], model.numel)
    search.choose(high)
    cuts = search.cuts(model.total(lambda block: block.deltas.total(lambda values: search.low(values.abs()))))
    return _spread_equals(model, cuts)


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
