"""AdaMerging: learn λ of every expert and granule. θ_l = θ0_l + Σ_k λ_k,l τ_k,l, and ∂L/∂λ_k,l = ⟨∂L/∂θ_l, τ_k,l⟩."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from plait.learn.bench import Loss, Workbench
from plait.learn.vectors import TaskVectors
from plait.methods.learned import CoefficientFit
from plait.state import group_of

Share = Callable[[str], "Tensor | None"]
"""Name of a tensor → what all its task vectors are multiplied with, entry by entry, [n]."""


class Coefficients:
    """One coefficient per expert and granule, learned by Adam."""

    def __init__(
        self, bench: Workbench, vectors: TaskVectors, options: CoefficientFit, loss: Loss, *, lr: float | None = None,
        share: Share | None = None, offset: int = 0,
    ) -> None:  # fmt: skip
        self.bench, self.vectors, self.options, self.loss, self.offset = bench, vectors, options, loss, offset
        self.share: Share = share or (lambda name: None)
        self.names = bench.learn(vectors.names)
        self.group = {name: group_of(name, options.granularity) for name in self.names}
        self.groups = sorted(set(self.group.values()))
        self._index = {group: place for place, group in enumerate(self.groups)}
        shape = (len(self.groups), len(vectors.tasks))
        self.lambdas = torch.full(shape, options.init, requires_grad=True)
        self.lambdas.grad = torch.zeros(shape)
        self.adam = torch.optim.Adam([self.lambdas], lr=lr or options.lr)

    def step(self, index: int) -> dict[str, float]:
        """One batch of every task, one step of Adam."""
        rows = self.bench.inputs.batch(index + self.offset, self.options.batch)
        terms = self.pull(rows)
        self.adam.step()
        self.clamp()
        return terms

    def pull(self, rows: dict[str, list[int]]) -> dict[str, float]:
        """The gradient at these rows, into `lambdas.grad`; gives the tasks' losses."""
        grad = self.lambdas.grad
        assert grad is not None
        grad.zero_()
        terms = self.bench.gradients(rows, self.loss, self.weights, self._collect)
        if self.options.stay:
            grad += 2 * self.options.stay / grad.numel() * (self.lambdas.detach() - self.options.init)
        return terms

    def clamp(self) -> None:
        """Into [0, 1], where asked for."""
        if self.options.clamp:
            with torch.no_grad():
                self.lambdas.clamp_(0, 1)

    def weights(self, name: str) -> Tensor:
        """θ of one tensor, [n]."""
        return combine(self.bench, self.vectors, name, self.of(name), self.share(name))

    def of(self, name: str) -> Tensor:
        """[K]: a tensor's coefficients."""
        return self.lambdas.detach()[self._index[self.group[name]]]

    def _collect(self, name: str, gradient: Tensor) -> None:
        share = self.share(name)
        found = products(self.vectors, name, gradient if share is None else gradient * share)
        assert self.lambdas.grad is not None
        self.lambdas.grad[self._index[self.group[name]]] += found

    def values(self) -> dict[str, Tensor]:
        """λ, [granules, K]."""
        return {"lambdas": self.lambdas.detach()}

    def set_values(self, values: dict[str, Tensor]) -> None:
        """Go back to values of before."""
        with torch.no_grad():
            self.lambdas.copy_(values["lambdas"])

    def optimisers(self) -> list[torch.optim.Optimizer]:
        """Adam."""
        return [self.adam]

    def show(self) -> None:
        """Set the model's weights."""
        for name in self.names:
            self.bench.install(name, self.weights(name))

    def facts(self) -> dict[str, float]:
        """Range and mean of the coefficients."""
        values = self.lambdas.detach()
        return {
            "coefficient_min": float(values.min()), "coefficient_mean": float(values.mean()),
            "coefficient_max": float(values.max()),
        }  # fmt: skip

    def numbers(self) -> dict[str, Tensor]:
        """What goes into the state."""
        return {f"coefficients/{group}": self.lambdas.detach()[place].clone() for group, place in self._index.items()}


def combine(
    bench: Workbench, vectors: TaskVectors, name: str, weights: Sequence[float] | Tensor, share: Tensor | None
) -> Tensor:
    """θ0 + share · Σ_k w_k v_k of one tensor, [n], on the bench's device."""
    device = bench.net.device
    total = torch.as_tensor(weights, dtype=torch.float32).to(device) @ vectors.rows(name).to(device)
    return total.mul_(share).add_(vectors.base(name).to(device)) if share is not None else total.add_(
        vectors.base(name).to(device)
    )  # fmt: skip


def products(vectors: TaskVectors, name: str, gradient: Tensor) -> Tensor:
    """[K]: inner products of a gradient [n] with the vectors."""
    return (vectors.rows(name).to(gradient.device) @ gradient).cpu()
