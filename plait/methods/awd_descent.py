"""The descent of AWD on inner products alone; no tensor is touched here.

Loss and gradient depend on the task vectors τ_k only through G_ij = ⟨τ_i, τ_j⟩, and on the redundant vector δ through
⟨τ_k, δ⟩ and ⟨δ, δ⟩. Gradient descent that starts in the span of the τ_k stays there, δ = Σ c_k τ_k, so it runs on the
K numbers c: exact at any size of model. All granules go down together, in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from plait.lazy import np
from plait.methods.granules import Granularity

GONE = 1e-12
"""A squared length that is a smaller share of those it was computed from is rounding, and counts as zero."""
NEARLY_ORTHOGONAL = 0.05
"""Mean |cos| below which there is nothing to disentangle."""
RISE = 0.05
"""A loss may end so much higher and not count as diverged: steps of fixed length jump about the kinks of |cos|."""
SANE = 2.0
"""Greatest |1 − multiplier| of an expert, and greatest ‖δ‖ in lengths of a task vector, of a descent that went well."""


@dataclass(frozen=True)
class Settings:
    """How δ is looked for. The fields are the parameters of `awd`."""

    granularity: Granularity
    optimizer: Literal["gd", "adam"]
    init: Literal["zeros", "mean"]
    alpha: float
    beta: float
    steps: int
    scale: Literal["relative", "paper"]


@dataclass(frozen=True)
class Slope:
    """Loss and gradient at one δ, for one granule or for several at once (leading axes)."""

    loss: np.ndarray
    cosine: np.ndarray
    """Mean |cos(τ_i − δ, τ_j − δ)| over the pairs."""
    of_vectors: np.ndarray
    """[..., K]: ∇L = Σ_k of_vectors_k τ_k + of_delta·δ."""
    of_delta: np.ndarray


@dataclass(frozen=True)
class Found:
    """What the descent found for one granule."""

    coefficients: tuple[float, ...]
    """c of δ = Σ c_k τ_k; with Adam, which leaves the span, of the point of the span nearest to δ."""
    cosine_before: float
    cosine_after: float
    loss_first: float
    loss_last: float
    norm: float
    """Mean ‖τ_k‖; 0 where no expert differs from the base."""
    length: float
    """‖δ‖ over the mean ‖τ_k‖."""

    @property
    def multipliers(self) -> tuple[float, ...]:
        """1 − K c_k: what merging with equal weights makes of each expert's own weight."""
        return tuple(1 - len(self.coefficients) * c for c in self.coefficients)

    @property
    def diverged(self) -> bool:
        """The loss ended above its start, or the cosines rose while δ outgrew the task vectors."""
        outgrown = self.length > SANE or any(abs(1 - m) > SANE for m in self.multipliers)
        return self.loss_last > self.loss_first + RISE or (outgrown and self.cosine_after > self.cosine_before)


def unit_of(gram: np.ndarray, settings: Settings) -> np.ndarray:
    """[..., K, K] → [...]: the squared length that counts as one: their mean, or 1 with `scale: paper`."""
    mean = np.diagonal(gram, axis1=-2, axis2=-1).mean(-1)
    return np.where((mean > 0) & (settings.scale == "relative"), mean, 1.0)


def start_of(gram: np.ndarray, settings: Settings) -> np.ndarray:
    """[..., K, K] → [..., K]: coefficients of the first δ. One expert shares nothing, so its δ is zero."""
    count = gram.shape[-1]
    mean = 0.0 if settings.init == "zeros" or count == 1 else 1 / count
    return times(span_of(gram), np.full(gram.shape[:-1], mean))


def span_of(gram: np.ndarray) -> np.ndarray:
    """[..., K, K] → [..., K, K]: the projection of coefficients on those that make a difference to Σ c_k τ_k.

    Where task vectors depend on each other (duplicates, zeros, scalars) all others would drift, by rounding alone.
    """
    values, vectors = np.linalg.eigh(gram)
    kept = values > GONE * values.max(-1, keepdims=True)
    return (vectors * kept[..., None, :]) @ np.swapaxes(vectors, -2, -1)


