"""y = x·(W0 + Σ_k w_k Δ_k)ᵀ + b with weights of every sample's own, exact, in whichever way is cheapest.

    apart    x W0ᵀ + Σ_k w_k (x Δ_kᵀ)            one product for each expert in use, on all tokens
    merged   (W0 + Σ_k w_k Δ_k) for each sample  weights by one product [B, K]·[K, mn], then batched products
    grouped  the same once for all samples whose weights are equal: task switches, top-1 routing

Low-rank experts are one pair of thin products, (x Vᵀ · w) U, whatever the weights are; where every sample uses few of
them, it reads its own alone; and where there are many tokens, they are multiplied out for all samples together, a block
of rows at a time, and merged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

_READ, _BATCHED, _MERGE, _ALONE, _EXPAND = 10.0, 1.1, 3.0, 7.0, 3.0
"""Costs of an entry of a matrix, in entries of a plain product over one token (measured on one core, docs/LOG.md): to
read it for a product; a batched product over one token; to mix one expert into a sample's own weights, and to read that
expert for the samples that are made at once; to multiply out one direction of a low-rank expert."""
_FEW, _GATHER = 64, 16
"""Tokens that are few; cost of copying one direction for a sample, in products of that direction with a token: an
estimate."""


def low_rank(
    x: Tensor,
    weights: Tensor,
    base: Tensor,
    down: Tensor,
    up: Tensor,
    owner: Tensor,
    rank: int = 0,
    top: int = 0,
    bias: Tensor | None = None,
) -> Tensor:
    """x W0ᵀ + Σ_k w_k (x V_kᵀ) U_k + b.

    x [B, T, n], weights [B, K] or [B, T, K], base [m, n], down [R, n], up [R, m], owner [R] → [B, T, m]. `rank` is that
    of all experts, 0 where they differ; `top`, not 0, is how many of a sample's weights are not zero at most.
    """
    experts, samples, tokens = weights.shape[-1], x.shape[0], x.shape[1]
    even = rank > 0 and weights.ndim == 2
    if even and 0 < top * (tokens + _GATHER) < experts * tokens:
        return _few(plain(x, base, bias), x, weights, down, up, top)
    if even and may_write() and x.device.type == "cpu":  # elsewhere many small steps cost more than they save
        m, n = base.shape
        thin = samples * tokens * len(down) * (m + n) / (m * n)
        if len(down) * _EXPAND + _merging(samples, tokens, experts) - samples * tokens < thin:
            reads, writes = down.view(experts, rank, n), up.view(experts, rank, m)
            return _merged(
                x, weights, base, lambda at, to: torch.bmm(writes[:, :, at:to].transpose(1, 2), reads), bias
            )  # fmt: skip
    y, share = plain(x, base, bias), weights[..., owner]
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


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, where b is [m] or every sample's own, [B, 1 or T, m]."""
    if bias is None or bias.ndim == 1:
        return linear(x, weight, bias)
    y = linear(x, weight)
    return y.add_(bias) if may_write() else y + bias


def dense(
    x: Tensor,
    weights: Tensor,
    base: Tensor,
    pick: Callable[[list[int]], Tensor],
    free: bool = True,
    bias: Tensor | None = None,
) -> Tensor:
    """x [B, T, n], weights [B, K] or [B, T, K], base [m, n]; `pick` gives Δ [A, m, n] of some experts → [B, T, m].

    `free` is whether the values of the weights may steer the way: not while they are learned, compiled or exported.
    """
    experts = list(range(weights.shape[-1]))
    if free:  # read once: on small inputs each operation on the weights is as dear as some tokens
        values = weights.flatten(0, -2).tolist()
        experts = [k for k in experts if any(row[k] != 0 for row in values)]
        if len(experts) < weights.shape[-1]:
            weights = weights[..., experts]
    if not experts:
        return plain(x, base, bias)
    deltas = pick(experts)
    if weights.ndim == 3:
        return _apart(x, weights, base, deltas, bias)
    samples, tokens, count = x.shape[0], x.shape[1], len(experts)
    if samples == 1:  # each expert is read once whatever the way
        return plain(x, own_weights(weights, base, deltas)[0], bias)
    costs = {"apart": (count + 1) * (samples * tokens + _READ), "merged": _merging(samples, tokens, count)}
    if free:
        groups: dict[tuple[float, ...], list[int]] = {}
        for row, share in enumerate(values):
            groups.setdefault(tuple(share), []).append(row)
        mixed = sum(value != 0 for share in groups for value in share)
        costs["grouped"] = mixed * (_MERGE + _ALONE) + samples * tokens * _BATCHED
        if min(costs, key=costs.__getitem__) == "grouped":
            return _grouped(x, weights, list(groups.values()), base, deltas, bias)
    if costs["apart"] <= costs["merged"]:
        return _apart(x, weights, base, deltas, bias)
    return _merged(x, weights, base, lambda at, to: deltas[:, at:to], bias)


