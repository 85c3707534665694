"""Representation surgery (arXiv:2402.02705): for each task a low-rank correction of the merged model's features.

z' = z − W_up ReLU(W_down z), with the least mean |z' − z_expert| on the task's own inputs. The encoder does not change,
so the features of all inputs are computed once, and what is trained reads them from memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.errors import RecipeError
from plait.learn.bench import Workbench
from plait.learn.vectors import TaskVectors
from plait.methods.fitted import SurgeryFit
from plait.models.heads import DOWN, UP, Head, corrected

_CHECKS = 40
"""How often the distance on watched inputs is looked at."""


@dataclass
class Correction:
    """One task's correction, and how far its features are from the expert's on inputs that were only watched."""

    down: Tensor
    """[rank, width]"""
    up: Tensor
    """[width, rank]"""
    before: float
    after: float
    kept_step: int
    features: Tensor
    """The watched inputs' features, corrected."""


def operate(bench: Workbench, vectors: TaskVectors, options: SurgeryFit) -> dict[str, Correction]:
    """Train every task's correction on top of base + Σ_k v_k. Raises RecipeError for models that have no heads."""
    inputs = bench.inputs
    if bench.net.family.answers != "head":
        raise RecipeError("surgery: corrects what a head reads, and this model answers in text; use another method")
    rows = {task: [*inputs.learn[task].tolist(), *inputs.watch[task].tolist()] for task in inputs.tasks}
    bench.engine.progress.stage("features", 2 * len(rows), "passes")
    wanted: dict[str, Tensor] = {}
    for task in rows:
        bench.install_expert(task)
        wanted |= bench.features({task: rows[task]})
        bench.engine.progress.advance(1)
    bench.load_base()
    for name in vectors.names:
        if name in bench.places:
            bench.install(name, vectors.base(name) + vectors.rows(name).sum(0))
    found = bench.features(rows)
    bench.engine.progress.stage("surgery", len(rows) * options.steps, "steps")
    batches = [inputs.batch(step, options.batch) for step in range(options.steps)]
    return {task: _correct(bench, options, task, found[task], wanted[task], batches) for task in rows}


def _correct(
    bench: Workbench, options: SurgeryFit, task: str, features: Tensor, wanted: Tensor,
    batches: Sequence[Mapping[str, Sequence[int]]],
) -> Correction:  # fmt: skip
    """Train one correction: features and the expert's [n, width], those to watch last."""
    learned, width = len(bench.inputs.learn[task]), features.shape[1]
    place = {row: at for at, row in enumerate(bench.inputs.learn[task].tolist())}
    start = bench.inputs.random(task, "surgery").uniform(-1, 1, (options.rank, width)) / np.sqrt(width)
    down = torch.tensor(start, dtype=torch.float32, device=features.device, requires_grad=True)
    # From zero, so that the first step is the merge as it is.
    up = torch.zeros((width, options.rank), device=features.device, requires_grad=True)
    adam = torch.optim.Adam([down, up], lr=options.lr)
    watched = slice(learned if learned < len(features) else 0, None)
    seen, target = features[watched], wanted[watched]
    kept = before = _distance(seen, down, up, target)
    best, kept_step = (down.detach().clone(), up.detach().clone()), 0
    every = max(1, options.steps // _CHECKS)
    for step, batch in enumerate(batches, 1):
        at = [place[row] for row in batch[task]]
        loss = (corrected(features[at], down, up) - wanted[at]).abs().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        bench.engine.progress.advance(1)
        if step % every and step != options.steps:
            continue
        distance = _distance(seen, down, up, target)
        if distance < kept if options.guard else step == options.steps:
            kept, kept_step, best = distance, step, (down.detach().clone(), up.detach().clone())
    return Correction(*best, before, kept, kept_step, corrected(seen, *best))


@torch.no_grad()
def _distance(features: Tensor, down: Tensor, up: Tensor, wanted: Tensor) -> float:
    return float((corrected(features, down, up) - wanted).abs().mean())


def head_numbers(bench: Workbench, found: Mapping[str, Correction]) -> dict[str, Tensor]:
    """`heads/TASK/NAME` of a state: the corrections, with the whole head where the merge has none of its own."""
    numbers: dict[str, Tensor] = {}
    for task, correction in found.items():
        own = {} if task in bench.plan.heads else bench.net.heads[task].tensors
        given = {**own, DOWN: correction.down, UP: correction.up}
        numbers |= {f"heads/{task}/{name}": value.detach().cpu() for name, value in given.items()}
    return numbers


def head_labels(bench: Workbench) -> dict[str, list[str]]:
    """Class names of the heads that are stored whole, in the order of their outputs."""
    return {
        task: names
        for task, head in bench.net.heads.items()
        if task not in bench.plan.heads and (names := _output_names(head)) is not None
    }


def _output_names(head: Head) -> list[str] | None:
    if head.names is None or head.order is None:
        return head.names
    return [name for _, name in sorted(zip(head.order, head.names, strict=True))]


def facts(found: Mapping[str, Correction]) -> dict[str, Any]:
    """Mean distance of every task's features from its expert's, before and after, and the step that was kept."""
    return {
        task: {"before": item.before, "after": item.after, "kept_step": item.kept_step} for task, item in found.items()
    }