def times(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """[..., K, K] times [..., K], added up in one order."""
    return (matrix * vector[..., None, :]).sum(-1)


def products(gram: np.ndarray, coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """⟨τ_k, δ⟩ [..., K] and ⟨δ, δ⟩ [...] of δ = Σ c_k τ_k."""
    inner = times(gram, coefficients)
    return inner, (coefficients * inner).sum(-1)


def slope(gram: np.ndarray, inner: np.ndarray, square: np.ndarray, alpha: float) -> Slope:
    """Loss and gradient from G [..., K, K], ⟨τ_k, δ⟩ [..., K] and ⟨δ, δ⟩ [...] (AWD, arXiv:2411.18729).

    L = mean over i ≠ j of |cos(v_i, v_j)| + α‖δ‖ with v_k = τ_k − δ. The sub-gradient 0 is taken at the kinks: at
    cos = 0, at δ = 0, and for a v_k that is zero, whose cosines count as 0.
    """
    count = gram.shape[-1]
    own = np.diagonal(gram, axis1=-2, axis2=-1)
    square = np.maximum(square, 0.0)[..., None]
    left = gram - inner[..., :, None] - inner[..., None, :] + square[..., None]  # ⟨v_i, v_j⟩
    lengths = np.diagonal(left, axis1=-2, axis2=-1)
    there = lengths > GONE * (own + square)
    inverse = np.where(there, 1 / np.sqrt(np.where(there, lengths, 1.0)), 0.0)
    cosines = left * inverse[..., :, None] * inverse[..., None, :] * (1 - np.eye(count))
    signs = np.sign(cosines) / max(count * (count - 1), 1)
    mean = (signs * cosines).sum((-2, -1))
    pull = 2 * inverse * ((signs * inverse[..., None, :]).sum(-1) - (signs * cosines).sum(-1) * inverse)
    norm = np.sqrt(square[..., 0])
    long = square[..., 0] > GONE * own.mean(-1)
    shrink = np.where(long, alpha / np.where(long, norm, 1.0), 0.0)
    return Slope(mean + alpha * norm, mean, -pull, pull.sum(-1) + shrink)


def descend(gram: np.ndarray, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Gradient descent in the span, for granules [P, K, K] in units of their own: coefficients [P, K], first loss [P].

    δ ← δ − β∇L is c ← c − β·(of_vectors + of_delta·c).
    """
    c, span = start_of(gram, settings), span_of(gram)
    first = slope(gram, *products(gram, c), settings.alpha).loss
    with np.errstate(all="ignore"):  # a descent that runs away is refused by its result
        for _ in range(settings.steps):
            at = slope(gram, *products(gram, c), settings.alpha)
            c = times(span, c - settings.beta * (at.of_vectors + at.of_delta[:, None] * c))
    return c, first


def found(
    gram: np.ndarray, unit: float, coefficients: np.ndarray, inner: np.ndarray, square: float, first: float,
    alpha: float,
) -> Found:  # fmt: skip
    """The record of one granule, from its Gram matrix in its unit (a squared length) and where δ ended."""
    with np.errstate(all="ignore"):
        before = slope(gram, np.zeros(len(gram)), np.zeros(()), alpha)
        after = slope(gram, inner, np.asarray(square), alpha)
    typical = float(np.sqrt(np.diagonal(gram)).mean())
    return Found(
        coefficients=tuple(coefficients.tolist()),
        cosine_before=float(before.cosine),
        cosine_after=float(after.cosine),
        loss_first=float(first),
        loss_last=float(after.loss),
        norm=typical * math.sqrt(unit),
        length=float(np.sqrt(max(square, 0.0))) / typical if typical else 0.0,
    )
