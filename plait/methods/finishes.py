"""Δ → Δ': what is done to the one merged task vector before it is added to the base."""

from __future__ import annotations

from typing import Annotated

from plait.kernels.fused import described
from plait.lazy import torch
from plait.methods.block import Block
from plait.methods.contract import Range
from plait.methods.matrices import is_matrix, on_matrix, svd
from plait.methods.stream import Stream


def scale(block: Block, delta: Stream, *, lambda_: float = 1.0) -> Stream:
    """λ·Δ."""
    if lambda_ == 1:
        return delta
    return delta.map(lambda values: values * lambda_, fused=described(delta, scale=lambda_))


def svc(block: Block, delta: Stream, *, alpha: Annotated[float, Range(0, open_low=True)] | None = None) -> Stream:
    """Take back what the merge counted more than once, direction by direction (SVC, arXiv:2602.05536).

    Δ = U S Vᵀ; a_r = u_rᵀΔ is its response along u_r, a_ri = u_rᵀτ_i that of expert i, s_ri = ⟨a_r, a_ri⟩/‖a_ri‖². Then
    σ_r becomes σ_r·K/Σ_i max(α, s_ri). With α = 1 directions only shrink; below, those that the merge has weakened grow
    too, by at most 1/α. The default, 1/K, is that of the authors' runs. An expert with no response in a direction is
    counted neither in K nor in the sum there. Tensors that are no matrices stay as they are.
    """
    if not is_matrix(block.name, block.shape):
        return delta
    least = 1 / len(block.tasks) if alpha is None else alpha

    def calibrate(merged: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        u, s, v = svd(merged)
        counted, total = torch.zeros_like(s), torch.zeros_like(s)
        for matrix in matrices:
            response = u.T @ matrix.to(u.dtype)  # [r, n]
            size = response.square().sum(dim=1)
            answers = size > _SILENT**2 * s.square()
            along = s * (response * v.T).sum(dim=1) / torch.where(answers, size, 1)
            counted += answers
            total += torch.where(answers, along.clamp(min=least), 0)
        return (u * torch.where(counted > 0, s * counted / total.clamp(min=least), s)) @ v.T

    return on_matrix(block, calibrate, delta, block.deltas)


_SILENT = 1e-5
"""Share of a singular value of the merged task vector below which an expert's response is rounding noise."""

FINISHES = {"scale": scale, "svc": svc}


def add_base(block: Block, delta: Stream) -> Stream:
    """θ0 + Δ: the last step of every method on task vectors."""
    return delta.map(lambda values, base: base + values, block.base, fused=described(delta, on_base=True))
