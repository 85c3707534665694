"""Several models on one suite: merges what has to be merged, measures everything, tests it against a baseline."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.errors import RecipeError, nearest
from plait.evaluate.contenders import Contender, by_method, contender
from plait.evaluate.measure import Bench
from plait.evaluate.metrics import difference
from plait.evaluate.results import Comparison, Corrupted, Corruption, Difference, Evaluation, Row
from plait.evaluate.subjects import Subject
from plait.evaluate.unseen import refuse_listed, refuse_merged
from plait.recipe import Recipe
from plait.run import Merged, fit, merge
from plait.show_state import state_data
from plait.state import State

BASELINE = "task_arithmetic"
STANDARDS = {"average": {}, "task_arithmetic": {"weight": 0.3}}
"""0.3 is what the literature uses for eight vision tasks (arXiv:2212.04089)."""


@dataclass(frozen=True)
class Means:
    """What merging may use."""

    memory: str = "512MB"
    threads: int | None = None
    device: str = "cpu"


def compare(
    specs: Sequence[str], bench: Bench, out: Path, *, baseline: str = BASELINE, means: Means | None = None,
    under: Sequence[Corruption] = (),
) -> Comparison:  # fmt: skip
    """Measure recipes, models and methods beside the experts, the base, averaging and task arithmetic.

    Merged models are left in `out`/models. `baseline` is the label of the row that all others are tested against.
    The bench's unseen tasks are measured, and their experts are not merged. Every model is measured `under` corruptions
    too. Raises RecipeError for a spec that means nothing, CheckpointError for files that do not fit.
    """
    suite, means = bench.suite, means or Means()
    benches = [bench.under(corruption) for corruption in under]
    chosen = _with_standards([contender(spec, bench.seen) for spec in specs], bench)
    labels = ["experts", "base + heads", *(item.label for item in chosen)]
    doubled = next((label for label in labels if labels.count(label) > 1), None)
    if doubled is not None:
        raise RecipeError(f"compare: two rows are called '{doubled}'; name one of them with label=…")
    places: dict[str, Contender] = {}
    for item in (item for item in chosen if item.recipe is not None):
        other = places.setdefault(item.slug, item)
        if other is not item:
            raise RecipeError(
                f"compare: '{other.label}' and '{item.label}' would both be written to models/{item.slug}; name one of "
                "them with label=…"
            )
    if baseline not in labels:
        raise RecipeError(f"compare: no row is called '{baseline}' to be the baseline{nearest(baseline, labels)}")
    for item in chosen:
        if item.recipe is not None:
            refuse_listed(item.recipe, item.label, suite, bench.unseen)
            check(item.recipe)
        else:
            refuse_merged(_subject(item, bench), bench.unseen)
    rows = [
        _row("experts", "expert", bench.experts(), data="training data", corrupted=[
            one.beside_experts(one.experts()) for one in benches
        ]),
        _row("base + heads", "base", *_evaluated(Subject.base(suite), bench, benches)),
    ]  # fmt: skip
    for item in chosen:
        rows.append(_measured(item, bench, benches, out / "models" / item.slug, means))
    against = next(row.evaluation for row in rows if row.label == baseline)
    return Comparison(
        suite=bench.facts(),
        baseline=baseline,
        rows=[row.model_copy(update={"difference": _against(row, against)}) for row in rows],
        inspection=inspection(bench, means),
        machine=machine(),
    )


def check(recipe: Recipe) -> None:
    """Refuse now what would be refused after hours of other merges: a parameter, a model that does not fit."""
    from plait.plan import make_plan

    make_plan(recipe).library.close()


def inspection(bench: Bench, means: Means) -> dict[str, Any]:
    """The task vectors of the suite's experts: norms, cosines, agreement of signs."""
    from plait.engine import Engine
    from plait.inspect import inspect_plan
    from plait.plan import make_plan
    from plait.run import usable_threads
    from plait.units import parse_bytes

    plan = make_plan(by_method("task_arithmetic", bench.seen))
    engine = Engine(
        threads=means.threads or usable_threads(), memory=parse_bytes(means.memory, "memory"), device=means.device,
        progress=bench.progress,
    )  # fmt: skip
    try:
        return inspect_plan(plan, engine)
    finally:
        plan.library.close()


