"""Slow, plain reference implementations of the merging methods.

Everything here is float64 numpy, written from the papers and from the documented definitions. Nothing of Plait is
imported, and no torch. The tests compare Plait with these functions.

Conventions
-----------
* ``base`` is the pre-trained tensor (theta_0) or ``None``. ``models`` holds the experts theta_k, never the base.
* tau_k = theta_k - theta_0.
* ``weight`` is one number for all models, a list with one number per model, or ``None`` (1 for every model).
* Every function takes one tensor per model and returns a float64 array of the same shape.
* Selections are exact. Among equal magnitudes the entry with the LOWEST flat (C order) index counts as the larger one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

Array = np.ndarray
Weight = float | Sequence[float] | None
Rescale = Literal["norm", "density"] | bool

_NORM_EPS = 1e-7  # below this l1 norm a masked tensor is not rescaled


# ---------------------------------------------------------------------------------------------------------------------
# helpers
# ---------------------------------------------------------------------------------------------------------------------


def _f64(x: Array) -> Array:
    return np.asarray(x, dtype=np.float64)


def _weights(weight: Weight, count: int) -> Array:
    if weight is None:
        return np.ones(count)
    if isinstance(weight, (int, float)):
        return np.full(count, float(weight))
    w = np.asarray(list(weight), dtype=np.float64)
    if w.shape != (count,):
        raise ValueError(f"{count} models but {w.size} weights")
    return w


def _numbers(value: float | Sequence[float], count: int) -> list[float]:
    if isinstance(value, (int, float)):
        return [float(value)] * count
    out = [float(v) for v in value]
    if len(out) != count:
        raise ValueError(f"{count} models but {len(out)} values")
    return out


def task_vectors(base: Array, models: Sequence[Array]) -> list[Array]:
    """tau_k = theta_k - theta_0."""
    b = _f64(base)
    return [_f64(m) - b for m in models]


def order_by_magnitude(x: Array) -> Array:
    """Flat indices from the largest to the smallest |x|; equal magnitudes: the lower index first."""
    return np.argsort(-np.abs(_f64(x).reshape(-1)), kind="stable")


def keep_count(density: float, n: int) -> int:
    """How many of n entries a trim keeps: max(1, int(density * n)); 0 for density <= 0, n for density >= 1."""
    if n == 0 or density <= 0:
        return 0
    if density >= 1:
        return n
    return max(1, int(density * n))


def rescale_norm(original: Array, masked: Array) -> Array:
    """Scale ``masked`` so that its l1 norm is that of ``original``; left alone when either norm is below 1e-7."""
    before, after = np.abs(original).sum(), np.abs(masked).sum()
    if before < _NORM_EPS or after < _NORM_EPS:
        return masked
    return masked * (before / after)


# ---------------------------------------------------------------------------------------------------------------------
# sparsifiers: one task vector in, one task vector out
# ---------------------------------------------------------------------------------------------------------------------


def trim_mask(x: Array, density: float) -> Array:
    """Boolean mask of the keep_count(density, n) entries largest in magnitude (TIES step 1, one tensor)."""
    x = _f64(x)
    mask = np.zeros(x.size, dtype=bool)
    mask[order_by_magnitude(x)[: keep_count(density, x.size)]] = True
    return mask.reshape(x.shape)


def trim(x: Array, density: float, rescale: bool = False) -> Array:
    """Entries outside ``trim_mask`` become 0. ``rescale`` restores the l1 norm."""
    x = _f64(x)
    kept = x * trim_mask(x, density)
    return rescale_norm(x, kept) if rescale and density < 1 else kept


def ties_trim_model(taus: dict[str, Array], density: float) -> dict[str, Array]:
    """TIES step 1 with one threshold over a whole task vector (Yadav et al. 2023, arXiv 2306.01708, and its code).

    The tensors are flattened and concatenated in sorted-name order; the keep_count(density, n) entries largest in
    magnitude stay, of equal magnitudes the first in that order; the rest become 0.
    """
    names = sorted(taus)
    if not names:
        return {}
    flat = np.concatenate([_f64(taus[name]).reshape(-1) for name in names])
    kept = trim(flat, density)
    out: dict[str, Array] = {}
    at = 0
    for name in names:
        shape = np.shape(taus[name])
        size = math.prod(shape)
        out[name] = kept[at : at + size].reshape(shape)
        at += size
    return {name: out[name] for name in taus}


def breadcrumbs_mask(x: Array, density: float, gamma: float = 0.01) -> Array:
    """Mask of Model Breadcrumbs (Davari and Belilovsky 2023, arXiv 2312.06795).

    Of n entries the int(gamma n) largest in magnitude go first, then the smallest, until k = int(density n) stay. When
    fewer than k would be left, fewer of the largest go: the k smallest stay. k is at least 1 for density > 0.
    density >= 1 keeps everything, outliers included.
    """
    x = _f64(x)
    n = x.size
    if density >= 1:
        return np.ones(x.shape, dtype=bool)
    k = keep_count(density, n)
    top = min(int(gamma * n), n - k)
    mask = np.zeros(n, dtype=bool)
    mask[order_by_magnitude(x)[top : top + k]] = True
    return mask.reshape(x.shape)


def breadcrumbs_sparsify(x: Array, density: float, gamma: float = 0.01, rescale: bool = False) -> Array:
    """Entries outside ``breadcrumbs_mask`` become 0. ``rescale`` restores the l1 norm."""
    x = _f64(x)
    kept = x * breadcrumbs_mask(x, density, gamma)
    return rescale_norm(x, kept) if rescale and density < 1 else kept


def dare_sparsify(x: Array, density: float, uniform: Array, rescale: Rescale = "norm") -> Array:
    """Drop And REscale (Yu et al. 2023, arXiv 2311.03099): keep x_i where u_i < density, else 0.

    ``rescale="density"`` multiplies the kept entries by 1/density (the paper); ``"norm"`` or ``True`` restores the l1
    norm (mergekit); ``False`` does nothing. density >= 1 returns x unchanged.
    """
    x = _f64(x)
    if density >= 1:
        return x.copy()
    kept = x * (_f64(uniform).reshape(x.shape) < density)
    if rescale == "density":
        return kept / density if density > 0 else kept
    return rescale_norm(x, kept) if rescale else kept


def della_probabilities(x: Array, density: float, epsilon: float = 0.15) -> Array:
    """Keep probabilities of DELLA's MAGPRUNE (Deep et al. 2024, arXiv 2406.11617).

    In each row (everything after the first axis; a 1-D tensor is one row) the entries get the ranks 0 (smallest
    magnitude) .. m-1 (largest), and p = (density - epsilon) + 2 epsilon * rank / (m - 1). A row of one entry gets
    p = density. Among equal magnitudes the lower index has the higher rank.
    """
    if density - epsilon <= 0 or density + epsilon >= 1:
        raise ValueError("density - epsilon and density + epsilon must lie in (0, 1)")
    x = _f64(x)
    rows = x.reshape(x.shape[0], -1) if x.ndim >= 2 else x.reshape(1, -1)
    m = rows.shape[1]
    p = np.empty_like(rows)
    for i, row in enumerate(rows):
        rank = np.empty(m)
        rank[order_by_magnitude(row)] = np.arange(m - 1, -1, -1)
        p[i] = density - epsilon + 2 * epsilon * (rank / (m - 1) if m > 1 else 0.5)
    return p.reshape(x.shape)


def della_sparsify(x: Array, density: float, uniform: Array, epsilon: float = 0.15, rescale: Rescale = "norm") -> Array:
    """Keep x_i where u_i < p_i with ``della_probabilities``.

    ``rescale="density"`` multiplies each kept entry by 1/p_i (the paper); ``"norm"`` or ``True`` restores the l1 norm
    (mergekit). density >= 1 returns x, density <= 0 returns zeros.
    """
    x = _f64(x)
    if density >= 1:
        return x.copy()
    if density <= 0:
        return np.zeros_like(x)
    p = della_probabilities(x, density, epsilon)
    kept = x * (_f64(uniform).reshape(x.shape) < p)
    if rescale == "density":
        return kept / p
    return rescale_norm(x, kept) if rescale else kept


# ---------------------------------------------------------------------------------------------------------------------
# combiners of already sparsified task vectors
# ---------------------------------------------------------------------------------------------------------------------


def combine_sum(base: Array, taus: Sequence[Array], weight: Weight, normalize: bool, lambda_: float) -> Array:
    """theta_0 + lambda * sum_k w_k tau_k (/ sum_k w_k when normalised; a divisor below 1e-8 counts as 1)."""
    w = _weights(weight, len(taus))
    out = np.zeros_like(_f64(base))
    for wk, tau in zip(w, taus, strict=True):
        out = out + wk * tau
    if normalize:
        total = w.sum()
        out = out / (1.0 if abs(total) < 1e-8 else total)
    return _f64(base) + lambda_ * out


def elect_sign(weighted: Sequence[Array], zeros: Literal["positive", "majority"] = "positive") -> Array:
    """TIES step 2: sign(sum_k w_k tau_k). Zero sums take +1 (mergekit) or the tensor's majority sign (the paper)."""
    sign = np.sign(np.sum(np.stack(weighted), axis=0))
    if zeros == "positive":
        return np.where(sign == 0, 1.0, sign)
    return np.where(sign == 0, np.sign(sign.sum()), sign)


