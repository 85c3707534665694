"""Unlabeled inputs of every expert: from `data:` of a recipe to batches that any step of a fit can be given again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch

from plait.errors import CheckpointError, RecipeError, nearest
from plait.models.net import Batch, Net, Sample
from plait.models.outfit import question
from plait.plan import Plan
from plait.suites.data import Split, load_split
from plait.suites.definition import DataEntry, Suite, TaskEntry
from plait.suites.places import load_suite

WATCHED = 48
"""Inputs of every task that a fit only looks at, to judge itself."""
_KEPT_BYTES = 1 << 30
"""Images are decoded and resized once, as long as all of them fit here."""
_OF_TASK = ("head", "classes", "templates", "prompt", "answers")


def suite_of_recipe(plan: Plan, split: str) -> Suite:
    """The suite that a recipe's `data:` names or spells, cut to the recipe's experts; all have the split.

    Raises RecipeError where there is no data, or none for one of the experts.
    """
    recipe, names = plan.recipe, [model.name for model in plan.models]
    if recipe.data is None:
        raise RecipeError(
            f"{recipe.where('data')}: {plan.method.name} learns from {plan.method.learned.sees}, and the recipe has no "  # type: ignore[union-attr]
            f"data; add data: {{{names[0]}: ./inputs, …}}, or data: SUITE, or merge with --state"
        )
    if isinstance(recipe.data, str):
        suite = _named(recipe.data, recipe.folder)
        for name in names:
            if name not in suite.tasks:
                raise RecipeError(
                    f"{recipe.where('data')}: {suite.name} has no task '{name}'{nearest(name, suite.tasks)}; the "
                    "experts' name: must be the suite's tasks"
                )
        return suite.only(names)
    if split != "adapt":
        raise RecipeError(
            f"{recipe.where('data')}: protocol: paper adapts on a suite's test inputs, so data: must name a suite"
        )
    for name in recipe.data:
        if name not in names:
            raise RecipeError(f"{recipe.where('data', name)}: no expert is called '{name}'{nearest(name, names)}")
    for name in names:
        if name not in recipe.data:
            raise RecipeError(f"{recipe.where('data')}: no inputs for the expert '{name}'; add data: {{{name}: …}}")
    return _spelled(plan, recipe.data)


def _named(spec: str, folder: Path) -> Suite:
    local = folder / spec
    return load_suite(local if local.exists() else spec)


def _spelled(plan: Plan, data: Mapping[str, Any]) -> Suite:
    """A suite of the recipe's own models and inputs."""
    recipe, tasks = plan.recipe, {}
    assert plan.base is not None
    for model in plan.models:
        given = data[model.name]
        given = {"path": given} if isinstance(given, str) else dict(given)
        own = {key: given.pop(key) for key in _OF_TASK if key in given}
        fields = {**DataEntry.model_fields, **dict.fromkeys(_OF_TASK)}
        for key in given:
            if key not in fields:
                raise RecipeError(f"{recipe.where('data', model.name, key)}: unknown key{nearest(key, fields)}")
        if ("path" in given) == ("dataset" in given):
            raise RecipeError(f"{recipe.where('data', model.name)}: give either path or dataset (one of the two)")
        try:
            entry = DataEntry.model_validate(given)
            tasks[model.name] = TaskEntry.model_validate({"expert": model.label, "data": {"adapt": entry}, **own})
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = recipe.where("data", model.name, *(part for part in first["loc"] if part != "data"))
            raise RecipeError(f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
    suite = Suite.model_construct(
        name="data", base=plan.base.label, pooling=None, max_length=512, tasks=tasks
    )  # what the checked form demands, a test split, is not for learning
    suite.__pydantic_private__ = {"_located": recipe._located, "_folder": recipe.folder, "_file": None}
    return suite


class Inputs:
    """Every task's rows in two parts, to learn from and to watch, and batches of them.

    Which rows a step sees depends on the seed, the task and the step alone, so that a fit can go on anywhere.
    """

    def __init__(self, suite: Suite, split: str, seed: int, pairs: bool = False) -> None:
        self.suite, self.seed, self.pairs = suite, seed, pairs
        self.splits = {task: load_split(suite, task, split) for task in sorted(suite.tasks)}
        self.learn: dict[str, np.ndarray] = {}
        self.watch: dict[str, np.ndarray] = {}
        for task, found in self.splits.items():
            order = self.random(task, "parts").permutation(len(found))
            watched = min(WATCHED, len(found) // 4)
            self.watch[task], self.learn[task] = np.sort(order[:watched]), np.sort(order[watched:])
        self._kept: dict[tuple[str, int], torch.Tensor] = {}
        self._kept_bytes = 0

    @property
    def tasks(self) -> list[str]:
        """In canonical order."""
        return list(self.splits)

    def classes(self) -> dict[str, list[str] | None]:
        """Class names, where the data has them."""
        return {task: split.classes for task, split in self.splits.items()}

    def check(self, net: Net) -> None:
        """Refuse inputs that the model cannot read. Raises CheckpointError naming the data."""
        for task, split in self.splits.items():
            kind, wanted = "image" if split.is_image else "text", net.family.modality
            if kind != wanted:
                raise CheckpointError(
                    f"{split.where}: the inputs of {task} are {kind}s, but the model reads {wanted}s; check data:"
                )
            if self.pairs and not isinstance(split[0], tuple):
                raise CheckpointError(
                    f"{split.where}: objective: contrastive learns from pairs; name the two columns of {task} with "
                    "input: [first, second]"
                )

    def facts(self) -> dict[str, Any]:
        """What was seen, by content."""
        return {
            task: {"from": split.where, "inputs": len(split), "fingerprint": digest_of(split)}
            for task, split in self.splits.items()
        }

    def batch(self, step: int, size: int) -> dict[str, list[int]]:
        """`size` rows of every task for a step: consecutive ones of a random order that is new in every epoch."""
        found = {}
        for task, rows in self.learn.items():
            picked: list[int] = []
            epoch, at = divmod(step * size, len(rows))
            while len(picked) < size:
                order = self.random(task, f"epoch {epoch}").permutation(rows)
                picked += order[at : at + size - len(picked)].tolist()
                epoch, at = epoch + 1, 0
            found[task] = picked
        return found

    def some(self, size: int) -> dict[str, list[int]]:
        """At most `size` rows of every task, those to watch among them: for what is measured once and not learned."""
        found = {}
        for task, split in self.splits.items():
            found[task] = np.sort(self.random(task, "some").permutation(len(split))[:size]).tolist()
        return found

    def collate(self, net: Net, rows: Mapping[str, Sequence[int]]) -> Batch:
        """Rows of several tasks as one batch on the net's device."""
        picked = [(task, row) for task, listed in rows.items() for row in listed]
        if net.family.modality == "image":
            places: dict[str, list[int]] = {}
            for place, (task, _) in enumerate(picked):
                places.setdefault(task, []).append(place)
            pixels = torch.cat([self._image(net, task, row) for task, row in picked])
            return Batch({"pixel_values": pixels}, places).to(net.device)
        samples = [Sample(task, question(net, self.suite, task, self.splits[task], row)) for task, row in picked]
        if not self.pairs:
            return net.collate(samples)
        firsts = [Sample(sample.task, sample.value[0]) for sample in samples]
        return net.collate(firsts + [Sample(sample.task, sample.value[1]) for sample in samples])

    def _image(self, net: Net, task: str, row: int) -> torch.Tensor:
        found = self._kept.get((task, row))
        if found is None:
            found = net.collate([Sample(task, self.splits[task][row])]).inputs["pixel_values"].cpu()
            self._kept_bytes += found.nbytes
            if self._kept_bytes <= _KEPT_BYTES:
                self._kept[task, row] = found
        return found

    def random(self, task: str, purpose: str) -> np.random.Generator:
        """Random numbers for one purpose, a function of (seed, task, purpose) alone."""
        key = hashlib.sha256(f"{self.seed}\0{task}\0{purpose}".encode()).digest()
        return np.random.default_rng(int.from_bytes(key[:16], "little"))


def digest_of(split: Split) -> str:
    """SHA-256 over a split's inputs, in order; labels do not count, for nothing here reads them."""
    return hashlib.sha256(b"".join(split.digests)).hexdigest()
