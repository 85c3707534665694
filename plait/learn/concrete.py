"""Concrete subspace learning (arXiv:2312.06173): a mask shared by all experts, alone or in turn with coefficients.

W = W0 + a·S with S = Σ_k λ_k τ_k, a = m/mean(m), m = σ((logit u + x)/T). With G = ∂L/∂W:
∂L/∂a = G·S,  ∂L/∂m = (∂L/∂a − ⟨∂L/∂a, m⟩/(n·mean(m)))/mean(m),  ∂L/∂x = ∂L/∂m · m(1 − m)/T,  ∂L/∂λ_k = ⟨G·a, τ_k⟩.
What is held is a few copies of the model (x, Adam's two moments, m, and S where λ is fixed), however many experts.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from plait.learn.bench import Loss, Workbench
from plait.learn.coefficients import Coefficients, combine
from plait.learn.vectors import TaskVectors
from plait.methods.learned import BilevelFit, MaskFit, concrete, expected
from plait.state import quantised


class Mask:
    """Logits of every tensor that some expert changes, and one draw of the mask at a time."""

    def __init__(self, bench: Workbench, vectors: TaskVectors, options: MaskFit | BilevelFit, seed: int) -> None:
        self.vectors, self.temperature, self.seed = vectors, options.concrete, seed
        self.names = bench.learn(vectors.names)
        self.device = bench.net.device
        self.logits = {
            name: torch.zeros(vectors.base(name).numel(), device=self.device, requires_grad=True) for name in self.names
        }
        self.adam = torch.optim.Adam(list(self.logits.values()), lr=options.lr, foreach=False)
        self._drawn: dict[str, Tensor] = {}

    def draw(self, index: int) -> None:
        """A fresh mask, a function of (seed, index, tensor) alone."""
        for name in self.names:
            key = hashlib.sha256(f"{self.seed}\0{index}\0{name}".encode()).digest()
            random = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
            noise = torch.rand(self.logits[name].numel(), generator=random).to(self.device)
            self._drawn[name] = concrete(self.logits[name].detach(), noise, self.temperature)

    def settle(self) -> None:
        """The mask without noise, as the state will store it."""
        for name in self.names:
            stored, scale = quantised(self.logits[name].detach())
            self._drawn[name] = expected(stored.to(self.device).float() * scale.to(self.device), self.temperature)

    def share(self, name: str) -> Tensor:
        """a = m/mean(m), [n]."""
        mask = self._drawn[name]
        return mask / mask.mean()

    def pull(self, name: str, gradient: Tensor, total: Tensor) -> None:
        """Set the logits' gradient from the weight's [n] and S [n]."""
        mask = self._drawn[name]
        mean = mask.mean()
        towards = gradient * total
        inner = (towards - torch.dot(towards, mask) / (mask.numel() * mean)) / mean
        self.logits[name].grad = inner.mul_(mask * (1 - mask)).div_(self.temperature)

    def values(self) -> dict[str, Tensor]:
        """The logits."""
        return {f"x/{name}": value.detach() for name, value in self.logits.items()}

    def set_values(self, values: dict[str, Tensor]) -> None:
        """Go back to logits of before."""
        with torch.no_grad():
            for name, value in self.logits.items():
                value.copy_(values[f"x/{name}"])

    def facts(self) -> dict[str, float]:
        """How far the mask went from its start: the logits' spread, and the share of entries below one half."""
        count = sum(value.numel() for value in self.logits.values())
        square = sum(float(value.detach().square().sum()) for value in self.logits.values())
        below = sum(int(torch.count_nonzero(value.detach() < 0)) for value in self.logits.values())
        return {"logit_rms": (square / count) ** 0.5, "masked_out": below / count}

    def numbers(self) -> dict[str, Tensor]:
        """What goes into the state: one byte an entry."""
        found = {}
        for name, value in self.logits.items():
            stored, scale = quantised(value.detach())
            found[f"mask/{name}"] = stored.view(self.vectors.shape(name))
            found[f"mask_scale/{name}"] = scale
        return found


