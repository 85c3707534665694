"""`fit`: a recipe and unlabeled inputs in, a State on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from plait import atomic
from plait.engine import Engine
from plait.errors import MachineError, RecipeError
from plait.learn.bench import Workbench
from plait.learn.data import Inputs, suite_of_recipe
from plait.learn.learners import Outcome, Session, learner_of
from plait.learn.objectives import Custom
from plait.methods.contract import parameters_of
from plait.methods.learned import COMBINES
from plait.plan import Plan
from plait.state import FACTS, State, load_state, refuse_existing, write_state


def fit_plan(
    plan: Plan, out: Path, engine: Engine, *, resume: bool, overwrite: bool, objective: Custom | None = None,
    reuse: bool = False,
) -> State:  # fmt: skip
    """Learn what a plan's method needs, and write it to folder `out`, whole or not at all.

    Work in progress lies beside `out`; with `resume` an interrupted fit goes on there, to the same bytes. With `reuse`
    a state that is there already is taken, where it answers the same question. Raises
    RecipeError for a method that learns nothing, for missing inputs, for a loss that is no number; CheckpointError for
    inputs, heads and weights that do not fit together.
    """
    learned = plan.method.learned
    if learned is None:
        raise RecipeError(f"fit: {plan.method.name} learns nothing; merge it as it is")
    if objective is not None and not hasattr(plan.fit, "objective"):
        raise RecipeError(f"fit: {plan.method.name} has no objective that could be another")
    if not reuse:
        refuse_existing(out, overwrite)
    split = "test" if getattr(plan.fit, "protocol", "honest") == "paper" else "adapt"
    inputs = Inputs(
        suite_of_recipe(plan, split), split, plan.recipe.seed, getattr(plan.fit, "objective", "") == "contrastive"
    )
    facts = _facts(plan, inputs, split, objective, engine.threads)
    if reuse and (out / FACTS).is_file() and _answers(load_state(out), facts):
        return load_state(out)
    refuse_existing(out, overwrite)
    start = time.monotonic()
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    work = out.parent / f".{out.name}.fitting-{key}"
    try:
        with _locked(work, out), _threads(engine.threads):
            if not resume:
                atomic.empty(work)
            outcome = _learn(plan, engine, inputs, work, objective)
            plan.library.refuse_changed()
            facts |= {"summary": outcome.summary, "history": outcome.history}
            # The time lies beside the state and is not of it: the same fit gives the same state, however long it took.
            state = write_state(
                out, facts, outcome.numbers, overwrite, scratch=work / "state", seconds=time.monotonic() - start
            )
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise MachineError(
            f"{work}: {error.strerror or error}; a fit needs room for the task vectors beside {out}: put that right, "
            "and go on with the same command and --resume"
        ) from None
    return state


@contextmanager
def _locked(work: Path, out: Path) -> Iterator[None]:
    """Hold the folder of work in progress. MachineError where another process does."""
    guard = atomic.lock_folder(work)
    if guard is None:
        raise MachineError(f"{out}: another fit is writing this state now; wait for it to end")
    try:
        yield
    finally:
        os.close(guard)


def _answers(state: State, facts: Mapping[str, Any]) -> bool:
    """Whether a state was learned as is asked now."""
    return all(state.facts.get(key) == value for key, value in json.loads(json.dumps(facts)).items())


def _learn(plan: Plan, engine: Engine, inputs: Inputs, work: Path, objective: Custom | None) -> Outcome:
    assert plan.method.learned is not None
    bench = Workbench(plan, engine, inputs, plan.fit)
    session = Session(bench, plan.fit, plan.recipe.seed, work, objective)
    return learner_of(plan.method.learned.learner)(session)


def _facts(plan: Plan, inputs: Inputs, split: str, objective: Custom | None, threads: int) -> dict[str, Any]:
    """What was asked and what went in: everything but paths and times."""
    assert plan.method.learned is not None
    return {
        "method": plan.method.name,
        "sees": plan.method.learned.sees,
        "paper": plan.method.paper,
        "tasks": [model.name for model in plan.models],
        "fit": asdict(plan.fit),
        "objective": getattr(objective, "__name__", "a callable") if objective is not None else None,
        "seed": plan.recipe.seed,
        "split": split,
        "vectors": vector_settings(plan),
        "models": fingerprints(plan),
        "data": inputs.facts(),
        "versions": {"plait": version("plait"), "torch": torch.__version__, "transformers": version("transformers")},
        "threads": threads,
    }


def fingerprints(plan: Plan) -> dict[str, str]:
    """Base and experts, by name."""
    found = {model.name: model.source.fingerprint() for model in plan.models}
    return {"base": plan.base.source.fingerprint() if plan.base else "", **found}


def vector_settings(plan: Plan) -> dict[str, Any]:
    """The part of the recipe that shapes the vectors which the learned numbers weigh."""
    assert plan.method.learned is not None
    recipe, shaping = plan.recipe, set(parameters_of(plan.method.learned.vectors))
    if plan.route is not None:  # what is not routed is what a router sees
        shaping |= set(plan.method.parameters)
    if recipe.transforms:  # all but the combine's own, such as eval_mask, which a merge may choose anew
        last = plan.method.name.rpartition(" → ")[2]
        shaping |= set(plan.method.parameters) - set(parameters_of(COMBINES[last]))

    def cut(given: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in given.items() if key in shaping}

    per_model = {recipe.names()[entry.model]: cut(entry.parameters) for entry in recipe.entries()}
    shared = {} if plan.route is None else {"shared": recipe.shared}
    if plan.route is not None and plan.method.learned.learner != "task_router":  # that one sees no expert
        shared["route"] = asdict(plan.route)
    return {
        **shared, "parameters": cut(recipe.parameters), "transforms": recipe.transforms,
        "models": {name: given for name, given in sorted(per_model.items()) if given},
    }  # fmt: skip


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
