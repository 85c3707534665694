"""AWD on vectors of full size: slow float64 numpy, straight from the loss. Nothing of Plait is imported.

    L(d) = 1/(K(K-1)) sum_{i != j} |cos(tau_i - d, tau_j - d)| + alpha ||d||

Kinks (cos = 0, d = 0, tau_i = d) have sub-gradient 0; a vector that is zero has cosine 0 with all others. Zero is what
is 1e-6 times as long as the vectors it comes of, or less.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray


def _directions(left: Array, size: Array) -> tuple[Array, Array]:
    """Unit vectors and lengths of what is left; what is only rounding is zero, with length infinity."""
    lengths = np.array([math.sqrt(float(v @ v)) for v in left])
    gone = lengths**2 <= 1e-12 * size
    lengths[gone] = math.inf
    return left / lengths[:, None], lengths


def loss(taus: Array, delta: Array, alpha: float) -> float:
    """L at delta [n], for task vectors [K, n]."""
    count = len(taus)
    units, _ = _directions(taus - delta, (taus**2).sum(1) + delta @ delta)
    total = sum(abs(float(units[i] @ units[j])) for i in range(count) for j in range(count) if i != j)
    return total / max(count * (count - 1), 1) + alpha * math.sqrt(float(delta @ delta))


def gradient(taus: Array, delta: Array, alpha: float) -> Array:
    """dL/d delta [n]. With unit vectors u and lengths N: d cos_ij = -(u_j - cos u_i)/N_i - (u_i - cos u_j)/N_j."""
    count = len(taus)
    units, lengths = _directions(taus - delta, (taus**2).sum(1) + delta @ delta)
    result = np.zeros_like(delta)
    for i in range(count):
        for j in range(count):
            if i != j:
                cosine = float(units[i] @ units[j])
                slope = -(units[j] - cosine * units[i]) / lengths[i] - (units[i] - cosine * units[j]) / lengths[j]
                result += np.sign(cosine) * slope / (count * (count - 1))
    square = float(delta @ delta)
    return result + alpha * delta / math.sqrt(square) if square > 1e-12 * (taus**2).sum() / count else result


def redundant(
    taus: Array,
    optimizer: str = "gd",
    init: str = "zeros",
    alpha: float = 0.1,
    beta: float = 0.01,
    steps: int = 300,
    scale: str = "relative",
) -> Array:
    """The redundant vector [n] of one granule's task vectors [K, n]."""
    taus = np.asarray(taus, dtype=np.float64)
    count, numel = taus.shape
    unit = math.sqrt(float((taus**2).sum()) / count) if scale == "relative" else 1.0
    if count == 1 or not taus.any():
        return np.zeros(numel)
    taus = taus / (unit or 1.0)
    delta = taus.mean(0) if init == "mean" else np.zeros(numel)
    rate = beta / math.sqrt(numel) if optimizer == "adam" and scale == "relative" else beta
    first, second = np.zeros(numel), np.zeros(numel)
    for step in range(1, steps + 1):
        slope = gradient(taus, delta, alpha)
        if optimizer == "gd":
            delta = delta - rate * slope
            continue
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        delta = delta - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return delta * unit


def merge(base: Array, models: list[Array], weights: list[float], **options: Any) -> Array:
    """base + sum_k w_k (tau_k - d), for one tensor that is a granule of its own."""
    taus = np.stack([(model - base).reshape(-1) for model in models])
    left = taus - redundant(taus, **options)
    return base + (np.asarray(weights) @ left).reshape(base.shape)
