"""τ_k → τ'_k: what is done to each task vector before they are combined.

Every transform takes the block and a stream of task vectors [K, n] and gives a stream of the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from plait.kernels import job as J
from plait.kernels.fused import Fused, described
from plait.lazy import torch
from plait.methods.block import Block, per_model
from plait.methods.contract import Fraction, PerModel, Range
from plait.methods.select import count_of, largest, largest_share
from plait.methods.stream import Piece, Stream
from plait.methods.sums import totals


def trim(
    block: Block,
    deltas: Stream,
    *,
    density: PerModel[Fraction] = 1.0,
    rescale: bool = False,
    trim: Literal["tensor", "model"] = "tensor",
) -> Stream:
    """Keep the `density` share of largest magnitude of every task vector (TIES, arXiv:2306.01708, step 1).

    `trim: tensor` takes the share of every tensor (mergekit, PEFT); `trim: model` finds one threshold per expert over
    all merged tensors (the paper and its code). Exactly ⌊density·n⌋ are kept; among equals the lowest position first.
    """
    densities = per_model(density, len(block.tasks))
    if trim == "model" and block.state is not None:
        cuts = block.state.cuts[block.name]
    elif all(d >= 1 for d in densities):
        return deltas
    else:
        counts = [[count_of(d, deltas.grid.numel)] for d in densities]
        cuts = largest(deltas, counts, deltas.grid.numel)

    def keep(values: torch.Tensor, piece: Piece) -> torch.Tensor:
        for k, (cut,) in enumerate(cuts):
            cut.keep_(values[k], piece)
        return values

    trimmed = deltas.map_pieces(keep, fused=described(deltas, sparsify=J.CUT, cuts=cuts))
    return match_l1(block, deltas, trimmed) if rescale else trimmed


def drop(
    block: Block,
    deltas: Stream,
    *,
    density: PerModel[Annotated[float, Range(0, 1, open_low=True)]] = 1.0,
    rescale: bool = True,
    rescale_by: Literal["density", "l1"] = "density",
) -> Stream:
    """Keep each entry with probability `density` (DARE, arXiv:2311.03099).

    With `rescale`, what is kept is multiplied by 1/density (the paper), or so that each tensor's L1 norm is as before
    (`rescale_by: l1`, what mergekit does). Draws are keyed by (seed, tensor, task, position).
    """
    densities = per_model(density, len(block.tasks))
    if all(d >= 1 for d in densities):
        return deltas
    by_density = rescale and rescale_by == "density"

    def keep(values: torch.Tensor, piece: Piece) -> torch.Tensor:
        for k, d in enumerate(densities):
            if d < 1:
                values[k] *= block.uniform(k, piece).to(values.device) < d
                if by_density:
                    values[k] /= d
        return values

    fused = described(deltas, sparsify=J.DROP, densities=densities, divide=by_density)
    dropped = deltas.map_pieces(keep, fused=fused)
    return match_l1(block, deltas, dropped) if rescale and not by_density else dropped


def outliers(
    block: Block,
    deltas: Stream,
    *,
    density: PerModel[Fraction] = 1.0,
    gamma: PerModel[Fraction] = 0.01,
    rescale: bool = False,
) -> Stream:
    """Drop the `gamma` share of largest magnitude, then the smallest, so that `density` stays.

    Model Breadcrumbs (arXiv:2312.06795), as mergekit parametrises it. Where density + gamma > 1 fewer outliers go.
    At least one entry of a tensor is kept, so that small tensors do not lose their task vector.
    """
    k_tasks, n = len(block.tasks), deltas.grid.numel
    densities, gammas = per_model(density, k_tasks), per_model(gamma, k_tasks)
    if all(d >= 1 for d in densities):
        return deltas
    counts = []
    for d, g in zip(densities, gammas, strict=True):
        kept = n if d >= 1 else count_of(d, n)
        top = 0 if d >= 1 else min(int(g * n), n - kept)
        counts.append([top, top + kept])
    cuts = largest(deltas, counts, n)

    def keep(values: torch.Tensor, piece: Piece) -> torch.Tensor:
        for k, (top, bottom) in enumerate(cuts):
            largest_ones = values[k].clone()
            top.keep_(largest_ones, piece)
            bottom.keep_(values[k], piece)
            values[k] -= largest_ones
        return values

    kept = deltas.map_pieces(keep, fused=described(deltas, sparsify=J.CUT, cuts=cuts))
    return match_l1(block, deltas, kept) if rescale else kept


def magprune(
    block: Block,
    deltas: Stream,
    *,
    density: PerModel[Fraction] = 1.0,
    epsilon: PerModel[Fraction] = 0.15,
    rescale: bool = True,
) -> Stream:
    """Keep entries at random, the larger of a row the more likely (DELLA, arXiv:2406.11617).

    An entry of rank r (0 = smallest magnitude) among the c of its row (first axis) is kept with probability
    density − ε + 2ε·r/(c−1); one-dimensional tensors are one row; among equals the lower position ranks higher. With
    `rescale` each tensor's L1 norm is as before, as in mergekit (the paper divides by the probability).
    """
    k_tasks = len(block.tasks)
    densities, epsilons = per_model(density, k_tasks), per_model(epsilon, k_tasks)
    if all(d >= 1 for d in densities):
        return deltas

    def keep(values: torch.Tensor, piece: Piece) -> torch.Tensor:
        for k, (d, e) in enumerate(zip(densities, epsilons, strict=True)):
            if d >= 1:
                continue
            if d <= 0:
                values[k] = 0
                continue
            size = block.units(values[k].abs())
            order = torch.argsort(size, dim=-1, descending=True, stable=True)
            places = torch.arange(size.shape[-1], device=size.device).expand_as(order)
            from_top = torch.empty_like(order).scatter_(-1, order, places)
            last = size.shape[-1] - 1
            share = (last - from_top).to(torch.float64) / last if last else torch.full_like(size, 0.5)
            chance = ((d - e) + share * 2 * e).reshape(-1)
            values[k] *= block.uniform(k, piece).to(values.device) < chance
        return values

    kept = deltas.map_pieces(keep, fused=_masked(block, deltas, densities, epsilons))
    return match_l1(block, deltas, kept) if rescale else kept


_RANKED = 1 << 16
"""Entries of a row up to which the loops rank, in a few times its memory."""


def _masked(block: Block, deltas: Stream, densities: Sequence[float], epsilons: Sequence[float]) -> Fused | None:
    """What `magprune` keeps, as bits: the ranks of a row are found once, though the tensor is gone through again."""
    if deltas.fused is None or not deltas.fused.plain or block.raw is None or any(d <= 0 for d in densities):
        return None
    width = block.grid.numel // block.shape[0] if len(block.shape) > 1 and block.shape[0] else block.grid.numel
    if width > _RANKED:
        return None
    masks, sums = block.raw.worker.prune(deltas.fused, max(width, 1), densities, epsilons)
    return described(deltas, sparsify=J.MASKED, masks=masks, masked=[d < 1 for d in densities], sums=sums)


def consensus(
    block: Block,
    deltas: Stream,
    *,
    mu: Annotated[float, Range(0)] = 0.6,
    votes: Annotated[int, Range(1)] = 2,
) -> Stream:
    """Keep the entries that matter to at least `votes` experts (Consensus TA with TALL masks, arXiv:2405.07813).

    Entry i matters to expert k when |τ_k| ≥ μ·|τ_mt − τ_k|, where τ_mt = Σ τ; entries that fewer need are dropped
    from all experts, as selfish or useless.
    """

    def keep(values: torch.Tensor) -> torch.Tensor:
        together = fold(values)
        matters = values.abs() >= mu * (together - values).abs()
        return values * (matters.sum(0) >= votes)

    return deltas.map(keep, fused=described(deltas, sparsify=J.CONSENSUS, mu=mu, votes=votes))


def spread(block: Block, deltas: Stream, *, select_topk: Fraction = 1.0) -> Stream:
    """Keep the `select_topk` share of entries whose variance across the experts is largest (SCE, arXiv:2408.07990).

    The share is of the entries with any variance; among equals the lowest position first.
    """
    if select_topk >= 1:
        return deltas
    variance = deltas.map(_variance, fused=described(deltas, sparsify=J.SPREAD))
    cut = largest_share(variance, select_topk, deltas.grid.numel)
    return deltas.map_pieces(
        lambda values, piece: values * cut.mask(_variance(values)[0], piece),
        fused=described(deltas, sparsify=J.SPREAD, cuts=[[cut]]),
    )


def agree(block: Block, deltas: Stream) -> Stream:
    """Keep the entries whose sign is the elected one, the sign of Σ τ_k (TIES' election without its mean).

    With `trim` before it this gives the vectors of AdaMerging++ (arXiv:2310.02575).
    """
    fused = described(deltas, sparsify=J.AGREE)
    return deltas.map(lambda values: values * (values * elected_sign(values) > 0), fused=fused)


def elected_sign(values: torch.Tensor, zero_is_positive: bool = True) -> torch.Tensor:
    """[K, n] → [n]: +1 or −1, the sign of the sum over the experts."""
    total = fold(values)
    sign = torch.copysign(torch.ones_like(total), total)
    # A sum that cancels is +0; −0 only comes of entries that are all −0, which count for nothing either way.
    return sign if zero_is_positive else sign.masked_fill_(total == 0, -1)


def _variance(values: torch.Tensor) -> torch.Tensor:
    """[K, n] → [1, n], population variance over the experts."""
    spread = values - fold(values) / len(values)
    return (fold(spread * spread) / len(values)).unsqueeze(0)


def match_l1(block: Block, before: Stream, after: Stream) -> Stream:
    """Scale each task vector of `after` [K, n] so that its L1 norm over the tensor is that of `before`."""
    sums = after.fused.sums if after.fused is not None else ()
    sums = sums or zip(totals(block, before, J.ABSOLUTE), totals(block, after, J.ABSOLUTE), strict=True)
    factors = [1.0 if whole < 1e-7 or kept < 1e-7 else whole / kept for whole, kept in sums]
    return after.map(
        lambda values: values * torch.tensor(factors, dtype=values.dtype, device=values.device).unsqueeze(1),
        fused=described(after, factors=factors),
    )


def fold(values: torch.Tensor) -> torch.Tensor:
    """Sum over the experts, one after another in canonical order: the same rounding at every position."""
    result = values[0].clone()
    for row in values[1:]:
        result += row
    return result


TRANSFORMS = {
    "trim": trim,
    "drop": drop,
    "outliers": outliers,
    "magprune": magprune,
    "consensus": consensus,
    "spread": spread,
    "agree": agree,
}
