"""A recipe over a grid of settings, and over random subsets of the experts. Every point is filed when it is done."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plait import digests
from plait.errors import RecipeError
from plait.evaluate.compare import Means, check
from plait.evaluate.contenders import Contender, value_of
from plait.evaluate.measure import Bench
from plait.evaluate.metrics import interval
from plait.evaluate.results import Evaluation, Interval, Point, Sweep
from plait.evaluate.subjects import Subject
from plait.models.outfit import source_folder
from plait.recipe import Recipe, load_recipe
from plait.run import merge

EXPERTS = "experts"
_MOST = 1000


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """`parameters.weight=0.1..1.0:0.1` or `parameters.density=0.1,0.2` as recipe path and values."""
    path, mark, values = text.partition("=")
    if not mark or not path or not values:
        raise RecipeError(f"--set {text}: must be path=values, such as parameters.weight=0.1..1.0:0.1")
    if ".." in values and ":" not in values:
        raise RecipeError(f"--set {text}: a range needs its step: first..last:step, such as 0.1..1.0:0.1")
    span = re.fullmatch(r"(-?[\d.eE+-]+?)\.\.(-?[\d.eE+-]+):([\d.eE+-]+)", values)
    if span is None:
        return path, [value_of(value.strip()) for value in values.split(",")]
    try:
        first, last, step = (float(part) for part in span.groups())
    except ValueError:
        raise RecipeError(f"--set {text}: '{values}' must be first..last:step") from None
    if not (step > 0 and first <= last and (last - first) / step <= _MOST):
        raise RecipeError(f"--set {text}: needs first <= last, a step above zero, and at most {_MOST} values")
    count = math.floor((last - first) / step + 1e-9) + 1
    return path, [round(first + index * step, 10) for index in range(count)]


def parse_axes(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Several axes, every path once."""
    axes: dict[str, list[Any]] = {}
    for path, values in map(parse_axis, texts):
        if path in axes:
            raise RecipeError(f"--set {path}: is given twice; put all its values into one: {path}=a,b,c")
        axes[path] = values
    return axes


def sweep(
    item: Contender,
    axes: Mapping[str, Sequence[Any]],
    bench: Bench,
    out: Path,
    *,
    sizes: Sequence[int] = (),
    subsets: int = 5,
    means: Means | None = None,
) -> Sweep:
    """Merge and measure every combination. With `sizes`, each on up to `subsets` random sets of so many experts.

    Merged models are measured and removed; points that an interrupted sweep has filed in `out` are not made again.
    Raises RecipeError for settings the recipe does not know.
    """
    if item.recipe is None:
        raise RecipeError(f"sweep: {item.label} is a finished model; give a recipe or a method")
    recipe, means = item.recipe, means or Means()
    groups = _groups(bench, sizes, subsets, recipe.seed)
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    plans = [(settings, group, _changed(recipe, settings, group)) for settings in combinations for group in groups]
    for _, _, changed in plans:
        check(changed)
    out.mkdir(parents=True, exist_ok=True)
    state = _state(recipe, bench)
    points = []
    for settings, group, changed in plans:
        key = digests.digest([changed.canonical(), state, group])
        point = _filed(out, key)
        if point is None:
            point = _point(changed, settings, group, bench, out / "model", means)
            _file(out / "points.jsonl", {"key": key, "point": point.model_dump()})
        # The same merge may have been filed by a sweep over other axes.
        points.append(point.model_copy(update={"settings": settings}))
    shown = {**{path: list(values) for path, values in axes.items()}, **({EXPERTS: list(sizes)} if sizes else {})}
    method = recipe.merge_method or "composed"
    return Sweep(
        suite=bench.facts(), method=method, recipe=recipe.canonical(), axes=shown or {EXPERTS: [len(groups[0])]},
        points=points,
    )  # fmt: skip


def _groups(bench: Bench, sizes: Sequence[int], subsets: int, seed: int) -> list[list[str]]:
    """Sets of tasks: all of them, or for every size some random ones, each at most once."""
    tasks = list(bench.suite.tasks)
    groups = []
    for size in sizes:
        if not 1 <= size <= len(tasks):
            raise RecipeError(
                f"--experts {size}: the suite has {len(tasks)} experts; give numbers from 1 to {len(tasks)}"
            )
        every = [list(group) for group in itertools.combinations(tasks, size)]
        if len(every) > subsets:
            every = sorted(random.Random(f"{seed}/{size}").sample(every, subsets), key=lambda g: [*map(tasks.index, g)])
        groups += every
    return groups or [tasks]


