"""Slow references of the methods that see inputs: float64 numpy, from the papers. Nothing of Plait, and no torch.

Conventions as in `reference.py`; inputs of a layer are [rows, in], weights [out, in].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def gram(x: Array, off_diagonal: float) -> Array:
    """XᵀX/n with every entry off the diagonal times `off_diagonal`."""
    x = np.asarray(x, dtype=np.float64)
    width = x.shape[1]
    scale = np.full((width, width), off_diagonal)
    scale[np.diag_indices(width)] = 1.0
    return x.T @ x / len(x) * scale


def regmean(inputs: Sequence[Array], weights: Sequence[Array], off_diagonal: float = 0.95) -> Array:
    """RegMean (Jin et al. 2023, arXiv 2212.09849): Wᵀ = (Σ G_k)⁻¹ Σ G_k W_kᵀ."""
    grams = [gram(x, off_diagonal) for x in inputs]
    right = sum(g @ np.asarray(w, dtype=np.float64).T for g, w in zip(grams, weights, strict=True))
    return np.linalg.solve(sum(grams), right).T


def fisher_of(gradients: Array, p: Array, least: float = 1e-6) -> Array:
    """F = mean over inputs of Σ_y p(y) g_y², plus `least`. gradients: [inputs, labels, *shape], p: [inputs, labels]."""
    gradients, p = np.asarray(gradients, dtype=np.float64), np.asarray(p, dtype=np.float64)
    return np.einsum("iy,iy...->...", p, gradients**2) / len(gradients) + least


def fisher(fishers: Sequence[Array], weights: Sequence[Array], shares: Sequence[float] | None = None) -> Array:
    """Fisher merging (Matena and Raffel 2022, arXiv 2111.09832): Σ a_k F_k θ_k / Σ a_k F_k."""
    shares = [1.0] * len(weights) if shares is None else shares
    scaled = [a * f for a, f in zip(shares, fishers, strict=True)]
    above = [f * np.asarray(w, dtype=np.float64) for f, w in zip(scaled, weights, strict=True)]
    return np.sum(above, axis=0) / np.sum(scaled, axis=0)


def surgery(z: Array, down: Array, up: Array) -> Array:
    """Representation surgery (Yang et al. 2024, arXiv 2402.02705): z − W_up ReLU(W_down z) for each row of z."""
    return np.stack([row - up @ np.maximum(down @ row, 0) for row in np.asarray(z, dtype=np.float64)])