def own_weights(weights: Tensor, base: Tensor, deltas: Tensor) -> Tensor:
    """W0 + Σ_k w_k Δ_k of every row: weights [B, K] → [B, *shape]."""
    weights, deltas = weights.to(deltas.dtype), deltas.flatten(1)
    if len(weights) == 1:
        return torch.addmv(base.reshape(-1), deltas.T, weights[0]).view(1, *base.shape)
    return torch.addmm(base.reshape(1, -1), weights, deltas).view(len(weights), *base.shape)


def _apart(x: Tensor, weights: Tensor, base: Tensor, deltas: Tensor, bias: Tensor | None = None) -> Tensor:
    y = plain(x, base, bias)
    share = weights if weights.ndim == 3 else weights.unsqueeze(1)
    for k, delta in enumerate(deltas):
        y = torch.addcmul(y, linear(x, delta), share[..., k : k + 1])
    return y


def _blocks(samples: int, tokens: int) -> tuple[int, int]:
    """Samples, and entries of each one's own weights, that are made at once.

    They are used while a cache holds them, and the allocator gives their memory again, which it does not above some 30
    MB: what the system gives is filled with zeros every time. Few tokens want a near cache, many tokens wide products.
    """
    return (8, 3 << 14) if tokens <= _FEW else (8, 9 << 15)


def _merging(samples: int, tokens: int, experts: int) -> float:
    """What `_merged` costs, in entries of a plain product over one token."""
    rounds = -(-samples // _blocks(samples, tokens)[0])
    return experts * (samples * _MERGE + rounds * _ALONE) + samples * tokens * _BATCHED


def _merged(
    x: Tensor, weights: Tensor, base: Tensor, block: Callable[[int, int], Tensor], bias: Tensor | None = None
) -> Tensor:
    """Block by block of output rows and samples; `block` gives Δ [K, rows, n] of some rows."""
    samples, tokens, width = len(x), x.shape[1], base.shape[0]
    some, entries = _blocks(samples, tokens)
    count = -(-width // max(1, entries // base.shape[1]))
    rows = -(-width // count)  # blocks of about one size
    beta = int(bias is not None)
    bias = x.new_zeros(()) if bias is None else bias
    bias = bias.expand(samples, tokens, width)
    y = x.new_empty(samples, tokens, width) if may_write() and (count > 1 or samples > some) else None
    blocks: list[Tensor] = []
    for at in range(0, width, rows):
        here, done = slice(at, at + rows), []
        part, delta = base[here], block(at, min(at + rows, width))
        for first in range(0, samples, some):
            batch = slice(first, first + some)
            own, added = own_weights(weights[batch], part, delta).transpose(1, 2), bias[batch, :, here]
            if y is None:
                done.append(torch.baddbmm(added, x[batch], own, beta=beta))
            elif tokens > _FEW and x.dtype == own.dtype == base.dtype:  # not so under autocast
                torch.baddbmm(added, x[batch], own, beta=beta, out=y[batch, :, here])
            else:
                torch.add(torch.bmm(x[batch], own), added, out=y[batch, :, here])  # added on the way into its place
        blocks += done if samples <= some else [torch.cat(done)] if done else []
    if y is not None:
        return y
    return blocks[0] if count == 1 else torch.cat(blocks, dim=-1)


def _grouped(
    x: Tensor, weights: Tensor, groups: list[list[int]], base: Tensor, deltas: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`groups`: rows of samples whose weights, and so their own biases, are equal."""
    if len(groups) == 1:
        return plain(x, _one(weights[0], base, deltas), bias)
    own = None if bias is None else bias.expand(len(x), 1, len(base))
    y = x.new_empty(*x.shape[:-1], base.shape[0])
    for members in groups:
        rows = torch.tensor(members, device=x.device)
        here = None if own is None else own[members[0], 0]
        y[rows] = plain(x[rows], _one(weights[members[0]], base, deltas), here)
    return y


def _one(share: Tensor, base: Tensor, deltas: Tensor) -> Tensor:
    """W0 + Σ w_k Δ_k of one mixture [K], of which only what it uses is read."""
    used = torch.nonzero(share).flatten()
    if len(used) < len(share):
        share, deltas = share[used], deltas[used]
    return torch.addmv(base.reshape(-1), deltas.flatten(1).T, share.to(deltas.dtype)).view_as(base)