def combine_ties(
    base: Array,
    taus: Sequence[Array],
    weight: Weight,
    normalize: bool,
    lambda_: float,
    zeros: Literal["positive", "majority"] = "positive",
) -> Array:
    """TIES steps 2 to 4 on trimmed vectors (arXiv 2306.01708).

    gamma = sign(sum_k w_k tau_k); A = {k : sign(w_k tau_k) = gamma}, without zero entries;
    result = theta_0 + lambda * sum_{k in A} w_k tau_k, the sum divided by sum_{k in A} w_k when normalised (a
    divisor of 0 counts as 1).
    """
    w = _weights(weight, len(taus))
    weighted = [wk * tau for wk, tau in zip(w, taus, strict=True)]
    gamma = elect_sign(weighted, zeros)
    total = np.zeros_like(_f64(base))
    divisor = np.zeros_like(_f64(base))
    for wk, x in zip(w, weighted, strict=True):
        agree = (np.sign(x) == gamma) & (x != 0)
        total = total + x * agree
        divisor = divisor + wk * agree
    if normalize:
        total = total / np.where(divisor == 0, 1.0, divisor)
    return _f64(base) + lambda_ * total


# ---------------------------------------------------------------------------------------------------------------------
# methods
# ---------------------------------------------------------------------------------------------------------------------


