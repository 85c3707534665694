"""{τ'_k} → Δ: how K vectors become one.

Every combine takes the block and a stream of vectors [K, n] (task vectors, or weights where there is no base) and gives
a stream [n].
"""

from __future__ import annotations

from plait.kernels import job as J
from plait.kernels.fused import described
from plait.lazy import torch
from plait.methods.block import Block, per_model
from plait.methods.contract import PerModel
from plait.methods.stream import Stream
from plait.methods.sums import totals
from plait.methods.transforms import elected_sign, fold


def sum_(block: Block, vectors: Stream, *, weight: PerModel[float] = 1.0, normalize: bool = False) -> Stream:
    """Σ w_k v_k, divided by Σ w_k with `normalize`."""
    weights = per_model(weight, len(block.tasks))
    divisor = sum(weights)
    plain = all(w == 1 for w in weights)

    def add(values: torch.Tensor) -> torch.Tensor:
        result = fold(values if plain else values * column(weights, values))
        return result / divisor if normalize else result

    fused = described(vectors, combine=J.SUM, weights=weights, normalize=normalize, divisor=divisor)
    return vectors.map(add, fused=fused)


def elect(block: Block, vectors: Stream, *, weight: PerModel[float] = 1.0, normalize: bool = True) -> Stream:
    """Elect a sign for every entry, then add up the experts that have it (TIES, arXiv:2306.01708, steps 2 and 3).

    γ = sign(Σ w_k v_k); the result is Σ w_k v_k over the k whose entry has sign γ, divided by their Σ w_k with
    `normalize` (the paper's disjoint mean). Where Σ w_k v_k = 0 the sign is + (mergekit), or with `trim: model` the
    majority sign of the whole model (the authors' code).
    """
    weights = per_model(weight, len(block.tasks))
    zero_is_positive = getattr(block.state, "majority", 1) >= 0

    def merge(values: torch.Tensor) -> torch.Tensor:
        scales = column(weights, values)
        values = values * scales
        sign = elected_sign(values, zero_is_positive)
        # Arithmetic instead of boolean masks, which cost several times as much: what agrees is positive after × sign.
        agreeing = values.mul_(sign).clamp_(min=0)
        result = fold(agreeing) * sign
        if not normalize:
            return result
        divisor = fold(torch.sign(agreeing) * scales)
        return result / divisor.add_((divisor == 0).to(divisor.dtype))

    fused = described(vectors, combine=J.ELECT, weights=weights, normalize=normalize, zero_is_positive=zero_is_positive)
    return vectors.map(merge, fused=fused)


def sce(block: Block, vectors: Stream) -> Stream:
    """Weight each expert by its mean squared task vector, and drop minority signs (SCE, arXiv:2408.07990).

    w_k = mean(τ_k²) / Σ_j mean(τ_j²) per tensor; Δ = Σ w_k τ_k / Σ w_k over the k with the elected sign.
    """
    n = max(vectors.grid.numel, 1)
    energy = [total / n for total in totals(block, vectors, J.SQUARE)]
    whole = sum(energy)
    weights = [part / whole for part in energy] if whole > 0 else [1 / len(block.tasks)] * len(block.tasks)

    def merge(values: torch.Tensor) -> torch.Tensor:
        sign = elected_sign(values)
        agreeing = (values * sign).clamp_(min=0)
        scales = column(weights, values)
        return fold(agreeing * scales) * sign / fold(torch.sign(agreeing) * scales).clamp(min=1e-6)

    return vectors.map(merge, fused=described(vectors, combine=J.SCE, weights=weights))


def column(weights: list[float], values: torch.Tensor) -> torch.Tensor:
    """[K] numbers as [K, 1], to multiply [K, n] with."""
    return torch.tensor(weights, dtype=values.dtype, device=values.device).unsqueeze(1)


COMBINES = {"sum": sum_, "elect": elect, "sce": sce}
