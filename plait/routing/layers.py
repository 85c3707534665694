"""Layers whose parameters are a base plus what experts add, mixed for every sample by weights that a route holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap  # type: ignore[attr-defined]
from torch.nn.functional import embedding

from plait.routing import mixing
from plait.routing.stores import Store


class Route:
    """What a group of layers is mixed with now. Routers and switches write it, layers read it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.weights: Tensor | None = None
        """[batch, K], or [batch, tokens, K]; None: the base alone."""
        self.last: Tensor | None = None
        self.top = 0
        """How many experts a router gives to a sample at most; 0: all."""
        self.fixed = False
        self.held = False
        """Keep what is there: a sequence is routed once, by its prompt."""

    def set(self, weights: Tensor | None) -> None:
        """Take new weights, unless the old ones are held."""
        if not (self.held or self.fixed) or self.weights is None:
            self.weights = weights

    def fix(self, weights: Tensor) -> None:
        """Take one expert a sample, by its task; no router replaces it in this forward pass."""
        self.weights, self.fixed = weights, True

    def rest(self) -> None:
        """A forward pass has ended: forget, except for what was used last, for those who ask."""
        self.last, self.fixed = self.weights, False
        if not self.held:
            self.weights = None

    def of(self, samples: int) -> Tensor | None:
        """The weights for a batch of so many samples: a prompt's are repeated for its beams."""
        weights = self.weights
        if weights is None or len(weights) == samples:
            return weights
        if len(weights) == 1:
            return weights.expand(samples, *weights.shape[1:])
        if samples % len(weights):
            raise ValueError(
                f"route '{self.name}': a batch of {samples} does not go with weights for {len(weights)} samples; give "
                "one task for all, or one of every sample"
            )
        return weights.repeat_interleave(samples // len(weights), 0)


class Parts(nn.Module):
    """One parameter's experts, as they are stored. What was packed is unpacked on first use and kept."""

    owner: Tensor
    """low_rank: the expert of every direction, [ΣR]."""

    def __init__(self, store: Store, stored: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.store = store
        for name, value in stored.items():
            self.register_buffer(name, value)
        owner = [k for k, rank in enumerate(store.ranks) for _ in range(rank)]
        self.register_buffer("owner", torch.tensor(owner, dtype=torch.long), persistent=False)
        self._open: dict[str, Tensor] | None = None

    def stored(self) -> dict[str, Tensor]:
        """What is written into a file."""
        return {name: value for name, value in self.named_buffers() if name != "owner"}

    def open(self, like: Tensor) -> dict[str, Tensor]:
        """Numbers that can be computed with, in the type of `like`."""
        if self._open is None or next(iter(self._open.values())).dtype != like.dtype:
            found = self.store.decode(self.stored())
            self._open = {name: v if v.dtype == torch.bool else v.to(like.dtype) for name, v in found.items()}
        return self._open

    def deltas(self, like: Tensor, picked: list[int] | None = None) -> Tensor:
        """[A, *shape]: what the experts add."""
        return self.store.deltas(self.open(like), picked)

    def _apply(self, fn: Any, recurse: bool = True) -> Parts:
        self._open = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}


class Routed(nn.Module):
    """A layer and what experts add to its parameters."""

    def __init__(self, base: nn.Module, experts: Mapping[str, Parts], route: Route) -> None:
        super().__init__()
        self.base = base
        self.experts = nn.ModuleDict(experts)
        self.route = route
        self.router: Any = None
        """For the first layer of a group that decides by its own input: called with it, before anything else."""

    def parts(self, name: str) -> Parts | None:
        """The experts of one parameter; None where they are all the base's."""
        found: Any = self.experts
        return found[name] if name in found else None  # noqa: SIM401  (a ModuleDict has no get)

    def decided(self, x: Tensor) -> Tensor | None:
        """The weights for this input."""
        if self.router is not None:
            self.route.set(self.router(x))
        weights = self.route.of(x.shape[0])
        return None if weights is None else weights.to(x.device)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # in_features, weight, eps, …: what the architecture's own code asks of its layer
            return getattr(super().__getattr__("base"), name)


def steerable(weights: Tensor) -> bool:
    """Whether code may look at the weights' values and take another way for them."""
    return not (weights.requires_grad or torch.compiler.is_compiling() or torch.compiler.is_exporting())


class RoutedLinear(Routed):
    """y = x (W0 + Σ w_k ΔW_k)ᵀ + b0 + Σ w_k Δb_k."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, …, n] → [B, …, m]."""
        weights = self.decided(x)
        base: Any = self.base
        if weights is None:
            return base(x)
        weights = weights.to(x.dtype)
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        parts, bias = self.parts("weight"), base.bias
        own = self.parts("bias")
        if own is not None:
            added = weights @ own.deltas(x)
            added = added if added.ndim == 3 else added.unsqueeze(1)
            bias = added if bias is None else added + bias
        if parts is None:
            y = mixing.plain(rows, base.weight, bias)
        elif parts.store.kind == "low_rank":
            found, ranks = parts.open(x), set(parts.store.ranks)
            y = mixing.low_rank(
                rows, weights, base.weight, found["down"], found["up"], parts.owner,
                rank=ranks.pop() if len(ranks) == 1 else 0, top=1 if self.route.fixed else self.route.top, bias=bias,
            )  # fmt: skip
        else:
            y = mixing.dense(
                rows, weights, base.weight, lambda picked: parts.deltas(x, picked), steerable(weights), bias
            )  # fmt: skip
        return y.view(*x.shape[:-1], y.shape[-1])


class RoutedEmbedding(Routed):
    """Rows of E0 + Σ w_k ΔE_k."""

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] → [B, T, d]."""
        known = self.route.weights
        if known is not None and len(ids) == 1 < len(known):  # positions, which are the same for all samples
            ids = ids.expand(len(known), *ids.shape[1:])
        weights = self.decided(ids)
        base: Any = self.base
        y = base(ids)
        parts = self.parts("weight")
        if weights is None or parts is None:
            return y
        weights = weights.to(y.dtype)
        if weights.ndim == 2:
            weights = weights.unsqueeze(1)
        if parts.store.kind == "low_rank":
            found = parts.open(y)
            return y + (embedding(ids, found["up"].T) * weights[..., parts.owner]) @ found["down"]
        for k in range(weights.shape[-1]):
            y = torch.addcmul(y, embedding(ids, parts.deltas(y, [k])[0]), weights[..., k : k + 1])
        return y


class RoutedSmall(Routed):
    """Any layer with small parameters (norms, scales, patch projections): every sample has its own, by vmap."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the layer itself, one sample at a time and all at once."""
        weights = self.decided(x)
        if weights is None or weights.ndim == 3:
            return self.base(x, *args, **kwargs)
        own = {}
        for name, parts in self.experts.items():
            name = name.replace("/", ".")
            value = self.base.get_parameter(name)
            own[name] = mixing.own_weights(weights.to(value.dtype), value, parts.deltas(value))  # type: ignore[operator]

        def one(params: dict[str, Tensor], sample: Tensor) -> Any:
            return functional_call(self.base, params, (sample.unsqueeze(0), *args), kwargs).squeeze(0)

        return vmap(one, randomness="different")(own, x)


def layer_for(base: nn.Module) -> type[Routed]:
    """Which routed layer takes a layer's place."""
    if type(base) is nn.Linear:
        return RoutedLinear
    return RoutedEmbedding if type(base) is nn.Embedding else RoutedSmall
