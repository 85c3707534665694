"""y = x·(W0 + Σ_k w_k Δ_k)ᵀ with weights of every sample's own, exact, in whichever of three ways is cheapest.

    apart    x W0ᵀ + Σ_k w_k (x Δ_kᵀ)            one product for each expert in use, on all tokens
    merged   (W0 + Σ_k w_k Δ_k) for each sample  weights by one product [B, K]·[K, mn], then batched products
    grouped  the same once for all samples whose weights are equal: task switches, top-1 routing

Low-rank experts are one pair of thin products, (x Vᵀ · w) U, whatever the weights are; where every sample uses few of
them, it reads its own alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

_MERGE, _BATCHED = 4.0, 1.1
"""Cost of one expert in an entry of a sample's own weights, and of a batched product, in entries of a plain product
over one token (measured on one core, docs/LOG.md)."""
_SAMPLES, _BLOCK, _FEW = 8, 3 << 14, 64
"""Samples and entries of own weights that are made at once, so that they stay in a core's cache; up to so many tokens,
and sixteen times the entries beyond."""


_GATHER = 16
"""Cost of copying one direction for a sample, in products of that direction with a token: an estimate."""


def low_rank(
    y: Tensor, x: Tensor, weights: Tensor, down: Tensor, up: Tensor, owner: Tensor, top: int = 0
) -> Tensor:  # fmt: skip
    """y + Σ_k w_k (x V_kᵀ) U_k; may write into y.

    y [B, T, m], x [B, T, n], weights [B, K] or [B, T, K], down [R, n], up [R, m], owner [R] → [B, T, m]. `top` says
    that all experts have the same rank, and that at most so many of a sample's weights are not zero.
    """
    experts, tokens = weights.shape[-1], x.shape[1]
    if weights.ndim == 2 and 0 < top * (tokens + _GATHER) < experts * tokens:
        return _few(y, x, weights, down, up, top)
    share = weights[..., owner]
    inner = linear(x, down) * (share if share.ndim == x.ndim else share.unsqueeze(1))
    flat, inner = y.view(-1, y.shape[-1]), inner.view(-1, inner.shape[-1])
    return (flat.addmm_(inner, up) if may_write() else torch.addmm(flat, inner, up)).view(y.shape)


def _few(y: Tensor, x: Tensor, weights: Tensor, down: Tensor, up: Tensor, top: int) -> Tensor:
    """The same with the directions of every sample's own experts, [B, top·r, n] and [B, top·r, m]."""
    experts = weights.shape[-1]
    share, places = weights.topk(top, dim=-1)
    rank = len(down) // experts
    reads = down.view(experts, rank, -1)[places].flatten(1, 2)
    writes = up.view(experts, rank, -1)[places].flatten(1, 2)
    inner = torch.bmm(x, reads.transpose(1, 2)) * share.repeat_interleave(rank, 1).unsqueeze(1)
    return y.baddbmm_(inner, writes) if may_write() else torch.baddbmm(y, inner, writes)


def may_write() -> bool:
    """Whether buffers may be written into: not where gradients are kept, or a program is traced."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.compiler.is_exporting())


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
    count = len(experts)
    costs = {
        "apart": (count + 1) * samples * tokens,
        "merged": samples * (count * _MERGE + tokens * _BATCHED),
    }
    if free and samples > 1:
        distinct, which = torch.unique(weights, dim=0, return_inverse=True)
        costs["grouped"] = int(torch.count_nonzero(distinct)) * _MERGE + samples * tokens * _BATCHED
        if min(costs, key=costs.__getitem__) == "grouped":
            return _grouped(x, distinct, which, base, deltas)
    if costs["apart"] <= costs["merged"]:
        return _apart(x, weights, base, deltas)
    if samples == 1:
        return linear(x, torch.addmv(base.reshape(-1), deltas.flatten(1).T, weights[0].to(deltas.dtype)).view_as(base))
    return _merged(x, weights, base, deltas)


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
    """Block by block of output rows and samples."""
    rows = base.shape[0]
    if len(x) >= _SAMPLES // 2:
        rows = max(1, _BLOCK * (1 if x.shape[1] <= _FEW else 16) // base.shape[1])
    y = x.new_empty(*x.shape[:-1], base.shape[0]) if may_write() else None
    blocks: list[Tensor] = []
    for at, part, delta in zip(range(0, base.shape[0], rows), base.split(rows), deltas.split(rows, dim=1), strict=True):
        done = []
        for first, some, share in zip(
            range(0, len(x), _SAMPLES), x.split(_SAMPLES), weights.split(_SAMPLES), strict=True
        ):
            found = torch.bmm(some, own_weights(share, part, delta).transpose(1, 2))
            if y is None:
                done.append(found)
            else:
                y[first : first + len(some), :, at : at + len(part)] = found
        blocks += [torch.cat(done)] if done else []
    return torch.cat(blocks, dim=-1) if y is None else y


def _grouped(x: Tensor, distinct: Tensor, which: Tensor, base: Tensor, deltas: Tensor) -> Tensor:
    if len(distinct) == 1:
        return linear(x, _one(distinct[0], base, deltas))
    y = x.new_empty(*x.shape[:-1], base.shape[0])
    for group, share in enumerate(distinct):
        rows = torch.nonzero(which == group).flatten()
        y[rows] = linear(x[rows], _one(share, base, deltas))
    return y


def _one(share: Tensor, base: Tensor, deltas: Tensor) -> Tensor:
    """W0 + Σ w_k Δ_k of one mixture [K], of which only what it uses is read."""
    used = torch.nonzero(share).flatten()
    if len(used) < len(share):
        share, deltas = share[used], deltas[used]
    return torch.addmv(base.reshape(-1), deltas.flatten(1).T, share.to(deltas.dtype)).view_as(base)
