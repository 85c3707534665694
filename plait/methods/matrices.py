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


def svd(matrix: torch.Tensor, beside: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[m, n] → u [m, r], s [r], v [n, r] in float64, largest first; r is the numerical rank.

    Noise is measured by the largest singular value, or by `beside`: the size of what the matrix is a remainder of.

    float32 goes through the Gram matrix of the shorter side in float64: its noise, 1e-8 of the largest singular value,
    lies below that of the numbers themselves, and it costs less than a decomposition in float32.
    """
    if matrix.dtype == torch.float64:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.T
    elif matrix.shape[0] < matrix.shape[1]:
        v, s, u = svd(matrix.T, beside)
        return u, s, v
    else:
        wide = matrix.to(torch.float64)
        v = torch.linalg.eigh(wide.T @ wide).eigenvectors.flip(-1)
        u = wide @ v
        s = u.norm(dim=0)
        u /= s.clamp(min=torch.finfo(s.dtype).tiny)
    rank = int(torch.count_nonzero(s > _NOISE[matrix.element_size()] * s.max().clamp(min=beside)))
    return u[:, :rank], s[:rank], v[:, :rank]


def orthogonal(vectors: torch.Tensor) -> torch.Tensor:
    """[m, r] float64 → its polar factor P Qᵀ (of P S Qᵀ): the nearest orthonormal columns, on the vectors' span.

    (xᵀx)^-½ is taken on the shorter side; directions in which the vectors cancel or repeat stay out.
    """
    if vectors.shape[0] < vectors.shape[1]:
        return orthogonal(vectors.T).T
    values, q = torch.linalg.eigh(vectors.T @ vectors)
    kept = values > _REPEATED * values[-1:]
    return vectors @ (q[:, kept] / values[kept].sqrt()) @ q[:, kept].T