class ConcreteTaskArithmetic:
    """The mask alone; all task vectors have one fixed weight."""

    def __init__(self, bench: Workbench, vectors: TaskVectors, options: MaskFit, loss: Loss, seed: int) -> None:
        self.bench, self.vectors, self.options, self.loss = bench, vectors, options, loss
        self.mask = Mask(bench, vectors, options, seed)
        weights = torch.full((len(vectors.tasks),), options.init)
        self._sums = {name: total(vectors, name, weights, bench.net.device) for name in self.mask.names}
        """S of every tensor. It never changes, so a step costs the same however many experts there are."""

    def step(self, index: int) -> dict[str, float]:
        """A fresh draw, one batch, one step of Adam on the logits."""
        self.mask.draw(index)
        rows = self.bench.inputs.batch(index, self.options.batch)
        terms = self.bench.gradients(rows, self.loss, self._merged, self._collect)
        self.mask.adam.step()
        return terms

    def _merged(self, name: str) -> Tensor:
        return self.mask.share(name).mul_(self._sums[name]).add_(self.vectors.base(name).to(self.bench.net.device))

    def _collect(self, name: str, gradient: Tensor) -> None:
        self.mask.pull(name, gradient, self._sums[name])

    def values(self) -> dict[str, Tensor]:
        """The logits."""
        return self.mask.values()

    def set_values(self, values: dict[str, Tensor]) -> None:
        """Go back to logits of before."""
        self.mask.set_values(values)

    def optimisers(self) -> list[torch.optim.Optimizer]:
        """The mask's."""
        return [self.mask.adam]

    def show(self) -> None:
        """Set the model's weights, with the mask without noise."""
        self.mask.settle()
        for name in self.mask.names:
            self.bench.install(name, self._merged(name))

    def facts(self) -> dict[str, float]:
        """The mask's."""
        return self.mask.facts()


class ConcreteAdaMerging:
    """Mask and coefficients in turn: coefficients take one step from their start, the mask one step at where they came.

    First order: the gradient does not go through the coefficients' step.
    """

    def __init__(self, bench: Workbench, vectors: TaskVectors, options: BilevelFit, loss: Loss, seed: int) -> None:
        self.bench, self.vectors, self.options, self.loss = bench, vectors, options, loss
        self.mask = Mask(bench, vectors, options, seed)
        self.inner = Coefficients(bench, vectors, options, loss, share=self.mask.share)
        kind = torch.optim.SGD if options.inner == "sgd" else torch.optim.Adam
        self.inner_optimiser = kind([self.inner.lambdas], lr=options.inner_lr)

    def step(self, index: int) -> dict[str, float]:
        """Two batches and two draws: one step of the coefficients from their start, one of the mask."""
        with torch.no_grad():
            self.inner.lambdas.fill_(self.options.init)
        self.mask.draw(2 * index)
        terms = self.inner.pull(self.bench.inputs.batch(2 * index, self.options.batch))
        if not all(value == value for value in terms.values()):
            return terms
        self.inner_optimiser.step()
        self.inner.clamp()
        self.mask.draw(2 * index + 1)
        rows = self.bench.inputs.batch(2 * index + 1, self.options.batch)
        terms = self.bench.gradients(rows, self.loss, self.inner.weights, self._collect)
        self.mask.adam.step()
        return terms

    def _collect(self, name: str, gradient: Tensor) -> None:
        self.mask.pull(name, gradient, total(self.vectors, name, self.inner.of(name), gradient.device))

    def values(self) -> dict[str, Tensor]:
        """Logits and coefficients."""
        return {**self.mask.values(), **self.inner.values()}

    def set_values(self, values: dict[str, Tensor]) -> None:
        """Go back to values of before."""
        self.mask.set_values(values)
        self.inner.set_values(values)

    def optimisers(self) -> list[torch.optim.Optimizer]:
        """The mask's, and the coefficients'."""
        return [self.mask.adam, self.inner_optimiser]

    def show(self) -> None:
        """Set the model's weights: the mask without noise, the coefficients of their start."""
        self.mask.settle()
        start = torch.full((len(self.vectors.tasks),), self.options.init)
        for name in self.mask.names:
            self.bench.install(name, combine(self.bench, self.vectors, name, start, self.mask.share(name)))

    def facts(self) -> dict[str, float]:
        """The mask's, and the coefficients' range after their one step."""
        return {**self.mask.facts(), **self.inner.facts()}


def total(vectors: TaskVectors, name: str, weights: Tensor, device: torch.device) -> Tensor:
    """S = Σ_k w_k v_k, [n]."""
    return weights.to(device) @ vectors.rows(name).to(device)
