"""Matrices inside a checkpoint: which tensors are one, and their singular value decomposition without its null space.

One idea serves all spectral methods: directions whose singular value is rounding noise have no meaning, and whatever a
library returns for them would be blown up by the methods that raise small singular values. They are dropped at once.
"""

from __future__ import annotations

from collections.abc import Callable

from plait.lazy import torch
from plait.methods.block import Block
from plait.methods.combines import column
from plait.methods.stream import Stream
from plait.methods.transforms import fold

_LOOKUP = ("shared", "lm_head", "wte", "wpe", "relative_attention_bias", "relative_position_bias_table")
"""Names of tables, beside all that contain `embed`: their rows are looked up (or are words), not multiplied by."""
_NOISE = {4: 1e-5, 8: 1e-10}
"""Bytes of a number → share of the largest singular value below which one is noise."""
_REPEATED = 1e-10
"""Share of the largest eigenvalue of a Gram matrix below which directions count as one."""
_GUARD = 64
"""Eigenvectors in float32 that are taken beside those asked for: their errors are among neighbours."""
_SINGLE = 4e-4
"""Share of the largest eigenvalue of a Gram matrix above which float32 tells eigenvectors apart well enough."""
_SINGLE_NOISE = 1e-6
"""Share below which an eigenvalue in float32 may be zero."""
_NOTHING = 1e-12
"""Share of the largest squared singular value that counts as nothing left."""

Triplets = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]
"""u [m, r], s [r], v [n, r]."""


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a linear map: 2-D, or a kernel [out, in, height, width]; lookup tables are not."""
    if len(shape) not in (2, 4) or not all(shape):
        return False
    rest = shape[1] if len(shape) == 2 else shape[1] * shape[2] * shape[3]
    return shape[0] > 1 and rest > 1 and not any("embed" in part or part in _LOOKUP for part in name.split("."))


def on_matrix(block: Block, merge: Callable[..., torch.Tensor], *streams: Stream) -> Stream:
    """Lazily merge(matrix, …) of the streams' values as matrices [..., out, in], flat again; zeros stay zeros.

    The first stream decides: where all of it is zero (nothing was trained), nothing is computed.
    """
    assert len(block.grid) <= 1, f"{block.name}: this method needs the whole tensor in one piece"

    def whole(*values: torch.Tensor) -> torch.Tensor:
        if not values[0].any():
            return torch.zeros_like(values[0] if values[0].ndim == 1 else values[0][0])
        return merge(*(block.units(each) for each in values)).to(values[0].dtype).reshape(-1)

    first, *others = streams
    return first.map(whole, *others)


def mean(deltas: Stream, weights: list[float]) -> Stream:
    """Σ w_k τ_k / K: what spectral methods do with tensors that are no matrices."""
    return deltas.map(lambda values: fold(values * column(weights, values)) / len(weights))


def svd(matrix: torch.Tensor) -> Triplets:
    """[m, n] → u [m, r], s [r], v [n, r] in float64, largest first; r is the numerical rank.

    float32 goes through the Gram matrix of the shorter side in float64: its noise, 1e-8 of the largest singular value,
    lies below that of the numbers themselves, and it costs less than a decomposition in float32.
    """
    return largest(matrix, min(matrix.shape))


def largest(matrix: torch.Tensor, count: int, beside: float = 0.0) -> Triplets:
    """The `count` largest singular triplets, in float64; as few as there are above the noise.

    Noise is measured by the largest singular value, or by `beside`: the size of what the matrix is a remainder of.

    Few of many are looked for near the eigenvectors of the Gram matrix in float32, which take less than half the time,
    and are exact in float64 among those and `_GUARD` more. They are taken where the smallest singular value of them is
    at least 2 % of the largest, or where nothing is left beside them (LoRA); all else is decomposed in float64. What
    TSV-M makes of them is 1.1e-3 from float64 in the worst case measured, and 7e-5 on experts of a ViT-S.
    """
    if matrix.dtype == torch.float64:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        u, s, v = u[:, :count].clone(), s[:count], vh.T[:, :count].clone()  # a view would keep all of them in memory
    elif matrix.shape[0] < matrix.shape[1]:
        v, s, u = largest(matrix.T, count, beside)
    else:
        few = 0 < count <= matrix.shape[1] // 2 - _GUARD
        found = _near_float32(matrix, count) if few else None
        u, s, v = _by_gram(matrix.to(torch.float64), count) if found is None else found
    rank = int(torch.count_nonzero(s > _NOISE[matrix.element_size()] * s[:1].sum().clamp(min=beside)))
    return u[:, :rank], s[:rank], v[:, :rank]


def _near_float32(matrix: torch.Tensor, count: int) -> Triplets | None:
    """`largest` of [m ≥ n] by way of float32; None where that is not accurate."""
    values, vectors = torch.linalg.eigh(gram(matrix / matrix.abs().max().clamp(min=torch.finfo(matrix.dtype).tiny)))
    near = bool(values[-count] >= _SINGLE * values[-1])
    if not near and values[-count] > _SINGLE_NOISE * values[-1]:
        return None
    wide = matrix.to(torch.float64)
    basis = torch.linalg.qr(vectors[:, -(count + _GUARD) :].to(torch.float64)).Q
    u, s, q = _by_gram(wide @ basis, count + _GUARD)
    if not near and wide.square().sum() - s.square().sum() > _NOTHING * s[0].square():
        return None
    return u[:, :count].clone(), s[:count], basis @ q[:, :count]


def _by_gram(wide: torch.Tensor, count: int) -> Triplets:
    """The `count` largest triplets of [m ≥ n] float64."""
    v = torch.linalg.eigh(gram(wide)).eigenvectors.flip(-1)[:, :count]
    u = wide @ v
    s = u.norm(dim=0)
    u /= s.clamp(min=torch.finfo(s.dtype).tiny)
    return u, s, v


def polar(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[m, n] = U S Vᵀ → U Vᵀ over the singular values above the noise, and these, in float64."""
    if matrix.dtype == torch.float64:
        u, s, v = svd(matrix)
        return u @ v.T, s
    if matrix.shape[0] < matrix.shape[1]:
        factor, s = polar(matrix.T)
        return factor.T, s
    wide = matrix.to(torch.float64)
    inverse, s = whitening(wide)
    return wide @ inverse, s


def gram(vectors: torch.Tensor) -> torch.Tensor:
    """[m, n] → vectorsᵀ·vectors, [n, n]: its lower triangle, which `eigh` reads; what lies above may be anything.

    In strips, as torch has no product that leaves out the other triangle: 5/8 of the work.
    """
    count = vectors.shape[1]
    result = vectors.new_zeros(count, count)
    strip = max(-(-count // 4), 1)
    for first in range(0, count, strip):
        own = slice(first, first + strip)
        torch.mm(vectors[:, first:].T, vectors[:, own], out=result[first:, own])
    return result


def whitening(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[m, r] float64 → (xᵀx)^-½ [r, r], and the singular values that are not zero.

    x (xᵀx)^-½ is the polar factor P Qᵀ (of P S Qᵀ): the nearest orthonormal columns, on the vectors' span. Directions
    in which the vectors cancel or repeat stay out.
    """
    values, q = torch.linalg.eigh(gram(vectors))
    kept = values > _REPEATED * values[-1:]
    sizes = values[kept].sqrt()
    return (q[:, kept] / sizes) @ q[:, kept].T, sizes
