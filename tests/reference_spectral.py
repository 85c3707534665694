"""Slow, plain reference implementations of the spectral merging methods.

Everything here is float64 numpy, written from the equations. Nothing of Plait is imported, and no torch. Conventions
are those of `reference.py`; matrices are [out, in]. A singular value below `NULL` of the largest one counts as zero,
and its directions as absent: that is the one convention the equations leave open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from reference import Array, Weight, _weights, combine_sum, combine_ties, task_vectors, trim

NULL = 1e-5
Merge = Callable[[list[Array]], Array]


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Two axes, both longer than 1 (a kernel of four axes is folded by its first)."""
    return len(shape) in (2, 4) and shape[0] > 1 and int(np.prod(shape[1:])) > 1


def thin(a: Array, beside: float = 0.0) -> tuple[Array, Array, Array]:
    """U, S, V of the non-zero singular values."""
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    kept = s > NULL * max(float(s[0]), beside)
    return u[:, kept], s[kept], vt[kept].T


def polar(a: Array) -> Array:
    """P Qᵀ of a = P S Qᵀ over the non-zero singular values."""
    p, _, q = thin(a)
    return p @ q.T


def _spectral(base: Array, models: Sequence[Array], weight: Weight, lambda_: float, merge: Merge) -> Array:
    taus = [w * t for w, t in zip(_weights(weight, len(models)), task_vectors(base, models), strict=True)]
    if not is_matrix(base.shape):
        return base + lambda_ * np.sum(taus, axis=0) / len(taus)
    folded = [t.reshape(base.shape[0], -1) for t in taus]
    if not any(t.any() for t in folded):
        return base.copy()
    return base + lambda_ * merge(folded).reshape(base.shape)


