"""What sets the experts apart in one tensor: which form it is stored in, and the numbers in that form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.methods.block import Block
from plait.methods.matrices import svd
from plait.methods.routed import EmrRoute, MlpRoute, SmileRoute, TallRoute, TwinRoute
from plait.routing.stores import Store, ranks_for

_SMALL: Any = {"int8": "float16", "int4": "float16"}
"""Vectors are never packed: they are few numbers, and norms feel every bit."""


@dataclass(frozen=True)
class Looked:
    """What one pass over a tensor has found."""

    changed: bool
    """Whether any expert differs from the base."""
    sums: tuple[Tensor, Tensor] | None = None
    """EMR: Σ|τ_k| and Σ|M_k τ_u|, [K] float64."""
    ranks: tuple[int, ...] = ()
    """Twin by energy: what every expert needs."""


def look(block: Block, shared: Tensor | None, route: Any) -> Looked:
    """One pass: `shared` is the merged tensor [n] where exclusive knowledge is measured against it."""
    deltas = block.deltas.gather()
    if not torch.count_nonzero(deltas):
        return Looked(False)
    if isinstance(route, EmrRoute):
        unified = elected(deltas)
        masked = (deltas * unified > 0) * unified
        return Looked(True, (deltas.double().abs().sum(1), masked.double().abs().sum(1)))
    if isinstance(route, TwinRoute) and route.energy is not None and shared is not None and len(block.shape) == 2:
        own = block.base.gather() + deltas - shared
        return Looked(True, None, tuple(_rank_of(row.view(block.shape), route.energy) for row in own))
    return Looked(True)


def _rank_of(matrix: Tensor, energy: float) -> int:
    _, sizes, _ = svd(matrix)
    squares = sizes.double().square().cumsum(0)
    if not len(squares) or float(squares[-1]) == 0:
        return 1
    return int((squares < energy * squares[-1]).sum()) + 1


def form(block: Block, linear: bool, route: Any, looked: Looked) -> Store:
    """How a tensor's experts are stored."""
    count, shape, n = len(block.tasks), block.shape, block.grid.numel
    precision = route.precision
    if isinstance(route, (EmrRoute, TallRoute)):
        return Store("masked", shape, count, _SMALL.get(precision, precision) if len(shape) < 2 else precision)
    if not linear or len(shape) != 2:
        return Store("dense", shape, count, _SMALL.get(precision, precision))
    if isinstance(route, SmileRoute):
        return Store("low_rank", shape, count, precision, ranks=ranks_for(shape, count, route.rank, 0))
    if isinstance(route, TwinRoute):
        if route.keep == "svd":
            ranks = looked.ranks or ranks_for(shape, count, route.rank, route.ratio)
            return Store("low_rank", shape, count, precision, ranks=ranks)
        if route.keep == "bernoulli":
            kept = tuple(int(flags.sum()) for flags in drawn(block, route.ratio))
            return Store("pruned", shape, count, precision, counts=kept)
        return Store("pruned", shape, count, precision, counts=(_share(n, route.ratio),) * count)
    assert isinstance(route, MlpRoute)
    if route.density < 1:
        return Store("pruned", shape, count, precision, counts=(_share(n, route.density),) * count)
    return Store("dense", shape, count, precision)


def parts_of(
    block: Block, store: Store, shared: Tensor | None, route: Any, scale: Tensor | None
) -> Mapping[str, Tensor]:
    """The numbers of one tensor's experts, by the names that its store gives them."""
    vectors = block.deltas.gather()
    if isinstance(route, EmrRoute):
        assert scale is not None
        unified = elected(vectors)
        return {"unified": unified, "bits": vectors * unified > 0, "scale": scale}
    if isinstance(route, TallRoute):
        total = vectors.sum(0)
        return {
            "unified": total, "bits": vectors.abs() >= route.threshold * (total - vectors).abs(),
            "scale": torch.ones(len(vectors)),
        }  # fmt: skip
    if isinstance(route, TwinRoute):
        assert shared is not None
        vectors = block.base.gather() + vectors - shared
    if store.kind == "low_rank":
        pairs = [_factors(row.view(block.shape), rank) for row, rank in zip(vectors, store.ranks, strict=True)]
        return {"down": torch.cat([down for down, _ in pairs]), "up": torch.cat([up for _, up in pairs])}
    if store.kind == "pruned":
        random = isinstance(route, TwinRoute) and route.keep == "bernoulli"
        if random:
            bits = drawn(block, route.ratio).to(vectors.device)
            vectors = vectors / route.ratio
        else:
            bits = torch.stack([_largest(row, count) for row, count in zip(vectors, store.counts, strict=True)])
        return {"values": torch.cat([row[kept] for row, kept in zip(vectors, bits, strict=True)]), "bits": bits}
    return {"values": vectors}


def elected(deltas: Tensor) -> Tensor:
    """EMR's τ_u = γ ε: the sign of Σ τ, the largest magnitude among those that have it. [K, n] → [n]."""
    sign = torch.sign(deltas.sum(0))
    return sign * torch.where(deltas * sign > 0, deltas.abs(), torch.zeros_like(deltas)).amax(0)


def scales(looks: Mapping[str, Looked], sizes: Mapping[str, int], route: EmrRoute, experts: int) -> Tensor:
    """EMR's s_k = Σ|τ_k| / Σ|M_k τ_u|, [K]; 1 for an expert that equals the base."""
    above, below = torch.zeros(experts, dtype=torch.float64), torch.zeros(experts, dtype=torch.float64)
    for name in sorted(looks):
        sums = looks[name].sums
        if sums is not None:
            share = 1.0 if route.rescale == "model" else 1.0 / sizes[name]
            above += sums[0].cpu() * share
            below += sums[1].cpu() * share
    return torch.where(below > 0, above / below.clamp_min(1e-300), torch.ones_like(below)).float()


def drawn(block: Block, density: float) -> Tensor:
    """Which entries of every expert stay, [K, n], each with probability `density`."""
    piece = next(iter(block.grid))
    return torch.stack([block.uniform(k, piece) < density for k in range(len(block.tasks))])


def _factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Vᵀ [rank, n] and (U S)ᵀ [rank, m]; rows of zeros where the matrix has fewer directions."""
    u, s, v = svd(matrix)
    kept = min(rank, len(s))
    down, up = matrix.new_zeros(rank, matrix.shape[1]), matrix.new_zeros(rank, matrix.shape[0])
    down[:kept] = v.T[:kept].to(matrix.dtype)
    up[:kept] = (u * s).T[:kept].to(matrix.dtype)
    return down, up


def _largest(values: Tensor, count: int) -> Tensor:
    """Flags of the `count` largest magnitudes; of equal ones the first."""
    flags = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    flags[torch.sort(values.abs(), descending=True, stable=True).indices[:count]] = True
    return flags


def _share(n: int, density: float) -> int:
    return min(n, max(1, round(density * n)))
