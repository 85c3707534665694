"""Whether a fit is still getting better, told from unlabeled inputs: a falling loss says nothing.

On inputs that are only watched, the merged model answers beside each task's own expert. The divergence
KL(expert ‖ merged) says best how good a state is (docs/LOG.md) and chooses among them. Beside it stand agreement (share
of equal answers), the entropy of the mean prediction (falls when one class swallows the others), and the entropy of
single predictions (below the expert's own it is over-confidence, not skill).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

COLLAPSED = 0.65
"""Share of the expert's spread over classes below which a task counts as collapsing (docs/LOG.md)."""
_FALL = 0.1
"""A narrow prediction is a collapse only where agreement also fell by this much: some tasks begin narrow."""
_RISE = 1.2
"""A divergence so many times the best one ends the fit."""


@dataclass(frozen=True)
class Reading:
    """One task at one moment."""

    agreement: float
    """Share of watched inputs on which the merged model answers as the expert does."""
    divergence: float
    """Mean KL(expert ‖ merged), in nats."""
    spread: float
    """Entropy of the mean prediction, as a share of the expert's."""
    entropy: float
    """Mean entropy of the predictions, in nats."""


@dataclass
class Guard:
    """Judges a fit from check to check, and remembers the best state."""

    experts: dict[str, Tensor]
    """Task → the expert's scores on the watched inputs."""
    stops: bool = True
    best_step: int = 0
    best: float = math.inf
    """Lowest mean divergence so far."""
    verdict: str = ""
    """Why the fit was stopped, in plain words; empty while all is well."""
    best_values: dict[str, Tensor] = field(default_factory=dict)
    _best_of_task: dict[str, float] = field(default_factory=dict)

    def read(self, scores: dict[str, Tensor]) -> dict[str, Reading]:
        """Readings of all tasks from the merged model's scores on the watched inputs."""
        return {task: reading(scores[task], expert) for task, expert in self.experts.items()}

    def judge(self, step: int, readings: dict[str, Reading], values: dict[str, Tensor]) -> bool:
        """Take note of a check; True where the fit should end."""
        mean = mean_of(readings, "divergence")
        if mean < self.best:
            self.best, self.best_step = mean, step
            self.best_values = {name: value.detach().clone() for name, value in values.items()}
        for task, found in readings.items():
            self._best_of_task[task] = max(self._best_of_task.get(task, 0.0), found.agreement)
        if not self.stops:
            return False
        self.verdict = self._collapse(readings) or self._decline(mean)
        return bool(self.verdict)

    def _collapse(self, readings: dict[str, Reading]) -> str:
        for task, found in readings.items():
            if found.spread < COLLAPSED and found.agreement < self._best_of_task[task] - _FALL:
                return (
                    f"the predictions of {task} collapse: their mean has {found.spread:.0%} of the expert's entropy, "
                    f"and agreement with the expert fell from {self._best_of_task[task]:.0%} to {found.agreement:.0%}"
                )
        return ""

    def _decline(self, mean: float) -> str:
        """What is learned since the best state only harms."""
        if mean <= _RISE * self.best:
            return ""
        return (
            f"the divergence from the experts rose from {self.best:.3f} to {mean:.3f} since step {self.best_step}, "
            "though the loss went on falling"
        )

    def summary(self, readings: dict[str, Reading]) -> dict[str, Any]:
        """Where the fit ended, per task, beside the experts' own entropy."""
        own = {task: entropy_of(scores) for task, scores in self.experts.items()}
        confident = [task for task, found in readings.items() if found.entropy < own[task]]
        return {
            "verdict": self.verdict, "best_step": self.best_step,
            "tasks": {
                task: {**vars(found), "expert_entropy": own[task]} for task, found in readings.items()
            },
            "more_confident_than_the_expert": confident,
        }  # fmt: skip


def reading(scores: Tensor, expert: Tensor) -> Reading:
    """One task's scores [n, classes] against its expert's."""
    logp, target = scores.log_softmax(-1), expert.log_softmax(-1)
    whole = _entropy(target.exp().mean(0))
    return Reading(
        agreement=float((scores.argmax(-1) == expert.argmax(-1)).float().mean()),
        divergence=float((target.exp() * (target - logp)).sum(-1).mean()),
        spread=_entropy(logp.exp().mean(0)) / whole if whole > 0 else 1.0,
        entropy=entropy_of(scores),
    )


def entropy_of(scores: Tensor) -> float:
    """Mean entropy of the predictions, in nats."""
    logp = scores.log_softmax(-1)
    return float(-(logp.exp() * logp).sum(-1).mean())


def mean_of(readings: dict[str, Reading], what: str) -> float:
    """Mean over the tasks."""
    return sum(getattr(found, what) for found in readings.values()) / len(readings)


def _entropy(p: Tensor) -> float:
    return float(-torch.xlogy(p, p).sum())