def linear(base: Array | None, models: Sequence[Array], weight: Weight = None, normalize: bool = True) -> Array:
    """Weighted average, sum_k w_k theta_k / sum_k w_k (model soups, Wortsman et al. 2022, arXiv 2203.05482).

    ``base`` is not used. ``normalize=False`` gives the plain weighted sum.
    """
    w = _weights(weight, len(models))
    out = np.zeros_like(_f64(models[0]))
    for wk, m in zip(w, models, strict=True):
        out = out + wk * _f64(m)
    if normalize:
        total = w.sum()
        if total == 0:
            raise ValueError("the weights sum to 0")
        out = out / total
    return out


def task_arithmetic(
    base: Array, models: Sequence[Array], weight: Weight = None, normalize: bool = False, lambda_: float = 1.0
) -> Array:
    """theta_0 + lambda * sum_k w_k tau_k (Ilharco et al. 2022, arXiv 2212.04089). Negative weights are allowed."""
    return combine_sum(base, task_vectors(base, models), weight, normalize, lambda_)


def ties(
    base: Array,
    models: Sequence[Array],
    weight: Weight = None,
    density: float | Sequence[float] = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
    zeros: Literal["positive", "majority"] = "positive",
) -> Array:
    """Trim, elect sign, merge (Yadav et al. 2023, arXiv 2306.01708), trimmed per tensor as in mergekit and PEFT."""
    taus = task_vectors(base, models)
    taus = [trim(t, d, rescale) for t, d in zip(taus, _numbers(density, len(taus)), strict=True)]
    return combine_ties(base, taus, weight, normalize, lambda_, zeros)


def breadcrumbs(
    base: Array,
    models: Sequence[Array],
    weight: Weight = None,
    density: float | Sequence[float] = 1.0,
    gamma: float | Sequence[float] = 0.01,
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
) -> Array:
    """Model Breadcrumbs: drop the largest outliers and the small rest of each tau_k, then sum (arXiv 2312.06795)."""
    taus = task_vectors(base, models)
    count = len(taus)
    taus = [
        breadcrumbs_sparsify(t, d, g, rescale)
        for t, d, g in zip(taus, _numbers(density, count), _numbers(gamma, count), strict=True)
    ]
    return combine_sum(base, taus, weight, normalize, lambda_)


