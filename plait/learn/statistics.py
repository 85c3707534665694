"""Fisher merging (arXiv:2111.09832): how much every expert's own answers depend on each of its entries.

F_k = 1e-6 + mean over inputs of Σ_y p(y) (∂ log p(y)/∂θ)² at θ_k, and Δ = Σ_k a_k F_k τ_k / Σ_k a_k F_k.

Squares are taken of the gradients of single inputs. So there is one forward for every input: it works on every
architecture, and holds one gradient beside the two sums, whose memory does not depend on the number of experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.learn.bench import Workbench
from plait.learn.vectors import TaskVectors
from plait.methods.block import per_model
from plait.methods.fitted import FisherFit

LEAST = 1e-6
"""Added to every F_k: where no expert's answers depend on an entry, its weighted mean is taken."""


class Fisher:
    """Σ_k a_k F_k τ_k and Σ_k a_k F_k of every tensor, [n] float32 each."""

    def __init__(self, bench: Workbench, vectors: TaskVectors, options: FisherFit) -> None:
        self.bench, self.vectors, self.options = bench, vectors, options
        self.names = bench.learn(vectors.names)
        keywords = {tensor.key: tensor.keywords for tensor in bench.plan.merged}
        count = len(vectors.tasks)
        self.weights = {name: per_model(keywords[name].get("weight", 1.0), count) for name in self.names}
        self.above = {name: self._zeros(name) for name in self.names}
        self.below = {name: self._zeros(name) for name in self.names}

    def _zeros(self, name: str) -> Tensor:
        return torch.zeros(self.vectors.base(name).numel(), device=self.bench.net.device)

    def measure(self) -> dict[str, int]:
        """Go through every expert's inputs; gives how many there were of each."""
        bench, rows = self.bench, self.bench.inputs.some(self.options.inputs)
        bench.engine.progress.stage("fisher", sum(map(len, rows.values())), "inputs")
        for k, task in enumerate(self.vectors.tasks):
            bench.install_expert(task)
            for name in self.names:
                self._add(name, k, torch.full_like(self.below[name], LEAST), 1.0)
            for row in rows[task]:
                for share, gradients in self._gradients(task, row):
                    for name, gradient in zip(self.names, gradients, strict=True):
                        if gradient is not None:
                            square = gradient.reshape(-1).float().square()
                            self._add(name, k, square, share / len(rows[task]))
                bench.engine.progress.advance(1)
        return {task: len(listed) for task, listed in rows.items()}

    def _add(self, name: str, k: int, square: Tensor, share: float) -> None:
        share *= self.weights[name][k]
        self.below[name].add_(square, alpha=share)
        self.above[name].addcmul_(square, self.vectors.rows(name)[k].to(square.device), value=share)

    def _gradients(self, task: str, row: int) -> Iterator[tuple[float, Sequence[Tensor | None]]]:
        """(p, gradient of log p of one answer to one input), for the answers that count."""
        scores = self.bench.outputs(self.bench.inputs.collate(self.bench.net, {task: [row]}))[task][0].float()
        places = [self.bench.places[name] for name in self.names]
        if len(scores) == 1:  # a number: log p of a Gaussian round it, of variance 1
            yield 1.0, torch.autograd.grad(scores[0], places, allow_unused=True)
            return
        logp = scores.log_softmax(-1)
        p = logp.detach().double().exp().cpu().numpy()
        answers: Sequence[int] = range(len(p))
        if self.options.labels == "sampled":
            drawn = np.searchsorted(np.cumsum(p), self.bench.inputs.random(task, f"label {row}").random() * p.sum())
            answers, p = [min(int(drawn), len(p) - 1)], np.ones(len(p))
        for answer in answers:
            last = answer == answers[-1]
            yield float(p[answer]), torch.autograd.grad(logp[answer], places, allow_unused=True, retain_graph=not last)

    def deltas(self) -> dict[str, Tensor]:
        """Δ of every tensor."""
        return {name: self.above[name] / self.below[name] for name in self.names}


def fisher(bench: Workbench, vectors: TaskVectors, options: FisherFit) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Task vectors of the merged model, and facts."""
    found = Fisher(bench, vectors, options)
    used = found.measure()
    return found.deltas(), {"inputs": used}
