"""Means on the sphere, and the other merges that are weighted sums with weights read off the vectors' angles.

One idea serves all: these methods never leave the span of the vectors, so one sweep for their Gram matrix (float64)
gives coefficients, and the merge is a weighted sum with them. No iteration ever touches the tensors again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from plait.lazy import np, torch
from plait.methods.block import Block, per_model
from plait.methods.combines import column
from plait.methods.contract import PerModel, Range, merge_method
from plait.methods.finishes import add_base
from plait.methods.stream import Piece, Stream
from plait.methods.transforms import fold

Positive = Annotated[float, Range(0, open_low=True)]


def gram(vectors: Stream, count: int) -> np.ndarray:
    """Inner products of a stream of `count` vectors [K, n], summed in float64: [K, K]."""

    def part(values: torch.Tensor) -> torch.Tensor:
        values = values.to(torch.float64)
        return values @ values.T

    total = vectors.total(part)
    return total.cpu().numpy() if total.ndim else np.zeros((count, count))


def weighted(vectors: Stream, coefficients: list[float]) -> Stream:
    """Σ c_k v_k."""
    return vectors.map(lambda values: fold(values * column(coefficients, values)))


def origin(block: Block) -> tuple[Stream, bool]:
    """Task vectors where there is a base (the sphere's centre), else the weights themselves."""
    has_base = block.read_base is not None
    return (block.deltas if has_base else block.models), has_base


def arc(t: float, cosine: float, threshold: float) -> tuple[float, float]:
    """Weights of the two ends of a great circle at share t; linear where |cos| > threshold."""
    if abs(cosine) > threshold:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def cosine_of(g: np.ndarray, floor: float = 0.0) -> float:
    """cos of the angle between the two vectors of a 2×2 Gram matrix; a norm of at most `floor` counts as 1."""
    a, b = (math.sqrt(x) if math.sqrt(x) > floor else 1.0 for x in (g[0, 0], g[1, 1]))
    return max(-1.0, min(1.0, g[0, 1] / (a * b)))


@merge_method("slerp", paper="Shoemake 1985", experts=(1, 1), cost=2.5)
def slerp(block: Block, *, t: Annotated[float, Range(0, 1)]) -> Stream:
    """Go the share `t` of the way from the base to the other model along the great circle of the flattened tensors.

    (sin((1−t)θ)·θ0 + sin(tθ)·θ1)/sin θ with θ the angle between the weights; linear where |cos θ| > 0.9995.
    """
    both = Stream(block.grid, lambda piece: torch.stack([block.base(piece), block.models(piece)[0]]))
    return weighted(both, list(arc(t, cosine_of(gram(both, 2), 1e-8), 0.9995)))


def by_rows(params: Mapping[str, Any]) -> bool:
    """Whether nuslerp's parameters make every row a vector of its own."""
    return not params.get("nuslerp_flatten", True) and not params.get("nuslerp_row_wise", False)


@merge_method("nuslerp", paper="mergekit", base="optional", experts=(2, 2), row_scope_if=by_rows, cost=2.5)
def nuslerp(
    block: Block, *, weight: PerModel[float] = 1.0, nuslerp_flatten: bool = True, nuslerp_row_wise: bool = False
) -> Stream:
    """Spherical interpolation of two models, or of two task vectors where there is a base; t = w_2/(w_1 + w_2).

    Flattened by default. With `nuslerp_flatten: false` every row (last axis) is a vector of its own, or with
    `nuslerp_row_wise: true` every column (first axis), as in mergekit, whose option names these are.
    """
    vectors, has_base = origin(block)
    merged = interpolate(
        block, vectors, weight=weight, nuslerp_flatten=nuslerp_flatten, nuslerp_row_wise=nuslerp_row_wise
    )
    return add_base(block, merged) if has_base else merged


def interpolate(
    block: Block,
    vectors: Stream,
    *,
    weight: PerModel[float] = 1.0,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Stream:
    """The arc between two vectors [2, n], at t = w_2/(w_1 + w_2)."""
    weights = per_model(weight, 2)
    total = sum(weights)
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    if nuslerp_flatten or len(block.shape) < 2:
        return weighted(vectors, list(_nuslerp_arc(t, gram(vectors, 2))))
    if nuslerp_row_wise:
        return _slerp_columns(block, vectors, t)
    return vectors.map(lambda values: _slerp_rows(block.rows(values), t).reshape(-1))


_COLLINEAR = math.sqrt(1 - 1e-16)


def _nuslerp_arc(t: float, g: np.ndarray) -> tuple[float, float]:
    norms = [max(math.sqrt(g[0, 0]), 1e-7), max(math.sqrt(g[1, 1]), 1e-7)]
    return arc(t, max(-1.0, min(1.0, g[0, 1] / (norms[0] * norms[1]))), _COLLINEAR)


def _arc_tensor(t: float, aa: torch.Tensor, bb: torch.Tensor, ab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`arc` for many pairs at once, from their float64 inner products."""
    cosine = (ab / (aa.sqrt().clamp(min=1e-7) * bb.sqrt().clamp(min=1e-7))).clamp(-1, 1)
    straight = cosine.abs() > _COLLINEAR
    angle = torch.acos(torch.where(straight, torch.zeros_like(cosine), cosine))
    first = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / torch.sin(angle))
    second = torch.where(straight, t, torch.sin(t * angle) / torch.sin(angle))
    return first, second


def _slerp_rows(rows: torch.Tensor, t: float) -> torch.Tensor:
    """[2, rows, columns] → [rows, columns]."""
    a, b = rows.to(torch.float64)
    first, second = _arc_tensor(t, (a * a).sum(-1), (b * b).sum(-1), (a * b).sum(-1))
    dtype = rows.dtype
    return rows[0] * first.to(dtype).unsqueeze(-1) + rows[1] * second.to(dtype).unsqueeze(-1)


def _slerp_columns(block: Block, vectors: Stream, t: float) -> Stream:
    width = block.grid.numel // block.shape[0] if block.shape[0] else 1

    def where(piece: Piece, device: torch.device) -> torch.Tensor:
        return torch.arange(piece.start, piece.stop, device=device) % width

    def part(values: torch.Tensor, piece: Piece) -> torch.Tensor:
        a, b = values.to(torch.float64)
        sums = torch.zeros((3, width), dtype=torch.float64, device=values.device)
        return sums.index_add_(1, where(piece, values.device), torch.stack([a * a, b * b, a * b]))

    sums = None
    for piece in vectors.grid:
        found = part(vectors(piece), piece)
        sums = found if sums is None else sums + found
    if sums is None:
        return vectors.map(lambda values: values[0])
    first, second = _arc_tensor(t, *sums)

    def merge(values: torch.Tensor, piece: Piece) -> torch.Tensor:
        at = where(piece, values.device)
        return values[0] * first.to(values.dtype)[at] + values[1] * second.to(values.dtype)[at]

    return vectors.map_pieces(merge)


@merge_method("multislerp", paper="mergekit", base="optional", cost=2.5)
def multislerp(
    block: Block, *, weight: PerModel[float] = 1.0, normalize_weights: bool = True, eps: Positive = 1e-8
) -> Stream:
    """Barycentric interpolation on the sphere around the base (or the origin), at the weighted mean direction.

    The vectors are projected into the tangent space at the normalised mean of their directions, averaged there, and
    mapped back; the length is the weighted mean of their lengths. A tensor that fine-tuning left unchanged in one
    expert has no direction there and counts with length 0; one that no expert changed stays the base's.
    """
    vectors, has_base = origin(block)
    merged = barycentre(block, vectors, weight=weight, normalize_weights=normalize_weights, eps=eps)
    return add_base(block, merged) if has_base else merged


def barycentre(
    block: Block,
    vectors: Stream,
    *,
    weight: PerModel[float] = 1.0,
    normalize_weights: bool = True,
    eps: Positive = 1e-8,
) -> Stream:
    """Weighted mean of directions [K, n] in the tangent space at their mean, with the weighted mean length."""
    weights = np.array(per_model(weight, len(block.tasks)), dtype=np.float64)
    g = gram(vectors, len(weights))
    norms = np.sqrt(np.diag(g))
    if normalize_weights:
        weights = weights / weights.sum()
    if len(weights) == 1:
        coefficients = np.ones(1)
    elif not norms.any():
        coefficients = np.zeros(len(weights))
    else:
        coefficients = _tangent_mean(g, norms, weights, eps)
    return weighted(vectors, coefficients.tolist())


def _tangent_mean(g: np.ndarray, norms: np.ndarray, weights: np.ndarray, eps: float) -> np.ndarray:
    """Coefficients of the stored vectors; everything is in the basis of their unit vectors u_k = v_k/(‖v_k‖ + ε)."""
    units = norms + eps
    cosines = g / np.outer(units, units)
    mean_norm = math.sqrt(max(weights @ cosines @ weights, 0.0))
    if mean_norm < eps:
        return weights  # antipodal: no direction to speak of, so stay linear
    mean = weights / mean_norm
    dots = cosines @ mean
    tangent = weights - (weights @ dots) * mean
    tangent_norm = math.sqrt(max(tangent @ cosines @ tangent, 0.0)) + eps
    point = mean * math.cos(tangent_norm) + tangent * (math.sin(tangent_norm) / tangent_norm)
    return point * float(weights @ norms) / units


@merge_method("karcher", paper="arXiv:2603.04972", base="unused", cost=2.5)
def karcher(block: Block, *, max_iter: Annotated[int, Range(1)] = 10, tol: Positive = 1e-5) -> Stream:
    """Karcher (Fréchet) mean of the models' directions on the sphere, with their mean length; all weights equal.

    Riemannian gradient descent: m ← exp_m(mean of log_m(u_k)), from the normalised Euclidean mean, until the step is
    shorter than `tol`.
    """
    return frechet(block, block.models, max_iter=max_iter, tol=tol)


def frechet(block: Block, vectors: Stream, *, max_iter: Annotated[int, Range(1)] = 10, tol: Positive = 1e-5) -> Stream:
    """Karcher mean of the directions of vectors [K, n], with their mean length."""
    g = gram(vectors, len(block.tasks))
    norms = np.sqrt(np.diag(g))
    return weighted(vectors, _karcher_coefficients(g, norms, max_iter, tol).tolist())


def _karcher_coefficients(g: np.ndarray, norms: np.ndarray, max_iter: int, tol: float) -> np.ndarray:
    valid = norms > tol
    result = np.zeros(len(norms))
    if not valid.any():
        return result
    cosines = g[np.ix_(valid, valid)] / np.outer(norms[valid], norms[valid])
    share = 1 / int(valid.sum())
    mean = np.full(int(valid.sum()), share)
    length = math.sqrt(max(mean @ cosines @ mean, 0.0))
    mean = np.eye(len(mean))[0] if length < tol else mean / length
    for _ in range(max_iter):
        tangent = np.zeros_like(mean)
        for k, dot in enumerate(np.clip(cosines @ mean, -1, 1)):
            angle = math.acos(dot)
            if angle >= tol:
                tangent += share * (angle / math.sin(angle)) * (np.eye(len(mean))[k] - dot * mean)
        step = math.sqrt(max(tangent @ cosines @ tangent, 0.0))
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) * tangent / step
        mean /= math.sqrt(mean @ cosines @ mean)
    result[valid] = mean / norms[valid] * float(norms.mean())
    return result


@merge_method(
    "model_stock",
    paper="arXiv:2403.19522",
    experts=(2, None),
    row_scope_if=lambda params: params.get("filter_wise", False),
    cost=2.5,
)
def model_stock(block: Block, *, filter_wise: bool = False) -> Stream:
    """Pull the experts' mean towards the base by their mean pairwise angle (Model Stock, eq. 4 and 7).

    t = K·cos θ / (1 + (K−1)·cos θ), θ̂ = t·mean_k θ_k + (1−t)·θ0, with cos θ the mean cosine of the task vectors, per
    tensor or with `filter_wise` per row. Where the denominator vanishes, the base stays.
    """
    deltas, count = block.deltas, len(block.tasks)
    if filter_wise and len(block.shape) > 1:
        return add_base(block, deltas.map(lambda values: _stock_rows(block.rows(values)).reshape(-1)))
    g = gram(deltas, count)
    norms = np.sqrt(np.diag(g))
    pairs = [
        max(-1.0, min(1.0, g[i, j] / (norms[i] * norms[j]))) if norms[i] * norms[j] > 0 else 0.0
        for i in range(count)
        for j in range(i + 1, count)
    ]
    cosine = sum(pairs) / len(pairs)
    below = 1 + (count - 1) * cosine
    t = 0.0 if abs(below) < 1e-6 else count * cosine / below
    return add_base(block, weighted(deltas, [t / count] * count))


def _stock_rows(rows: torch.Tensor) -> torch.Tensor:
    """[K, rows, columns] → the merged task vector [rows, columns]."""
    count = rows.shape[0]
    wide = rows.to(torch.float64)
    norms = wide.square().sum(-1).sqrt()
    cosine = torch.zeros_like(norms[0])
    for i in range(count):
        for j in range(i + 1, count):
            product = norms[i] * norms[j]
            dot = (wide[i] * wide[j]).sum(-1)
            cosine += torch.where(product > 0, dot / torch.where(product > 0, product, 1.0), 0.0).clamp(-1, 1)
    cosine /= count * (count - 1) / 2
    below = 1 + (count - 1) * cosine
    singular = below.abs() < 1e-6
    t = torch.where(singular, 0.0, count * cosine / torch.where(singular, 1.0, below))
    return fold(rows) * (t / count).to(rows.dtype).unsqueeze(-1)


COMBINES = {"nuslerp": interpolate, "multislerp": barycentre, "karcher": frechet}
"""Those of them that a recipe may put behind transforms of its own."""