def _changed(recipe: Recipe, settings: Mapping[str, Any], group: Sequence[str]) -> Recipe:
    """The recipe with settings put in and only the group's experts, checked against its method."""
    data = json.loads(json.dumps(recipe.model_dump(exclude_defaults=True)))
    for path, value in settings.items():
        place = data
        *parents, last = path.split(".")
        for part in parents:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise RecipeError(f"--set {path}: '{part}' is not a group of settings in the recipe")
        place[last] = value
    names = recipe.names()
    data["models"] = [
        {**entry, "model": _absolute(recipe, entry["model"]), "name": names[entry["model"]]}
        for entry in data.get("models", [])
        if names[entry["model"]] in group
    ]
    if len(data["models"]) < len(group):
        missing = ", ".join(sorted(set(group) - set(names.values())))
        raise RecipeError(f"sweep: the recipe has no model named {missing}; name its models as the suite's tasks")
    if recipe.base_model is not None:
        data["base_model"] = _absolute(recipe, recipe.base_model)
    for path in settings:
        key = path.removeprefix("parameters.")
        if key != path and any(key in entry.get("parameters", {}) for entry in data["models"]):
            raise RecipeError(f"--set {path}: the recipe sets {key} for each model, which goes first; remove it there")
    return load_recipe(data)


def _absolute(recipe: Recipe, spec: str) -> str:
    from plait.sources import find_local

    found = find_local(spec, recipe.folder)
    return str(found.resolve()) if found is not None else spec


def _state(recipe: Recipe, bench: Bench) -> str:
    """What a point depends on beside its recipe: the models' content, heads, data and how they are measured."""
    suite = bench.suite
    specs = [_absolute(recipe, entry.model) for entry in recipe.models or []]
    specs += [_absolute(recipe, recipe.base_model)] if recipe.base_model is not None else []
    return digests.digest([
        bench.facts().fingerprint, bench.task_options(list(suite.tasks)), bench.options.dtype,
        [Subject.expert(suite, task).fingerprint([task]) for task in suite.tasks],
        [digests.folder_digest(source_folder(spec)) for spec in specs],
    ])  # fmt: skip


def _file(path: Path, entry: dict[str, Any]) -> None:
    """Add a line; after one at which a run was killed, on a line of its own."""
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write((json.dumps(entry) + "\n").encode())


def _filed(out: Path, key: str) -> Point | None:
    for entry in _entries(out / "points.jsonl"):
        if entry.get("key") == key:
            return Point.model_validate(entry["point"])
    return None


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # the line at which a run was killed
            continue


def _point(
    recipe: Recipe, settings: dict[str, Any], group: list[str], bench: Bench, folder: Path, means: Means
) -> Point:  # fmt: skip
    start = time.perf_counter()
    merge(
        recipe, folder, memory=means.memory, threads=means.threads, device=means.device, overwrite=True,
        progress=bench.progress,
    )  # fmt: skip
    label = " ".join([*(f"{k.removeprefix('parameters.')}={v}" for k, v in settings.items()), f"of {len(group)}"])
    found = bench.evaluate(Subject.model(bench.suite, str(folder), label))
    shutil.rmtree(folder)
    rest = [task for task in bench.suite.tasks if task not in group]
    return Point(
        settings=settings, experts=group, seen=_part(found, bench, group),
        unseen=_part(found, bench, rest) if rest else None,
        scores={task: result.score.value for task, result in found.tasks.items()},
        normalised={task: r.normalised.value for task, r in found.tasks.items() if r.normalised is not None},
        seconds=time.perf_counter() - start,
    )  # fmt: skip


def _part(found: Evaluation, bench: Bench, tasks: Sequence[str]) -> Interval:
    """Average normalised score over some of the tasks."""
    import numpy as np

    draws, shares = [], []
    for task in tasks:
        result = found.tasks[task]
        if result.normalised is None:
            raise RecipeError(f"sweep: the expert of {task} scores nothing, so nothing can be normalised by it")
        shares.append(result.normalised.value)
        draws.append(bench.ratio(task, result))
    return interval(float(np.mean(shares)), np.mean(draws, axis=0))