def breadcrumbs_ties(
    base: Array,
    models: Sequence[Array],
    weight: Weight = None,
    density: float | Sequence[float] = 1.0,
    gamma: float | Sequence[float] = 0.01,
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
) -> Array:
    """Model Breadcrumbs' mask (arXiv 2312.06795), then TIES' sign election and sum (arXiv 2306.01708)."""
    taus = task_vectors(base, models)
    count = len(taus)
    taus = [
        breadcrumbs_sparsify(t, d, g, rescale)
        for t, d, g in zip(taus, _numbers(density, count), _numbers(gamma, count), strict=True)
    ]
    return combine_ties(base, taus, weight, normalize, lambda_)


def dare_linear(
    base: Array,
    models: Sequence[Array],
    uniforms: Sequence[Array],
    weight: Weight = None,
    density: float | Sequence[float] = 1.0,
    normalize: bool = False,
    rescale: Rescale = "norm",
    lambda_: float = 1.0,
) -> Array:
    """DARE, then a weighted sum (Yu et al. 2023, arXiv 2311.03099). ``uniforms[k]`` in [0, 1) decides tau_k's mask."""
    taus = task_vectors(base, models)
    densities = _numbers(density, len(taus))
    taus = [dare_sparsify(t, d, u, rescale) for t, d, u in zip(taus, densities, uniforms, strict=True)]
    return combine_sum(base, taus, weight, normalize, lambda_)


def dare_ties(
    base: Array,
    models: Sequence[Array],
    uniforms: Sequence[Array],
    weight: Weight = None,
    density: float | Sequence[float] = 1.0,
    normalize: bool = False,
    rescale: Rescale = "norm",
    lambda_: float = 1.0,
) -> Array:
    """DARE (arXiv 2311.03099), then TIES' sign election and merge (arXiv 2306.01708)."""
    taus = task_vectors(base, models)
    densities = _numbers(density, len(taus))
    taus = [dare_sparsify(t, d, u, rescale) for t, d, u in zip(taus, densities, uniforms, strict=True)]
    return combine_ties(base, taus, weight, normalize, lambda_)


def della(
    base: Array,
    models: Sequence[Array],
    uniforms: Sequence[Array],
    weight: Weight = None,
    density: float | Sequence[float] = 1.0,
    epsilon: float | Sequence[float] = 0.15,
    normalize: bool = True,
    rescale: Rescale = "norm",
    lambda_: float = 1.0,
) -> Array:
    """DELLA: magnitude-ranked random drop, sign election, merge (Deep et al. 2024, arXiv 2406.11617)."""
    taus = task_vectors(base, models)
    count = len(taus)
    taus = [
        della_sparsify(t, d, u, e, rescale)
        for t, d, e, u in zip(taus, _numbers(density, count), _numbers(epsilon, count), uniforms, strict=True)
    ]
    return combine_ties(base, taus, weight, normalize, lambda_)


def della_linear(
    base: Array,
    models: Sequence[Array],
    uniforms: Sequence[Array],
    weight: Weight = None,
    density: float | Sequence[float] = 1.0,
    epsilon: float | Sequence[float] = 0.15,
    normalize: bool = False,
    rescale: Rescale = "norm",
    lambda_: float = 1.0,
) -> Array:
    """DELLA's drop (arXiv 2406.11617), then a weighted sum without sign election."""
    taus = task_vectors(base, models)
    count = len(taus)
    taus = [
        della_sparsify(t, d, u, e, rescale)
        for t, d, e, u in zip(taus, _numbers(density, count), _numbers(epsilon, count), uniforms, strict=True)
    ]
    return combine_sum(base, taus, weight, normalize, lambda_)


