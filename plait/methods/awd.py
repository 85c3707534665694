"""Adaptive weight disentanglement (AWD, arXiv:2411.18729): take out of all task vectors what they redundantly share.

One vector δ per granule is subtracted from every τ_k, found so that the τ_k − δ are as orthogonal as can be:

    L(δ) = mean over i ≠ j of |cos(τ_i − δ, τ_j − δ)| + α‖δ‖

Gradient descent never leaves the span of the τ_k: one pass over the model for their Gram matrices, and the rest is
numbers (`awd_descent`). Adam does leave it: a pass a step, with δ in memory (`awd_adam`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from plait.errors import RecipeError
from plait.lazy import np, torch
from plait.methods import combines, finishes
from plait.methods.awd_adam import Adam, descend_by_adam
from plait.methods.awd_descent import NEARLY_ORTHOGONAL, Found, Settings, descend, found, products, unit_of
from plait.methods.block import Block
from plait.methods.contract import PerModel, Range, merge_method, parameters_of
from plait.methods.geodesic import gram
from plait.methods.granules import Granularity, granule_of
from plait.methods.memory import InMemory
from plait.methods.stream import Stream
from plait.methods.survey import Model
from plait.methods.transforms import fold

Positive = Annotated[float, Range(0, open_low=True)]
NAMED = 8
"""So many granules that diverged are named in the diagnostics; the rest are counted."""


@dataclass(frozen=True)
class AwdState:
    """What the survey found, per granule; with Adam also δ itself, per tensor."""

    granularity: Granularity
    tasks: tuple[str, ...]
    found: Mapping[str, Found]
    deltas: Mapping[str, torch.Tensor] = field(default_factory=dict)


def survey_awd(model: Model) -> AwdState | None:
    """Find δ per granule: one pass over the model, and with Adam one more for every step.

    Adam holds δ of the whole model in memory, in the type of the task vectors, beside two moments of one granule
    (of one tensor on every thread with `granularity: tensor`). Raises RecipeError when a descent ends in no number.
    """
    if not model.params:
        return None
    settings = _one_for_all(model.params)
    seen = model.each(lambda block: (block.tasks, block.grid.numel, gram(block.deltas, len(block.tasks))))
    tasks = _same_everywhere({name: own for name, (own, _, _) in seen.items()})
    groups: dict[str, list[str]] = {}
    for name in seen:
        groups.setdefault(granule_of(name, settings.granularity), []).append(name)
    grams = np.stack([np.sum([seen[name][2] for name in names], axis=0) for names in groups.values()])  # [P, K, K]
    units = unit_of(grams, settings)
    grams /= units[:, None, None]
    # In the span there is nothing but numbers; and with one expert, or none that moved, δ is zero for Adam too.
    c, first = descend(grams, settings)
    with np.errstate(all="ignore"):
        inner, square = products(grams, c)
    records = {
        granule: found(grams[p], units[p], c[p], inner[p], square[p], first[p], settings.alpha)
        for p, granule in enumerate(groups)
    }
    runs = {
        granule: Adam(grams[p], units[p], sum(seen[name][1] for name in names), settings)
        for p, (granule, names) in enumerate(groups.items())
        if settings.optimizer == "adam" and len(tasks) > 1 and grams[p].any()
    }
    descend_by_adam(model, groups, runs, settings)
    records |= {granule: run.found() for granule, run in runs.items()}
    deltas = {name: delta for run in runs.values() for name, delta in run.deltas.items()}
    return AwdState(settings.granularity, tasks, _refuse_no_numbers(records, settings), deltas)


def subtract(
    block: Block,
    deltas: Stream,
    *,
    granularity: Granularity = "model",
    optimizer: Literal["gd", "adam"] = "gd",
    init: Literal["zeros", "mean"] = "zeros",
    alpha: Annotated[float, Range(0)] = 0.1,
    beta: Positive = 0.01,
    steps: Annotated[int, Range(1)] = 300,
    scale: Literal["relative", "paper"] = "relative",
) -> Stream:
    """τ_k − δ, [K, n] → [K, n] (AWD, arXiv:2411.18729).

    δ comes from `survey_awd`, which sees the task vectors as they are: as a transform this must be the first. A block
    without its state is a model of its own.
    """
    state = block.state
    if not isinstance(state, AwdState):
        settings = Settings(granularity, optimizer, init, alpha, beta, steps, scale)
        state = survey_awd(InMemory({block.name: block}, vars(settings)))
        assert state is not None
    if block.name in state.deltas:
        shared = state.deltas[block.name]
        return deltas.map_pieces(lambda values, piece: values.sub_(shared[piece.start : piece.stop].to(values)))
    coefficients = list(state.found[granule_of(block.name, state.granularity)].coefficients)
    if not any(coefficients):
        return deltas
    return deltas.map(lambda values: values.sub_(fold(values * combines.column(coefficients, values))))


def diagnostics(state: AwdState) -> dict[str, Any]:
    """What a user should know of the descent, as small JSON: means over the granules that changed, and sentences."""
    changed = {granule: record for granule, record in state.found.items() if record.norm > 0}
    records = list(changed.values())
    diverged = [granule or "the model" for granule, record in changed.items() if record.diverged]
    multipliers = np.array([record.multipliers for record in records]).reshape(-1, len(state.tasks))
    return {
        "granularity": state.granularity,
        "granules": len(state.found),
        "unchanged": len(state.found) - len(changed),
        "cosine_before": _mean([record.cosine_before for record in records]),
        "cosine_after": _mean([record.cosine_after for record in records]),
        "length": _mean([record.length for record in records]),
        "loss_first": _mean([record.loss_first for record in records]),
        "loss_last": _mean([record.loss_last for record in records]),
        "multipliers": {task: _mean(multipliers[:, k].tolist()) for k, task in enumerate(state.tasks)},
        "multiplier_range": [float(multipliers.min()), float(multipliers.max())] if records else [1.0, 1.0],
        "diverged": len(diverged),
        "diverged_first": diverged[:NAMED],
        "notes": _notes(state, changed, diverged),
    }


def _notes(state: AwdState, changed: Mapping[str, Found], diverged: list[str]) -> list[str]:
    if not changed:
        return ["awd: no expert differs from the base; the result is the base"]
    if len(state.tasks) == 1:
        return ["awd: one expert shares nothing with itself; its task vector was taken as it is"]
    before = _mean([record.cosine_before for record in changed.values()])
    notes = []
    if before < NEARLY_ORTHOGONAL:
        notes.append(
            f"awd: nothing to disentangle, mean |cos| of the task vectors is {before:.3f}; expect task arithmetic"
        )
    if diverged:
        worst = max((record for record in changed.values() if record.diverged), key=lambda record: record.length)
        notes.append(
            f"awd: the descent diverged in {len(diverged)} of {len(changed)} granules (first: {diverged[0]}); at worst "
            f"mean |cos| went from {worst.cosine_before:.3g} to {worst.cosine_after:.3g} and the redundant vector is "
            f"{worst.length:.3g} times as long as the task vectors; set scale: relative, or a smaller beta"
        )
    return notes


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


@merge_method("awd", paper="arXiv:2411.18729", survey=survey_awd, explain=diagnostics, cost=5)
def awd(
    block: Block,
    *,
    weight: PerModel[float] = 1.0,
    granularity: Granularity = "model",
    optimizer: Literal["gd", "adam"] = "gd",
    init: Literal["zeros", "mean"] = "zeros",
    alpha: Annotated[float, Range(0)] = 0.1,
    beta: Positive = 0.01,
    steps: Annotated[int, Range(1)] = 300,
    scale: Literal["relative", "paper"] = "relative",
    lambda_: float = 1.0,
) -> Stream:
    """Subtract from all task vectors the one vector that leaves them most orthogonal, then task arithmetic.

    θ0 + λ Σ w_k (τ_k − δ). Papers add eight vision experts up with 0.3. They leave open what δ is found per and how;
    by gradient descent over the whole model, experts of one weight get λw(1 − K c_k) where δ = Σ c_k τ_k. α and β are
    absolute in the paper (`scale: paper`), which breaks granules whose task vectors are short; `scale: relative`
    counts them in lengths of a task vector.
    """
    left = subtract(
        block, block.deltas, granularity=granularity, optimizer=optimizer, init=init, alpha=alpha, beta=beta,
        steps=steps, scale=scale,
    )  # fmt: skip
    merged = combines.sum_(block, left, weight=weight)
    return finishes.add_base(block, finishes.scale(block, merged, lambda_=lambda_))


def _one_for_all(params: Mapping[str, Mapping[str, Any]]) -> Settings:
    """The settings, which every tensor must have alike: one descent is for many tensors."""
    defaults = {keyword: parameter.default for keyword, parameter in parameters_of(subtract).items()}
    first: dict[str, Any] | None = None
    for name, given in params.items():
        own = {keyword: given.get(keyword, default) for keyword, default in defaults.items()}
        first = own if first is None else first
        for keyword, value in own.items():
            if value != first[keyword]:
                raise RecipeError(
                    f"{keyword}: awd takes one value for the whole model, but '{name}' has {value} and others "
                    f"{first[keyword]}; set it without gradients and filters"
                )
    return Settings(**(first or defaults))


def _same_everywhere(tasks: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    first, wanted = next(iter(tasks.items()))
    for name, own in tasks.items():
        if own != wanted:
            raise RecipeError(
                f"awd: '{name}' merges {', '.join(own)}, but '{first}' {', '.join(wanted)}; "
                "merge the same models in every slice"
            )
    return wanted


def _refuse_no_numbers(records: Mapping[str, Found], settings: Settings) -> Mapping[str, Found]:
    for granule, record in records.items():
        if not math.isfinite(record.loss_last):
            advice = "a smaller beta" if settings.scale == "relative" else "scale: relative, or a smaller beta"
            raise RecipeError(
                f"beta: awd's descent with beta {settings.beta:g} left the numbers in {granule or 'the model'}; "
                f"set {advice}"
            )
    return records
