"""KnOTS (arXiv:2410.19735): experts put into one basis before they are merged. Meant for LoRA, good for all."""

from __future__ import annotations

from typing import Annotated, Literal

from plait.lazy import torch
from plait.methods import combines, finishes, transforms
from plait.methods.block import Block
from plait.methods.contract import PerModel, Range, merge_method
from plait.methods.matrices import is_matrix, on_matrix, svd
from plait.methods.stream import Stream

By = Literal["ties", "dare_ties", "linear"]
Kept = Annotated[float, Range(0, 1, open_low=True)]


def aligned(
    block: Block,
    deltas: Stream,
    *,
    by: By = "ties",
    weight: PerModel[float] = 1.0,
    density: PerModel[Kept] = 1.0,
    normalize: bool = True,
) -> Stream:
    """Merge task vectors in the basis of all of them: [τ_1 … τ_K] = U S [V_1ᵀ … V_Kᵀ], Δ = U S merge(V_1ᵀ, …, V_Kᵀ).

    `by` says how the V_k are merged: trim and elect (ties), drop and elect (dare_ties), or a weighted sum (linear, to
    which the basis makes no difference). Tensors that are no matrices are merged in the same way as they are.
    """

    def merge(block: Block, vectors: Stream) -> Stream:
        if by == "ties":
            vectors = transforms.trim(block, vectors, density=density)
        elif by == "dare_ties":
            vectors = transforms.drop(block, vectors, density=density)
        else:
            return combines.sum_(block, vectors, weight=weight, normalize=normalize)
        return combines.elect(block, vectors, weight=weight, normalize=normalize)

    if not is_matrix(block.name, block.shape):
        return merge(block, deltas)

    def in_one_basis(matrices: torch.Tensor) -> torch.Tensor:
        u, s, v = svd(torch.cat(tuple(matrices), dim=1))
        parts = [part.T.to(matrices.dtype).contiguous() for part in v.split(matrices.shape[2])]  # V_kᵀ, [r, n]
        inner = Block.of(parts, name=block.name, tasks=block.tasks, scope="tensor", seed=block.seed)
        return (u * s) @ inner.units(merge(inner, inner.models).gather()).to(u.dtype)

    return on_matrix(block, in_one_basis, deltas)


@merge_method("knots", paper="arXiv:2410.19735", whole_if=is_matrix, cost=175)
def knots(
    block: Block,
    *,
    by: By = "ties",
    weight: PerModel[float] = 1.0,
    density: PerModel[Kept] = 1.0,
    normalize: bool = True,
    lambda_: float = 1.0,
) -> Stream:
    """Put all task vectors into one basis (an SVD of them side by side), and merge there with TIES, DARE or a sum.

    `by: linear` is task arithmetic, whatever the basis; `density` is for ties (trim) and dare_ties (drop).
    """
    merged = aligned(block, block.deltas, by=by, weight=weight, density=density, normalize=normalize)
    return finishes.add_base(block, finishes.scale(block, merged, lambda_=lambda_))