def sce(base: Array, models: Sequence[Array], select_topk: float = 1.0) -> Array:
    """Select, Calculate, Erase (FuseChat, Wan et al. 2024, arXiv 2408.07990).

    Select: of the entries whose (population) variance over the tau_k is not 0, the int(nonzero * select_topk) with the
    largest variance stay, lowest index first among equals; select_topk >= 1 keeps all, <= 0 none.
    Calculate: w_k = mean of tau_k squared, over the whole tensor after selection, normalised to sum 1 (equal weights
    when the sum is 0; mergekit does so below 1e-6, which real task vectors seldom exceed).
    Erase: entries whose sign is not sign(sum_k tau_k) (0 counts as +) leave.
    Result: theta_0 + sum_k w_k tau_k / max(sum_k w_k, 1e-6), both sums over the entries left.
    """
    taus = np.stack(task_vectors(base, models))
    if select_topk < 1:
        mask = np.zeros(taus[0].size)
        if select_topk > 0:
            varies = np.max(taus, axis=0) != np.min(taus, axis=0)
            variance = np.where(varies, np.var(taus, axis=0), 0.0)
            k = int(np.count_nonzero(variance) * select_topk)
            mask[order_by_magnitude(variance)[:k]] = 1.0
        taus = taus * mask.reshape(taus[0].shape)
    w = np.array([np.mean(t**2) for t in taus])
    total = w.sum()
    w = np.full(len(taus), 1 / len(taus)) if total == 0 else w / total
    gamma = elect_sign(list(taus))
    num = np.zeros_like(taus[0])
    den = np.zeros_like(taus[0])
    for wk, tau in zip(w, taus, strict=True):
        agree = (np.sign(tau) == gamma) & (tau != 0)
        num = num + wk * tau * agree
        den = den + wk * agree
    return _f64(base) + num / np.maximum(den, 1e-6)


def slerp(base: Array, models: Sequence[Array], t: float) -> Array:
    """Spherical interpolation from ``base`` (t = 0) to the one expert (t = 1), on the flattened tensor (Shoemake 1985).

    cos(theta) from the normalised vectors (a norm of 1e-8 or less counts as 1);
    result = sin((1-t) theta)/sin(theta) a + sin(t theta)/sin(theta) b on the vectors as they are;
    (1-t) a + t b when |cos(theta)| > 0.9995.
    """
    (model,) = models
    a, b = _f64(base), _f64(model)
    na, nb = float(np.sqrt((a**2).sum())), float(np.sqrt((b**2).sum()))
    na = na if na > 1e-8 else 1.0
    nb = nb if nb > 1e-8 else 1.0
    dot = float(np.clip(((a / na) * (b / nb)).sum(), -1.0, 1.0))
    if abs(dot) > 0.9995:
        return (1 - t) * a + t * b
    theta = math.acos(dot)
    s = math.sin(theta)
    return math.sin((1 - t) * theta) / s * a + math.sin(t * theta) / s * b


