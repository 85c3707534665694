"""The loop of every fit by gradients: steps, checks, the guard, history, and going on after an interruption."""

from __future__ import annotations

import io
import math
import pickle
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from plait import atomic
from plait.errors import MachineError, RecipeError
from plait.learn.bench import Workbench
from plait.learn.guard import Guard, Reading, mean_of
from plait.stages import Progress

_SAVE_SECONDS = 20.0


class Learner(Protocol):
    """What is learned, and how one step of it goes."""

    def step(self, index: int) -> dict[str, float]:
        """One step; the loss of every task, before it."""
        ...

    def values(self) -> dict[str, Tensor]:
        """What is learned, in tensors that `set_values` takes back."""
        ...

    def set_values(self, values: dict[str, Tensor]) -> None:
        """Go back to values of before."""
        ...

    def optimisers(self) -> list[torch.optim.Optimizer]:
        """Their state is saved with the values."""
        ...

    def show(self) -> None:
        """Set the model's weights to what would be merged now."""
        ...

    def facts(self) -> dict[str, float]:
        """Numbers for the history and the progress bar, such as the coefficients' range."""
        ...


@dataclass
class History:
    """What happened, step by step."""

    loss: list[float] = field(default_factory=list)
    """Sum over the tasks, at every step."""
    checks: list[dict[str, Any]] = field(default_factory=list)
    """At every check: step, readings per task and their means, the learner's facts."""


def run(
    learner: Learner, bench: Workbench, guard: Guard | None, steps: int, work: Path, progress: Progress, name: str
) -> History:
    """Take the steps. Ends early where the guard says so, and then goes back to the best state.

    Progress is saved in `work`; a later call with the same learner goes on from there, to the same result. Raises
    RecipeError where the loss is no longer a number.
    """
    saved = work / f"{name}.pt"
    history, start = _resume(saved, learner, guard)
    every = max(5, -(-steps // 25))
    progress.stage(f"learn {name}", steps, "steps")
    progress.advance(start)
    said = time.monotonic()
    if guard is not None and start == 0:
        _check(0, learner, bench, guard, history)
    for step in range(start, steps):
        if guard is not None and guard.verdict:
            break
        terms = learner.step(step)
        _refuse_nan(terms, step)
        history.loss.append(sum(terms.values()))
        progress.advance(1)
        last = step + 1 == steps
        if guard is not None and ((step + 1) % every == 0 or last):
            _check(step + 1, learner, bench, guard, history)
        progress.note(_text(history, learner))
        if time.monotonic() - said > _SAVE_SECONDS or last:
            _save(saved, step + 1, learner, guard, history)
            said = time.monotonic()
    if guard is not None and guard.stops and guard.best_values:
        learner.set_values(guard.best_values)
    return history


def _check(step: int, learner: Learner, bench: Workbench, guard: Guard, history: History) -> dict[str, Reading]:
    learner.show()
    readings = guard.read(bench.answers({task: rows.tolist() for task, rows in bench.inputs.watch.items()}))
    guard.judge(step, readings, learner.values())
    history.checks.append(
        {
            "step": step, **{key: mean_of(readings, key) for key in ("agreement", "divergence", "spread", "entropy")},
            "tasks": {task: vars(found) for task, found in readings.items()}, **learner.facts(),
        }
    )  # fmt: skip
    return readings


def _text(history: History, learner: Learner) -> str:
    parts = [f"loss {history.loss[-1]:.3f}"]
    if history.checks:
        parts.append(f"agreement {history.checks[-1]['agreement']:.1%}")
    return ", ".join([*parts, *(f"{key} {value:.3f}" for key, value in learner.facts().items())])


def _refuse_nan(terms: dict[str, float], step: int) -> None:
    for task, value in terms.items():
        if not math.isfinite(value):
            why = (
                "the expert's head or the inputs are broken, or one of the models is"
                if step == 0
                else "lower lr under fit:, or set clamp: true"
            )
            raise RecipeError(f"fit: step {step + 1}: the loss of {task} is not a number ({value}); {why}")


def _save(path: Path, step: int, learner: Learner, guard: Guard | None, history: History) -> None:
    data = {
        "step": step, "values": {name: value.detach() for name, value in learner.values().items()},
        "optimisers": [optimiser.state_dict() for optimiser in learner.optimisers()],
        "history": vars(history), "guard": None if guard is None else
        {key: value for key, value in vars(guard).items() if key not in ("experts", "stops")},
    }  # fmt: skip
    content = io.BytesIO()  # torch's own writer tells of a full disk by an error that names no cause
    torch.save(data, content)
    atomic.replace_durably(path, content.getvalue())


def _resume(path: Path, learner: Learner, guard: Guard | None) -> tuple[History, int]:
    if not path.is_file():
        return History(), 0
    try:
        data = torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        raise MachineError(
            f"{path}: the fit's progress is damaged; remove that file and run the same command again"
        ) from None
    learner.set_values(data["values"])
    for optimiser, state in zip(learner.optimisers(), data["optimisers"], strict=True):
        optimiser.load_state_dict(state)
    if guard is not None:
        vars(guard).update(data["guard"])
    return History(**data["history"]), data["step"]
