"""A suite: one base, experts, their heads, and for every task three disjoint splits. A small YAML file or mapping.

    base: ./base
    tasks:
      mnist:
        expert: ./experts/mnist
        head: ./heads/mnist.safetensors        # default: the expert's own
        data:
          adapt: ./data/mnist/adapt.parquet    # unlabeled inputs for methods that learn
          test: {path: ./data/mnist/test.csv, label: digit}

`train` makes experts, `adapt` is for learned and dynamic methods, `test` is for reporting only. Paths are relative to
the file. Nothing but the file itself is read here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from plait import yamlfile
from plait.errors import RecipeError, nearest
from plait.yamlfile import Located

Metric = Literal["accuracy", "f1", "f1_macro", "matthews", "pearson", "spearman", "exact_match"]
SPLITS = ("train", "adapt", "test")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DataEntry(_Strict):
    """Where one split is: a file or folder (`path`), or a data set by its id (`dataset`)."""

    path: str | None = None
    dataset: str | None = None
    config: str | None = None
    """Configuration of `dataset`."""
    split: str | None = None
    """Split of `dataset`, with slices as `datasets` has them: `train[:1000]`."""
    input: str | list[str] | None = None
    """Column, or columns (sentence pairs); default: image or text."""
    label: str = "label"

    @property
    def where(self) -> str:
        """How messages call it."""
        return self.path or f"{self.dataset}{f'/{self.config}' if self.config else ''} ({self.split})"


class TaskEntry(_Strict):
    """One task."""

    expert: str
    head: str | None = None
    """A safetensors file, or `zero_shot`. Default: what only the expert has."""
    classes: list[str] | None = None
    """Names in the order of the labels; default: what the data says."""
    templates: list[str] = Field(default=["a photo of a {}."], min_length=1)
    """For `head: zero_shot`: texts with {} for the class name; a class is the mean of its texts."""
    metrics: list[Metric] = Field(default=["accuracy"], min_length=1)
    """The first one is the score."""
    prompt: str | None = None
    """For models that answer in text: the question, with {text} (or the input columns) in it."""
    answers: list[str] | None = None
    """For models that answer in text: one answer for every class; default: the class names."""
    data: dict[str, DataEntry]


class Suite(_Strict):
    """A whole suite."""

    name: str
    base: str
    pooling: Literal["mean", "cls", "pooler"] | None = None
    """What a text encoder's head reads; default: pooler for sequence classifiers, else mean."""
    max_length: int = Field(default=512, ge=1)
    """Tokens that a text is cut to."""
    tasks: dict[str, TaskEntry] = Field(min_length=1)
    _located: Located = pydantic.PrivateAttr(default_factory=lambda: Located(None))
    _folder: Path = pydantic.PrivateAttr(default_factory=Path.cwd)
    _file: Path | None = pydantic.PrivateAttr(default=None)

    @property
    def folder(self) -> Path:
        """Relative paths start here."""
        return self._folder

    def where(self, *path: str | int) -> str:
        """File, line and key for an error message."""
        return self._located.where(path)

    def only(self, tasks: list[str] | None) -> Suite:
        """The same suite with these tasks. Raises RecipeError for a name it does not have."""
        if tasks is None:
            return self
        for task in tasks:
            if task not in self.tasks:
                raise RecipeError(f"{self.name}: the suite has no task '{task}'{nearest(task, self.tasks)}")
        part = self.model_copy(update={"tasks": {task: self.tasks[task] for task in self.tasks if task in tasks}})
        part._located, part._folder, part._file = self._located, self._folder, self._file
        return part

    def place(self, spec: str) -> str:
        """A path of the suite seen from anywhere; hub ids as they are."""
        from plait.sources import find_local

        found = find_local(spec, self.folder)
        return str(found.resolve()) if found is not None else spec

    def inputs(self) -> Any:
        """What a recipe's `data:` says to learn from this suite: its file, or its inputs spelled out."""
        if self._file is not None:
            return str(self._file)
        found = {}
        for name, task in self.tasks.items():
            if "adapt" not in task.data:
                raise RecipeError(f"{self.where('tasks', name, 'data')}: has no adapt split; add adapt: there")
            entry = task.data["adapt"].model_dump(exclude_none=True, exclude_defaults=True)
            if "path" in entry:
                entry["path"] = self.place(entry["path"])
            own = task.model_dump(include={"head", "classes", "templates", "prompt", "answers"}, exclude_unset=True)
            if own.get("head") not in (None, "zero_shot"):
                own["head"] = self.place(own["head"])
            found[name] = {**entry, **{key: value for key, value in own.items() if value is not None}}
        return found

    def recipe(self, method: str, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The recipe that merges this suite's experts by a method."""
        return {
            "merge_method": method,
            "base_model": self.place(self.base),
            "models": [{"model": self.place(task.expert), "name": name} for name, task in self.tasks.items()],
            "parameters": dict(parameters or {}),
        }


def suite_of(data: Mapping[str, Any], folder: Path | None = None) -> Suite:
    """A suite from plain data; relative paths start at `folder`, by default the working directory."""
    return _validate(Located(dict(data)), folder or Path.cwd(), "suite")


def read_suite(path: Path) -> Suite:
    """A suite from its YAML file. Raises RecipeError naming file, line and key."""
    suite = _validate(yamlfile.parse_file(path), path.resolve().parent, path.resolve().parent.name)
    suite._file = path.resolve()
    return suite


def _validate(located: Located, folder: Path, name: str) -> Suite:
    if not isinstance(located.data, Mapping):
        raise RecipeError(f"{located.where(())}: must be a mapping with base and tasks; see docs/suites.md")
    data = {"name": name, **located.data}
    tasks = data.get("tasks")
    if isinstance(tasks, Mapping):
        data["tasks"] = {key: _full_task(value) for key, value in tasks.items()}
    try:
        suite = Suite.model_validate(data)
    except pydantic.ValidationError as error:
        raise RecipeError("\n".join(_sentence(located, item) for item in error.errors())) from None
    suite._located, suite._folder = located, folder
    for task, entry in suite.tasks.items():
        _check_task(suite, task, entry)
    return suite


def _full_task(task: Any) -> Any:
    """`test: file.csv` is short for `test: {path: file.csv}`."""
    if not isinstance(task, Mapping) or not isinstance(task.get("data"), Mapping):
        return task
    data = {key: {"path": value} if isinstance(value, str) else value for key, value in task["data"].items()}
    return {**task, "data": data}


def _check_task(suite: Suite, task: str, entry: TaskEntry) -> None:
    where = suite.where("tasks", task)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", task):
        raise RecipeError(f"{where}: a task's name must be letters, digits, '.', '_' or '-', and not start with '.'")
    for split, data in entry.data.items():
        place = suite.where("tasks", task, "data", split)
        if split not in SPLITS:
            raise RecipeError(f"{place}: unknown split '{split}'{nearest(split, SPLITS)}")
        if (data.path is None) == (data.dataset is None):
            raise RecipeError(f"{place}: give either path or dataset (one of the two)")
        if data.dataset is not None and data.split is None:
            raise RecipeError(f"{place}: a dataset needs split: as well, such as split: test")
        if data.dataset is None and (data.split or data.config):
            raise RecipeError(f"{place}: split and config go with dataset; a path is one split by itself")
    if "test" not in entry.data:
        raise RecipeError(f"{suite.where('tasks', task, 'data')}: test is required: the split that is reported on")
    for row, template in enumerate(entry.templates):
        if template.count("{}") != 1:
            raise RecipeError(
                f"{suite.where('tasks', task, 'templates', row)}: '{template}' must have one {{}}, for the class name"
            )
    if "templates" in entry.model_fields_set and entry.head != "zero_shot":
        raise RecipeError(f"{suite.where('tasks', task, 'templates')}: templates go with head: zero_shot")
    if "exact_match" in entry.metrics and set(entry.metrics) - {"exact_match", "accuracy"}:
        raise RecipeError(
            f"{suite.where('tasks', task, 'metrics')}: exact_match compares written answers, which no other "
            "metric can; give it alone"
        )
    if entry.answers is not None and entry.classes is not None and len(entry.answers) != len(entry.classes):
        raise RecipeError(
            f"{suite.where('tasks', task, 'answers')}: {len(entry.answers)} answers for {len(entry.classes)} classes"
        )


def _sentence(located: Located, item: Any) -> str:
    path = tuple(part for part in item["loc"])
    where = located.where(path)
    if item["type"] == "extra_forbidden":
        owner = {1: Suite, 3: TaskEntry}.get(len(path), DataEntry)
        return f"{where}: unknown key '{path[-1]}'{nearest(str(path[-1]), owner.model_fields)}"
    if item["type"] == "missing":
        return f"{where}: is required"
    got = f", got {item['input']!r}" if not isinstance(item["input"], (dict, list)) else ""
    if item["type"] in ("model_type", "dict_type"):
        return f"{where}: must be a mapping{got}; see docs/suites.md"
    message = item["msg"].replace("Input should be a valid", "must be a").replace("Input should be", "must be")
    return f"{where}: {message[0].lower()}{message[1:]}{got}"