def machine() -> str:
    """Processor and number of cores, for whoever reads times."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"


def _with_standards(chosen: list[Contender], bench: Bench) -> list[Contender]:
    """Averaging and task arithmetic stand in every comparison, unless a row of that name was asked for."""
    given = {item.label for item in chosen}
    standards = [
        Contender(method, by_method(method, bench.seen, parameters), None)
        for method, parameters in STANDARDS.items()
        if method not in given
    ]
    return [*standards, *chosen]


def _measured(item: Contender, bench: Bench, benches: Sequence[Bench], folder: Path, means: Means) -> Row:
    if item.recipe is None:
        return _row(item.label, "model", *_evaluated(_subject(item, bench), bench, benches))
    state = _fitted(item.recipe, folder.parent.parent / "states" / item.slug, bench, means)
    start = time.perf_counter()
    merged = merge(
        item.recipe, folder, memory=means.memory, threads=means.threads, device=means.device, overwrite=True,
        state=state.folder if state is not None else None, progress=bench.progress,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    found = _evaluated(Subject.model(bench.suite, str(folder), item.label), bench, benches)
    row = _row(item.label, "merge", *found, merged, seconds, saw(state))
    if state is None:
        return row
    return row.model_copy(update={"fit_seconds": state.seconds, "learned": _learned(state)})


def _subject(item: Contender, bench: Bench) -> Subject:
    assert item.model is not None
    return Subject.model(bench.suite, item.model, item.label)


def _evaluated(subject: Subject, bench: Bench, benches: Sequence[Bench]) -> tuple[Evaluation, list[Corrupted]]:
    return bench.evaluate(subject), [one.beside_experts(one.evaluate(subject)) for one in benches]


def _fitted(recipe: Recipe, place: Path, bench: Bench, means: Means) -> State | None:
    """The state of a method that learns: as it lies there from an earlier comparison, or fitted now."""
    from plait.methods.compose import method_of

    if method_of(recipe)[0].learned is None:
        return None
    return fit(
        recipe, place, memory=means.memory, threads=means.threads, device=means.device, resume=True, overwrite=True,
        reuse=True, progress=bench.progress,
    )  # fmt: skip


def saw(state: State | None) -> str:
    """What data a method saw, for the table."""
    if state is None:
        return "none"
    used = state.facts["summary"].get("inputs")  # of a method that takes so many and no more
    inputs = sum(used.values()) if used else sum(item["inputs"] for item in state.facts["data"].values())
    return f"{inputs} {state.facts['sees']}{' of the test split' if state.facts['split'] == 'test' else ''}"


def _learned(state: State) -> dict[str, Any]:
    keys = ("method", "tasks", "fit", "objective", "data", "split", "summary", "history")
    found = state_data(state)
    return {**{key: found[key] for key in keys}, "coefficients": found["coefficients"], "masks": found["masks"]}


def _row(
    label: str, kind: Any, evaluation: Evaluation, corrupted: Sequence[Corrupted], merged: Merged | None = None,
    seconds: float | None = None, data: str = "none",
) -> Row:  # fmt: skip
    return Row(
        label=label, kind=kind, evaluation=evaluation, merge_seconds=seconds, difference=None, data=data,
        corrupted=list(corrupted),
        method=merged.plan.method.name if merged else None, recipe=merged.plan.recipe.canonical() if merged else None,
    )  # fmt: skip


def _against(row: Row, baseline: Evaluation) -> Difference | None:
    if row.evaluation is baseline:
        return None
    ours, theirs = row.evaluation.tasks, baseline.tasks
    return difference(
        {task: result.predictions for task, result in ours.items()},
        {task: result.predictions for task, result in theirs.items()},
        {task: result.labels for task, result in ours.items()},
        {task: result.metric for task, result in ours.items()},
    )
