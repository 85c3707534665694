"""Merges of task vectors by their singular values: TSV-M, Iso-C and Iso-CTS.

Matrices (`matrices.is_matrix`) are merged as wholes, in float64 but for how an expert's largest directions are found
(`matrices.largest`); of everything else the experts' mean is taken. All end in: scale by lambda, add the base.
Directions that no expert has moved stay unmoved, and so do tensors.

How far they are from float64 throughout, by the norm of the merged task vector, is in docs/performance.md: on experts
of a ViT-S TSV-M 7e-5, Iso-CTS 3e-6, Iso-C 8e-8.
"""

from __future__ import annotations

from plait.lazy import torch
from plait.methods import finishes
from plait.methods.block import Block, per_model
from plait.methods.contract import Fraction, PerModel, merge_method
from plait.methods.matrices import Triplets, is_matrix, largest, mean, on_matrix, polar, whitening
from plait.methods.stream import Stream


def singular_vectors(block: Block, deltas: Stream, *, weight: PerModel[float] = 1.0) -> Stream:
    """Give every expert an equal share of the directions, and make all of them orthogonal (TSV-M, arXiv:2412.00081).

    U_k S_k V_kᵀ = w_k τ_k, cut to the ⌊min(m, n)/K⌋ largest (at least one); with U, S, V side by side over the experts
    and polar(P S Qᵀ) = P Qᵀ, Δ = polar(U) diag(S) polar(V)ᵀ.
    """
    weights = per_model(weight, len(block.tasks))
    if not is_matrix(block.name, block.shape):
        return mean(deltas, weights)

    def merge(matrices: torch.Tensor) -> torch.Tensor:
        u, s, v = _side_by_side(_shares(matrices, weights))
        return u @ ((whitening(u)[0] * s) @ whitening(v)[0]) @ v.T

    return on_matrix(block, merge, deltas)


def singular_parts(block: Block, deltas: Stream) -> Stream:
    """What each expert gives to TSV-M, [K, n] → [K, n]: polar(U)_k diag(S_k) polar(V)_kᵀ, whose sum is TSV-M's Δ.

    The parts of a matrix are orthogonal to each other from both sides. Of everything else: τ_k/K.
    """
    count = len(block.tasks)
    if not is_matrix(block.name, block.shape):
        return deltas.map(lambda values: values / count)

    def split(values: torch.Tensor) -> torch.Tensor:
        if not values.any():
            return values
        shares = _shares(block.units(values), [1.0] * count)
        u, s, v = _side_by_side(shares)
        sizes = [len(own) for _, own, _ in shares]
        u, v = u @ (whitening(u)[0] * s), v @ whitening(v)[0]
        pairs = zip(u.split(sizes, dim=1), v.split(sizes, dim=1), strict=True)
        return torch.stack([left @ right.T for left, right in pairs]).to(values.dtype).reshape(count, -1)

    return deltas.map(split)


