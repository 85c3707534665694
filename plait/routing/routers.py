"""Who decides the weights: routers that are learned, a gate made of the experts themselves, or a task that is told.

All give weights to a `Route`, and nothing else of a routed model knows where they came from.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from plait.routing.layers import Parts, Route

Kind = Literal["layers", "features", "task", "subspace"]


class Context:
    """What a forward pass is told beside its inputs."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        """[B, T]: which tokens are not padding."""
        self.decoder_mask: Tensor | None = None
        self.average = False
        """The papers' shortcut: one mixture for the whole batch. Exact only where a batch is one sample."""


class LayerRouter(nn.Module):
    """WEMoE's (arXiv:2402.00433): depth 2 is d → d → K, depth 1 is d → K, depth 0 a bias; mean over the tokens.

    Neither softmax nor clamp. It starts as task arithmetic: the last bias is `init`.
    """

    def __init__(self, width: int, experts: int, depth: int) -> None:
        super().__init__()
        sizes = {0: [], 1: [(width, experts)], 2: [(width, width), (width, experts)]}[depth]
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in sizes)
        self.bias = nn.Parameter(torch.zeros(experts)) if depth == 0 else None

    def reset(self, init: float, generator: torch.Generator) -> None:
        """Weights N(0, 0.01²), the first bias 0, the last `init`."""
        with torch.no_grad():
            if self.bias is not None:
                self.bias.fill_(init)
            for place, layer in enumerate(self.layers):
                assert isinstance(layer, nn.Linear)
                layer.weight.copy_(0.01 * torch.randn(layer.weight.shape, generator=generator))
                layer.bias.fill_(init if place == len(self.layers) - 1 else 0.0)

    def forward(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T, d] → [B, K]."""
        if self.bias is not None:
            return self.bias.expand(h.shape[0], -1)
        h = h.reshape(h.shape[0], -1, h.shape[-1])
        for place, layer in enumerate(self.layers):
            h = layer(h if place == 0 else torch.relu(h))
        return token_mean(h, mask)


class FeatureRouter(nn.Module):
    """Twin-Merging's (arXiv:2406.15479): features of the shared expert, d → 2d → 2d → K, then softmax.

    Each hidden layer is normalised, then LeakyReLU and dropout. Features come standardised by the mean and deviation
    of those it was trained on.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int, experts: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        hidden = 2 * width
        self.layers = nn.ModuleList([nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, experts)])
        self.norms = nn.ModuleList([nn.LayerNorm(hidden), nn.LayerNorm(hidden)])
        self.dropout = nn.Dropout(dropout)

    def reset(self, generator: torch.Generator) -> None:
        """Weights uniform in ±√(1/n) of their n inputs, biases zero."""
        with torch.no_grad():
            for layer in self.layers:
                assert isinstance(layer, nn.Linear)
                limit = layer.in_features**-0.5
                layer.weight.copy_((2 * torch.rand(layer.weight.shape, generator=generator) - 1) * limit)
                layer.bias.zero_()

    def forward(self, features: Tensor) -> Tensor:
        """[B, d] → logits [B, K]."""
        x = (features - self.mean) / self.deviation
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = self.dropout(nn.functional.leaky_relu(norm(layer(x))))
        return self.layers[-1](x)


class LayerGate:
    """A LayerRouter at the first layer of its MLP. Several MLPs may share one router."""

    def __init__(self, router: LayerRouter, context: Context, in_decoder: bool) -> None:
        self.router, self.context, self.in_decoder = router, context, in_decoder

    def __call__(self, h: Tensor) -> Tensor:
        """The weights for the input of an MLP."""
        mask = self.context.decoder_mask if self.in_decoder else self.context.mask
        if mask is not None and mask.shape != h.shape[:2]:
            mask = None  # with a cache of keys, or a decoder's own tokens
        weights = self.router(h, mask)
        return weights.mean(0, keepdim=True).expand_as(weights) if self.context.average else weights


class SubspaceGate:
    """SMILE's (arXiv:2408.10174): how much of a token lies in the first directions that an expert reads. No data.

    Softmax over experts of ‖V_{k,1:g}ᵀ x‖, of which the `top` are kept and made to add up to one; for every token.
    """

    def __init__(self, parts: Parts, directions: int, top: int) -> None:
        self.parts, self.top = parts, top
        at, rows = 0, []
        for rank in parts.store.ranks:
            rows += range(at, at + min(directions, rank))
            at += rank
        self.rows, self.counts = rows, [min(directions, rank) for rank in parts.store.ranks]

    def __call__(self, x: Tensor) -> Tensor:
        """[B, T, n] → [B, T, K]."""
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        read = nn.functional.linear(x, self.parts.open(x)["down"][self.rows])
        sizes = torch.stack([part.norm(dim=-1) for part in read.split(self.counts, dim=-1)], dim=-1)
        return of_top(sizes.softmax(-1), self.top)


def of_top(shares: Tensor, top: int) -> Tensor:
    """The `top` largest shares, made to add up to one; the others zero. 0 keeps all."""
    if not 0 < top < shares.shape[-1]:
        return shares
    values, places = shares.topk(top, dim=-1)
    return torch.zeros_like(shares).scatter(-1, places, values / values.sum(-1, keepdim=True))


def token_mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over a sample's tokens that are not padding: [B, T, d] → [B, d]."""
    if mask is None:
        return tokens.mean(1)
    share = mask.to(tokens.dtype).unsqueeze(-1)
    return (tokens * share).sum(1) / share.sum(1).clamp_min(1)


class Features:
    """Routes a whole model by features of its own forward pass without any expert."""

    def __init__(self, router: FeatureRouter, route: Route, context: Context, top: int) -> None:
        self.router, self.route, self.context, self.top = router, route, context, top
        self.route.top = top

    def decide(self, features: Tensor) -> Tensor:
        """Features [B, d] → weights [B, K]."""
        weight: Any = self.router.layers[0].weight
        shares = self.router(features.to(weight.dtype)).softmax(-1)
        if self.context.average:
            shares = shares.mean(0, keepdim=True).expand_as(shares)
        return of_top(shares, self.top)