def tsv_m(base: Array, models: Sequence[Array], weight: Weight = None, lambda_: float = 1.0) -> Array:
    """Δ = polar([U_1 … U_K]) diag(S_1 … S_K) polar([V_1 … V_K])ᵀ, each cut to ⌊min(m, n)/K⌋ triplets."""

    def merge(taus: list[Array]) -> Array:
        share = max(1, min(taus[0].shape) // len(taus))
        us, ss, vs = [], [], []
        for tau in taus:
            if tau.any():
                u, s, v = thin(tau)
                us.append(u[:, :share])
                ss.append(s[:share])
                vs.append(v[:, :share])
        return polar(np.hstack(us)) @ np.diag(np.concatenate(ss)) @ polar(np.hstack(vs)).T

    return _spectral(base, models, weight, lambda_, merge)


def iso_c(base: Array, models: Sequence[Array], weight: Weight = None, lambda_: float = 1.3) -> Array:
    """Δ = mean(S)·U Vᵀ of U S Vᵀ = Σ τ_k."""

    def merge(taus: list[Array]) -> Array:
        u, s, v = thin(np.sum(taus, axis=0))
        return s.mean() * u @ v.T

    return _spectral(base, models, weight, lambda_, merge)


def iso_cts(
    base: Array, models: Sequence[Array], weight: Weight = None, common: float = 0.8, lambda_: float = 1.3
) -> Array:
    """Top directions of Σ τ_k, then of every τ_k without them; polar factors; one singular value for all, the mean."""

    def merge(taus: list[Array]) -> Array:
        r, count = min(taus[0].shape), len(taus)
        own = min(round((r - int(r * common)) / count), r // count)
        u, s, v = (x[..., : r - own * count] for x in thin(np.sum(taus, axis=0)))
        us, ss, vs = [u], [s], [v]
        for tau in taus:
            left = tau - u @ (u.T @ tau)
            size = float(np.linalg.norm(tau))
            if np.linalg.norm(left) > NULL * size:
                a, b, c = thin(left, size)
                us.append(a[:, :own])
                ss.append(b[:own])
                vs.append(c[:, :own])
        return np.concatenate(ss).mean() * polar(np.hstack(us)) @ polar(np.hstack(vs)).T

    return _spectral(base, models, weight, lambda_, merge)


def wudi(
    base: Array, models: Sequence[Array], steps: int = 300, lr: float = 0.015, lr_absolute: float | None = None
) -> Array:
    """Adam on Σ_k ‖(x − τ_k) τ_kᵀ‖²/‖τ_k‖² from x = Σ τ_k, its gradient written out expert by expert."""
    taus = task_vectors(base, models)
    if len(base.shape) != 2 or not is_matrix(base.shape):
        return base + np.sum(taus, axis=0) / len(taus)
    x = np.sum(taus, axis=0)
    rate = lr * float(np.sqrt((x**2).mean())) if lr_absolute is None else lr_absolute
    tiny = 1e-8 * float(np.sqrt(np.mean(np.square(taus))))  # Adam's constant, in units of the task vectors
    m, v = np.zeros_like(x), np.zeros_like(x)
    for step in range(1, steps + 1):
        g = sum(2 * (x - tau) @ tau.T @ tau / (tau**2).sum() for tau in taus if tau.any())
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        x = x - rate * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + tiny)
    return base + x


def wudi_ridge(base: Array, models: Sequence[Array], ridge: float) -> Array:
    """The minimum of Σ_k ‖(x − τ_k) τ_kᵀ‖²/‖τ_k‖² + c ‖x − Σ τ_k‖², row by row as least squares."""
    taus = [tau for tau in task_vectors(base, models) if tau.any()]
    total = np.sum(taus, axis=0)
    read = [tau / np.sqrt((tau**2).sum()) for tau in taus]
    c = ridge * sum((part**2).sum() for part in read) / base.shape[1]
    stacked = np.vstack([*read, np.sqrt(c) * np.eye(base.shape[1])])
    rows = []
    for i in range(base.shape[0]):
        wanted = [part @ tau[i] for part, tau in zip(read, taus, strict=True)]
        rows.append(np.linalg.lstsq(stacked, np.concatenate([*wanted, np.sqrt(c) * total[i]]), rcond=None)[0])
    return base + np.stack(rows)


def knots(
    base: Array,
    models: Sequence[Array],
    weight: Weight = None,
    density: float = 1.0,
    by: str = "ties",
    normalize: bool = True,
    lambda_: float = 1.0,
) -> Array:
    """[τ_1 … τ_K] = U S [V_1ᵀ … V_Kᵀ]; Δ = U S merge(V_kᵀ), by TIES or by a weighted sum."""

    def merge(vectors: list[Array]) -> Array:
        nothing = np.zeros_like(vectors[0])
        if by == "linear":
            return combine_sum(nothing, vectors, weight, normalize, 1.0)
        return combine_ties(nothing, [trim(x, density) for x in vectors], weight, normalize, 1.0)

    taus = task_vectors(base, models)
    if not is_matrix(base.shape):
        return base + lambda_ * merge(taus)
    folded = [t.reshape(base.shape[0], -1) for t in taus]
    u, s, _ = thin(np.hstack(folded))
    parts = [np.diag(1 / s) @ u.T @ tau for tau in folded]  # V_kᵀ, and exactly zero where τ_k is
    return base + lambda_ * (u @ np.diag(s) @ merge(parts)).reshape(base.shape)


def svc(delta: Array, taus: Sequence[Array], alpha: float | None = None) -> Array:
    """σ_r ← σ_r·K/Σ_i max(α, ⟨u_rᵀΔ, u_rᵀτ_i⟩/‖u_rᵀτ_i‖²); who does not respond along u_r is not counted."""
    if not is_matrix(delta.shape) or not delta.any():
        return delta.copy()
    least = 1 / len(taus) if alpha is None else alpha
    folded = delta.reshape(delta.shape[0], -1)
    u, s, v = thin(folded)
    result = np.zeros_like(folded)
    for r in range(len(s)):
        merged = u[:, r] @ folded
        found = []
        for tau in taus:
            response = u[:, r] @ tau.reshape(folded.shape)
            if np.linalg.norm(response) > NULL * s[r]:
                found.append(max(least, float(merged @ response / (response @ response))))
        gamma = len(found) / sum(found) if found else 1.0
        result += gamma * s[r] * np.outer(u[:, r], v[:, r])
    return result.reshape(delta.shape)