def _shares(matrices: torch.Tensor, weights: list[float]) -> list[Triplets]:
    """Every expert's largest singular triplets, an equal number of each."""
    share = max(min(matrices.shape[1:]) // len(matrices), 1)
    return [largest(w * matrix, share) for w, matrix in zip(weights, matrices, strict=True)]


def isotropic(block: Block, deltas: Stream, *, weight: PerModel[float] = 1.0) -> Stream:
    """Replace every singular value of Σ w_k τ_k by their mean (Iso-C, arXiv:2502.04959).

    The mean is over the singular values that are not zero: the sum of them stays, and directions that nobody trained
    (there are such where all experts are LoRA) are not made up.
    """
    weights = per_model(weight, len(block.tasks))
    if not is_matrix(block.name, block.shape):
        return mean(deltas, weights)

    def merge(matrices: torch.Tensor) -> torch.Tensor:
        factor, s = polar(_sum(matrices, weights))
        return s.mean() * factor if len(s) else factor

    return on_matrix(block, merge, deltas)


def isotropic_shared(block: Block, deltas: Stream, *, weight: PerModel[float] = 1.0, common: Fraction = 0.8) -> Stream:
    """Iso-C on the directions that the experts share, and on some of each expert's own (Iso-CTS, arXiv:2502.04959).

    Of r = min(m, n) directions the share `common` are the largest of Σ w_k τ_k, with left vectors U_c. Each expert adds
    the largest (1 − common)·r/K of w_k τ_k − U_c U_cᵀ w_k τ_k. All are made orthogonal, as in TSV-M, and get the mean
    of their singular values. (1 − common)·r/K is rounded, and the common ones are the rest of r (the authors' code).
    """
    weights = per_model(weight, len(block.tasks))
    if not is_matrix(block.name, block.shape):
        return mean(deltas, weights)

    def merge(matrices: torch.Tensor) -> torch.Tensor:
        rank, count = min(matrices.shape[1:]), len(matrices)
        own = min(round((rank - int(rank * common)) / count), rank // count)
        parts = [largest(_sum(matrices, weights), rank - own * count)]
        if own:
            weighed = [w * matrix for w, matrix in zip(weights, matrices, strict=True)]
            parts += _own_parts(weighed, parts[0][0], own)
        u, s, v = _side_by_side(parts)
        return s.mean() * (u @ (whitening(u)[0] @ whitening(v)[0]) @ v.T) if len(s) else torch.zeros_like(matrices[0])

    return on_matrix(block, merge, deltas)


def _sum(matrices: torch.Tensor, weights: list[float]) -> torch.Tensor:
    """[K, m, n] → Σ w_k τ_k, [m, n], in canonical order."""
    result = weights[0] * matrices[0]
    for w, matrix in zip(weights[1:], matrices[1:], strict=True):
        result += w * matrix
    return result


def _own_parts(matrices: list[torch.Tensor], shared: torch.Tensor, count: int) -> list[Triplets]:
    """The `count` largest triplets of every matrix − u_c u_cᵀ matrix, [m, n], u_c [m, r] orthonormal.

    Where m ≤ n, they are those of pᵀ matrix, p the m − r directions beside u_c: few.
    """
    sizes = [float(torch.linalg.vector_norm(matrix, dtype=shared.dtype)) for matrix in matrices]
    rows, columns = matrices[0].shape
    if rows > columns:
        near = shared.to(matrices[0].dtype)
        rests = (matrix - near @ (near.T @ matrix) for matrix in matrices)
        return [largest(rest, count, size) for rest, size in zip(rests, sizes, strict=True)]
    outside = torch.linalg.qr(shared, mode="complete").Q[:, shared.shape[1] :]
    rests = ((outside.T @ matrix.to(shared.dtype)).to(matrix.dtype) for matrix in matrices)
    found = [largest(rest, count, size) for rest, size in zip(rests, sizes, strict=True)]
    return [(outside @ u, s, v) for u, s, v in found]


def _side_by_side(parts: list[Triplets]) -> Triplets:
    us, values, vs = zip(*parts, strict=True)
    return torch.cat(us, dim=1), torch.cat(values), torch.cat(vs, dim=1)


def _finish(block: Block, delta: Stream, lambda_: float) -> Stream:
    return finishes.add_base(block, finishes.scale(block, delta, lambda_=lambda_))


@merge_method("tsv_m", paper="arXiv:2412.00081", whole_if=is_matrix, cost=87)
def tsv_m(block: Block, *, weight: PerModel[float] = 1.0, lambda_: float = 1.0) -> Stream:
    """Cut every expert's matrices to a share of their singular vectors, make all orthogonal to each other, add up.

    The share of an expert is ⌊min(m, n)/K⌋ of the largest. λ = 1 is the paper's. Tensors that are no matrices (biases,
    norms, embeddings) are θ0 + λ·mean_k τ_k.
    """
    return _finish(block, singular_vectors(block, block.deltas, weight=weight), lambda_)


@merge_method("iso_c", paper="arXiv:2502.04959", whole_if=is_matrix, cost=25)
def iso_c(block: Block, *, weight: PerModel[float] = 1.0, lambda_: float = 1.3) -> Stream:
    """Add the task vectors up and make all singular values of the sum equal.

    λ is over the sum, not the mean: the paper's best are about 1.3 to 1.5. Tensors that are no matrices (biases, norms,
    embeddings) are θ0 + λ·mean_k τ_k.
    """
    return _finish(block, isotropic(block, block.deltas, weight=weight), lambda_)


@merge_method("iso_cts", paper="arXiv:2502.04959", whole_if=is_matrix, cost=65)
def iso_cts(block: Block, *, weight: PerModel[float] = 1.0, common: Fraction = 0.8, lambda_: float = 1.3) -> Stream:
    """As iso_c, but a share of the directions, 1 − `common`, is given to what each expert has for itself.

    `common: 1` is iso_c. λ is over the sum: the paper's best are about 1.3 to 1.5. Tensors that are no matrices
    (biases, norms, embeddings) are θ0 + λ·mean_k τ_k.
    """
    return _finish(block, isotropic_shared(block, block.deltas, weight=weight, common=common), lambda_)


COMBINES = {"tsv_m": singular_vectors, "iso_c": isotropic, "iso_cts": isotropic_shared}
