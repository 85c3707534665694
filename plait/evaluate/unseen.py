"""Tasks that a model is measured on though it was merged without their experts; and proof that it was."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from plait.errors import RecipeError, nearest
from plait.evaluate.subjects import Subject
from plait.recipe import Recipe
from plait.sources import find_local, open_source
from plait.suites.definition import Suite


def check_unseen(suite: Suite, tasks: Sequence[str]) -> list[str]:
    """The tasks in the suite's order. Raises RecipeError for one that it does not have, and where none is left seen."""
    for task in tasks:
        if task not in suite.tasks:
            raise RecipeError(f"--unseen {task}: {suite.name} has no such task{nearest(task, suite.tasks)}")
    if set(tasks) == set(suite.tasks):
        raise RecipeError(
            f"--unseen {','.join(tasks)}: these are all the tasks, and none is left that was seen; leave one out"
        )
    return [task for task in suite.tasks if task in tasks]


def refuse_merged(subject: Subject, unseen: Iterable[str]) -> None:
    """Refuse a model whose provenance says that the expert of an unseen task went into it."""
    tasks = list(unseen)
    record = _provenance(subject) if tasks else {}
    recipe, inputs = record.get("recipe"), record.get("inputs")
    names = {str(e.get("name")) for e in _mappings(recipe.get("models") if isinstance(recipe, Mapping) else None)}
    prints = {e.get("fingerprint") for e in _mappings(inputs.values() if isinstance(inputs, Mapping) else None)}
    for task in tasks:
        if task in names or (prints and _fingerprint(subject.suite, task) in prints):
            raise RecipeError(
                f"--unseen {task}: {subject.path} was merged from the expert of {task}, as its plait.json says; leave "
                f"{task} out of --unseen, or merge again without that expert"
            )


def refuse_listed(recipe: Recipe, label: str, suite: Suite, unseen: Iterable[str]) -> None:
    """Refuse a recipe that lists the expert of an unseen task, by the task's name or by the expert's place."""
    names = recipe.names()
    specs = [*names, *([recipe.base_model] if recipe.base_model is not None else [])]
    found = {spec: find_local(spec, recipe.folder) for spec in specs}
    places = {str(place.resolve()) if place is not None else spec for spec, place in found.items()}
    for task in unseen:
        if task in names.values() or suite.place(suite.tasks[task].expert) in places:
            raise RecipeError(
                f"--unseen {task}: the recipe {label} merges the expert of {task}; remove it there, or leave "
                f"{task} out of --unseen"
            )


def _provenance(subject: Subject) -> Mapping[str, Any]:
    """plait.json of a model; nothing where it has none that can be read."""
    try:
        found = json.loads((subject.folder / "plait.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _mappings(items: Any) -> list[Mapping[str, Any]]:
    return [item for item in items or [] if isinstance(item, Mapping)]


def _fingerprint(suite: Suite, task: str) -> str:
    source = open_source(suite.place(suite.tasks[task].expert))
    try:
        return source.fingerprint()
    finally:
        source.close()