def _slerp_last_axis(t: float, a: Array, b: Array) -> Array:
    def unit(x: Array) -> Array:
        return x / np.maximum(np.sqrt((x**2).sum(axis=-1, keepdims=True)), 1e-7)

    cos = np.clip((unit(a) * unit(b)).sum(axis=-1, keepdims=True), -1.0, 1.0)
    colinear = 1 - cos**2 <= 1e-16
    theta = np.arccos(np.where(colinear, 0.0, cos))
    s = np.sin(theta)
    curved = (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / s
    return np.where(colinear, (1 - t) * a + t * b, curved)


def nuslerp(
    base: Array | None,
    models: Sequence[Array],
    weight: Weight = None,
    row_wise: bool = False,
    flatten: bool = True,
) -> Array:
    """mergekit's NuSLERP of two models with t = w_1 / (w_0 + w_1), 1/2 when the sum is below 1e-6 in magnitude.

    With a base the task vectors are interpolated and the base is added back. ``flatten``: the tensor is one vector.
    Otherwise each vector along the last axis is interpolated on its own, or, with ``row_wise``, each vector along the
    first axis. Vectors with 1 - cos^2 <= 1e-16 are interpolated linearly.
    """
    first, second = models
    w = _weights(weight, 2)
    total = w.sum()
    t = 0.5 if abs(total) < 1e-6 else float(w[1] / total)
    a, b = _f64(first), _f64(second)
    if base is not None:
        a, b = a - _f64(base), b - _f64(base)
    shape = a.shape
    if flatten or a.ndim < 2:
        out = _slerp_last_axis(t, a.reshape(-1), b.reshape(-1)).reshape(shape)
    elif row_wise:
        out = np.swapaxes(_slerp_last_axis(t, np.swapaxes(a, 0, -1), np.swapaxes(b, 0, -1)), 0, -1)
    else:
        out = _slerp_last_axis(t, a, b)
    return out if base is None else _f64(base) + out


def multislerp(
    base: Array | None,
    models: Sequence[Array],
    weight: Weight = None,
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Array:
    """Barycentric interpolation on the sphere in one tangent step (Goddard, goddard.blog, "multi-SLERP").

    u_k = x_k / (|x_k| + eps), x_k = theta_k, or tau_k with a base; m = normalised sum_k w_k u_k;
    v = sum_k w_k (u_k - <u_k, m> m); n = |v| + eps; y = cos(n) m + sin(n)/n v; result = (sum_k w_k |x_k|) y (+ base).
    One model is returned as it is. When |sum_k w_k u_k| < eps: two models are added, w_0 x_0 + w_1 x_1; all-zero x_k
    give zero; otherwise there is no answer (ValueError).
    """
    if len(models) == 1:
        return _f64(models[0]).copy()
    xs = [_f64(m) for m in models] if base is None else task_vectors(base, models)
    back = 0.0 if base is None else _f64(base)
    w = _weights(weight, len(xs))
    if normalize_weights:
        w = w / w.sum()
    norms = [float(np.sqrt((x**2).sum())) for x in xs]
    units = [x / (n + eps) for x, n in zip(xs, norms, strict=True)]
    mean = np.sum([wk * u for wk, u in zip(w, units, strict=True)], axis=0)
    length = float(np.sqrt((mean**2).sum()))
    if length < eps:
        if len(xs) == 2:
            return w[0] * xs[0] + w[1] * xs[1] + back
        if not any(norms):
            return np.zeros_like(xs[0]) + back
        raise ValueError("the weighted directions cancel out")
    mean = mean / length
    tangent = np.sum([wk * (u - (u * mean).sum() * mean) for wk, u in zip(w, units, strict=True)], axis=0)
    n = float(np.sqrt((tangent**2).sum())) + eps
    out = math.cos(n) * mean + math.sin(n) / n * tangent
    return float((w * norms).sum()) * out + back


def karcher(base: Array | None, models: Sequence[Array], max_iter: int = 10, tol: float = 1e-5) -> Array:
    """Karcher (Riemannian) mean of the directions on the unit sphere, times the mean norm (Karcher 1977).

    u_k = theta_k / |theta_k|; models with a norm of ``tol`` or less give no direction. m_0 = normalised mean of the u_k
    (the first u_k if that is shorter than tol). Repeat: v = mean_k theta_k / sin(theta_k) (u_k - <u_k, m> m) with
    theta_k = arccos <u_k, m>, those below tol left out; stop when |v| < tol; m = cos|v| m + sin|v| v/|v|, normalised.
    The scale is the mean of all the norms. ``base`` is not used.
    """
    xs = [_f64(m) for m in models]
    if len(xs) == 1:
        return xs[0].copy()
    norms = [float(np.sqrt((x**2).sum())) for x in xs]
    units = [x / n for x, n in zip(xs, norms, strict=True) if n > tol]
    if not units:
        return np.zeros_like(xs[0])
    mean = np.sum(units, axis=0) / len(units)
    length = float(np.sqrt((mean**2).sum()))
    mean = units[0].copy() if length < tol else mean / length
    for _ in range(max_iter):
        tangent = np.zeros_like(mean)
        for u in units:
            dot = float(np.clip((u * mean).sum(), -1.0, 1.0))
            theta = math.acos(dot)
            if theta < tol:
                continue
            tangent = tangent + theta / math.sin(theta) * (u - dot * mean) / len(units)
        n = float(np.sqrt((tangent**2).sum()))
        if n < tol:
            break
        mean = math.cos(n) * mean + math.sin(n) * tangent / n
        mean = mean / np.sqrt((mean**2).sum())
    return float(np.mean(norms)) * mean


def model_stock(base: Array, models: Sequence[Array], filter_wise: bool = False) -> Array:
    """Model Stock (Jang et al. 2024, arXiv 2403.19522): t * mean_k theta_k + (1 - t) theta_0.

    c = mean over the pairs of cos(tau_i, tau_j), each with the product of norms clamped to at least 1e-6 and the cosine
    to [-1, 1]; t = K c / (1 + (K - 1) c); t = 0 where the denominator is below 1e-6 in magnitude. One t per tensor, or
    with ``filter_wise`` one per vector along the last axis (a 1-D tensor is one vector).
    """
    if len(models) < 2:
        raise ValueError("model_stock needs two models and a base")
    b = _f64(base)
    shape = b.shape
    rows = b.reshape(-1, shape[-1]) if filter_wise and b.ndim > 1 else b.reshape(1, -1)
    taus = [_f64(m).reshape(rows.shape) - rows for m in models]
    cosines = []
    for i in range(len(taus)):
        for j in range(i + 1, len(taus)):
            product = np.sqrt((taus[i] ** 2).sum(-1)) * np.sqrt((taus[j] ** 2).sum(-1))
            cosines.append(np.clip((taus[i] * taus[j]).sum(-1) / np.maximum(product, 1e-6), -1.0, 1.0))
    c = np.mean(np.stack(cosines), axis=0)[:, None]
    count = len(models)
    den = 1 + (count - 1) * c
    singular = np.abs(den) < 1e-6
    t = np.where(singular, 0.0, count * c / np.where(singular, 1.0, den))
    average = rows + sum(taus) / count
    return (t * average + (1 - t) * rows).reshape(shape)


def nearswap(base: Array, models: Sequence[Array], t: float) -> Array:
    """NearSwap (alchemonaut, QuartetAnemoi): w = clamp(t / max(|a - b|, 1e-6), 0, 1); w b + (1 - w) a, a = base."""
    (model,) = models
    a, b = _f64(base), _f64(model)
    w = np.clip(t / np.maximum(np.abs(a - b), 1e-6), 0.0, 1.0)
    return w * b + (1 - w) * a


def passthrough(base: Array | None, models: Sequence[Array], scale: float | None = None) -> Array:
    """The one model, times ``scale`` when it is given. ``base`` is not used."""
    (model,) = models
    return _f64(model) * (1.0 if scale is None else scale)


def tall_masks(base: Array, models: Sequence[Array], mu: float = 0.6) -> list[Array]:
    """TALL masks (Wang et al. 2024, arXiv 2405.07813): m_k = 1[|tau_k| >= mu |tau_mt - tau_k|], tau_mt = sum tau_k."""
    taus = task_vectors(base, models)
    total = np.sum(np.stack(taus), axis=0)
    return [np.abs(t) >= mu * np.abs(total - t) for t in taus]


def consensus_ta(
    base: Array, models: Sequence[Array], mu: float = 0.6, min_active: int = 2, lambda_: float = 1.0
) -> Array:
    """Consensus task arithmetic (arXiv 2405.07813): theta_0 + lambda * tau_mt * 1[sum_k m_k >= min_active].

    m_k as in ``tall_masks``: entries that no task, or only one task, needs are set back to the base.
    """
    taus = task_vectors(base, models)
    kept = np.sum(np.stack(tall_masks(base, models, mu)), axis=0) >= min_active
    return _f64(base) + lambda_ * np.sum(np.stack(taus), axis=0) * kept


def anchor_fraction(layer: int, layers: int, schedule: Literal["linear", "cosine", "step"] = "linear") -> float:
    """a(l) for layer l of n: 0 at the first layer, 1 at the last. x = l/(n-1) (1 when n = 1).

    linear: x; cosine: (1 - cos(pi x))/2; step: 0 for x < 1/2, else 1.
    """
    x = layer / (layers - 1) if layers > 1 else 1.0
    if schedule == "linear":
        return x
    if schedule == "cosine":
        return (1 - math.cos(math.pi * x)) / 2
    return 0.0 if x < 0.5 else 1.0


def anchor_schedule(base: Array | None, models: Sequence[Array], anchor: int, a: float) -> Array:
    """(1 - a) mean_k theta_k + a theta_anchor (layer-wise merging for UDA segmentation, arXiv 2409.15813).

    ``anchor`` is an index into ``models``; ``a`` is the layer's ``anchor_fraction``. ``base`` is not used.
    """
    mean = sum(_f64(m) for m in models) / len(models)
    return (1 - a) * mean + a * _f64(models[anchor])
