"""y = x·(W0 + Σ_k w_k Δ_k)ᵀ with weights of every sample's own, exact, in whichever of three ways is cheapest.

    apart    x W0ᵀ + Σ_k w_k (x Δ_kᵀ)            one product for each expert in use, on all tokens
    merged   (W0 + Σ_k w_k Δ_k) for each sample  weights by one product [B, K]·[K, mn], then batched products
    grouped  the same once for all samples whose weights are equal: task switches, top-1 routing

Low-rank experts need no choice: (x Vᵀ · w) U is one pair of thin products, whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

_MERGE, _BATCHED, _CHUNK = 1.6, 1.25, 1 << 22
"""Cost of an entry of a sample's own weights against one of a plain product; of a batched product (bench/routing.py);
entries of own weights that are held at once."""


def low_rank(x: Tensor, weights: Tensor, down: Tensor, up: Tensor, owner: Tensor) -> Tensor:
    """Σ_k w_k (x V_kᵀ) U_k: x [B, T, n], weights [B, K] or [B, T, K], down [R, n], up [R, m], owner [R] → [B, T, m]."""
    share = weights[..., owner]
    return (linear(x, down) * (share if share.ndim == x.ndim else share.unsqueeze(1))) @ up


def dense(x: Tensor, weights: Tensor, base: Tensor, pick: Callable[[list[int]], Tensor], free: bool = True) -> Tensor:
    """x [B, T, n], weights [B, K] or [B, T, K], base [m, n]; `pick` gives Δ [A, m, n] of some experts → [B, T, m].

    `free` is whether the values of the weights may steer the way: not while they are learned, compiled or exported.
    """
    experts = list(range(weights.shape[-1]))
    if free:
        used = (weights != 0).flatten(0, -2).any(0).tolist()
        experts = [k for k in experts if used[k]]
        weights = weights[..., experts]
    if not experts:
        return linear(x, base)
    deltas = pick(experts)
    if weights.ndim == 3:
        return _apart(x, weights, base, deltas)
    samples, tokens = x.shape[0], x.shape[1]
    costs = {
        "apart": (len(experts) + 1) * samples * tokens,
        "merged": samples * (len(experts) * _MERGE + _MERGE + tokens * _BATCHED),
    }
    if free and samples > 1:
        distinct, which = torch.unique(weights, dim=0, return_inverse=True)
        costs["grouped"] = len(distinct) * (len(experts) + 1) * _MERGE + samples * tokens
        if min(costs, key=costs.__getitem__) == "grouped":
            return _grouped(x, distinct, which, base, deltas)
    return _merged(x, weights, base, deltas) if costs["merged"] < costs["apart"] else _apart(x, weights, base, deltas)


def own_weights(weights: Tensor, base: Tensor, deltas: Tensor) -> Tensor:
    """W0 + Σ_k w_k Δ_k of every row: weights [B, K] → [B, *shape]."""
    flat = torch.addmm(base.reshape(1, -1), weights.to(deltas.dtype), deltas.flatten(1))
    return flat.view(len(weights), *base.shape)


def _apart(x: Tensor, weights: Tensor, base: Tensor, deltas: Tensor) -> Tensor:
    y = linear(x, base)
    share = weights if weights.ndim == 3 else weights.unsqueeze(1)
    for k, delta in enumerate(deltas):
        y = torch.addcmul(y, linear(x, delta), share[..., k : k + 1])
    return y


def _merged(x: Tensor, weights: Tensor, base: Tensor, deltas: Tensor) -> Tensor:
    size = max(1, _CHUNK // base.numel())
    parts = [
        torch.bmm(rows, own_weights(share, base, deltas).transpose(1, 2))
        for rows, share in zip(x.split(size), weights.split(size), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _grouped(x: Tensor, distinct: Tensor, which: Tensor, base: Tensor, deltas: Tensor) -> Tensor:
    if len(distinct) == 1:
        return linear(x, own_weights(distinct, base, deltas)[0])
    y = x.new_empty(*x.shape[:-1], base.shape[0])
    for group, share in enumerate(distinct):
        rows = torch.nonzero(which == group).flatten()
        y[rows] = linear(x[rows], own_weights(share.unsqueeze(0), base, deltas)[0])
    return y
