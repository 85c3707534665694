"""The recipe: what is asked for, as data. mergekit's grammar, strict, with a few additions.

A recipe is YAML, JSON, or a Python mapping. Structure is checked here; method parameters are checked against the
method's signature in `settings`. Nothing is read but the recipe itself.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from plait import yamlfile
from plait.dtypes import from_recipe
from plait.errors import RecipeError, nearest
from plait.yamlfile import Located

Settings = dict[str, Any]

_NOT_SUPPORTED = {
    "modules": "recipes by module are not supported; use models or slices, or merge the modules one by one",
    "chat_template": "set it in the tokenizer's files; tokenizer_source says whose files are taken",
    "tokenizer": "use tokenizer_source (base, union, or a model)",
}
"""Keys mergekit has and Plait does not: refused with what to do instead."""
IGNORED_PARAMETERS = {"int8_mask": "masks are never stored here"}
"""Parameters mergekit's recipes carry that can have no effect on the result."""
_MOST_LAYERS = 10_000
"""Of a model: a recipe asks for one entry a layer before any model is looked at."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True)


class ModelEntry(_Strict):
    """One model of `models`."""

    model: str
    name: str | None = None
    parameters: Settings = Field(default_factory=dict)


class SourceEntry(_Strict):
    """One source of a slice: layers [first, last) of a model."""

    model: str
    layer_range: list[int] = Field(min_length=2, max_length=2)
    name: str | None = None
    parameters: Settings = Field(default_factory=dict)


class SliceEntry(_Strict):
    """One slice of the output: its sources are merged layer by layer."""

    sources: list[SourceEntry] = Field(min_length=1)
    parameters: Settings = Field(default_factory=dict)


class Keep(_Strict):
    """Tensors (by part of their name) that are not merged."""

    base: list[str] = Field(default_factory=list)
    per_task: list[str] = Field(default_factory=list)


class Recipe(_Strict):
    """A whole recipe."""

    merge_method: str | None = None
    transforms: list[Any] = Field(default_factory=list)
    combine: Any = None
    finish: list[Any] = Field(default_factory=list)
    base_model: str | None = None
    models: list[ModelEntry] | None = None
    slices: list[SliceEntry] | None = None
    parameters: Settings = Field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    keep: Keep = Field(default_factory=Keep)
    fit: Settings = Field(default_factory=dict)
    """How a method that learns is fitted; its keys are the method's."""
    route: Settings = Field(default_factory=dict)
    """How a routed model is made; its keys are the method's."""
    shared: str | Settings | None = None
    """The method that merges what is not routed; a mapping may give `merge_method`, `transforms`, `combine`, `finish`,
    and the `state` of one that learns."""
    data: str | dict[str, str | Settings] | None = None
    """Unlabeled inputs of every expert, by its name; or a suite, whose `adapt` splits are taken."""
    _located: Located = pydantic.PrivateAttr(default_factory=lambda: Located(None))
    _folder: Path = pydantic.PrivateAttr(default_factory=Path.cwd)

    @property
    def folder(self) -> Path:
        """Relative paths in the recipe start here: the recipe file's folder, or the working directory."""
        return self._folder

    def where(self, *path: str | int) -> str:
        """File, line and key for an error message."""
        return self._located.where(path)

    def entries(self) -> list[ModelEntry | SourceEntry]:
        """All models and slice sources, in the order written."""
        if self.models is not None:
            return list(self.models)
        return [source for piece in self.slices or [] for source in piece.sources]

    def names(self) -> dict[str, str]:
        """Model spelling → its name in the merge: `name:`, else the last part of its path, made unique."""
        chosen: dict[str, str] = {}
        for entry in self.entries():
            if entry.name is not None and chosen.setdefault(entry.model, entry.name) != entry.name:
                raise RecipeError(f"{entry.model} has two names, '{chosen[entry.model]}' and '{entry.name}'; keep one")
        bare = [entry.model for entry in self.entries() if entry.model not in chosen]
        for model in sorted(set(bare)):
            spec = model.rpartition("@")[0] or model  # a hub revision is not a name
            parts = [part for part in re.split(r"[/\\+]", spec) if part not in ("", ".", "..")] or [model]
            depth = 1
            while depth < len(parts) and any(
                other != model and other.endswith("/".join(parts[-depth:])) for other in set(bare)
            ):
                depth += 1
            chosen[model] = safe_name("-".join(parts[-depth:]))
        taken: dict[str, str] = {}
        for model, name in chosen.items():
            if name != safe_name(name):
                raise RecipeError(f"name: '{name}' must be letters, digits, '.', '_' or '-', and not start with '.'")
            if taken.setdefault(name, model) != model:
                raise RecipeError(f"two models are called '{name}' ({taken[name]}, {model}); give each its own name:")
        return chosen

    def canonical(self) -> dict[str, Any]:
        """The recipe as data, models sorted by name: equal for recipes that ask for the same thing."""
        data = self.model_dump(exclude_defaults=True)
        names = self.names()
        if self.models is not None:
            data["models"] = sorted(
                ({**entry, "name": names[entry["model"]]} for entry in data["models"]), key=lambda e: e["name"]
            )
        return data


def safe_name(text: str) -> str:
    """The text as one harmless file name: anything else than letters, digits, '.', '_' and '-' becomes '_'."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", text).lstrip(".") or "model"


def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any] | Recipe, defaults: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> Recipe:  # fmt: skip
    """A Recipe from a YAML or JSON file, from a mapping, or as it is. `defaults` are keys for a recipe without them.

    Relative paths of a mapping start at `folder`; by default at the working directory.
    Raises RecipeError naming file, line, key and the nearest known key.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Mapping):
        # Through JSON, so that whatever a program hands over is plain data and nothing else.
        try:
            located = Located(json.loads(json.dumps({**(defaults or {}), **source})))
        except (TypeError, ValueError, RecursionError) as error:
            raise RecipeError(f"the recipe must be plain data (texts, numbers, lists, mappings): {error}") from None
        return _validate(located, (folder or Path.cwd()).resolve())
    path = Path(source)
    located = yamlfile.parse_file(path)
    if defaults and isinstance(located.data, Mapping):
        located.data = {**defaults, **located.data}
    return _validate(located, path.resolve().parent)


def _validate(located: Located, folder: Path) -> Recipe:
    if not isinstance(located.data, Mapping):
        raise RecipeError(f"{located.where(())}: must be a mapping with merge_method, models, …; see `plait init`")
    for key, advice in _NOT_SUPPORTED.items():
        if located.data.get(key) is not None:
            raise RecipeError(f"{located.where((key,))}: {advice}")
    try:
        recipe = Recipe.model_validate(located.data)
    except pydantic.ValidationError as error:
        raise RecipeError("\n".join(_sentence(located, item) for item in error.errors())) from None
    recipe._located, recipe._folder = located, folder
    _check_structure(recipe)
    return recipe


_MODELS: dict[str, type[BaseModel]] = {
    "models": ModelEntry,
    "sources": SourceEntry,
    "slices": SliceEntry,
    "keep": Keep,
}


def _sentence(located: Located, item: Any) -> str:
    path = tuple(item["loc"])
    where = located.where(path)
    if item["type"] == "extra_forbidden":
        owner = next((_MODELS[part] for part in reversed(path[:-1]) if part in _MODELS), Recipe)
        return f"{where}: unknown key '{path[-1]}'{nearest(str(path[-1]), owner.model_fields)}"
    if item["type"] == "missing":
        return f"{where}: is required"
    got = f", got {item['input']!r}" if not isinstance(item["input"], (dict, list)) else ""
    message = item["msg"].replace("Input should be a valid", "must be a").replace("Input should be", "must be")
    return f"{where}: {message[0].lower()}{message[1:]}{got}"


def _check_structure(recipe: Recipe) -> None:
    if (recipe.models is None) == (recipe.slices is None):
        raise RecipeError(f"{recipe.where()}: give either models or slices (one of the two)")
    if not recipe.entries():
        raise RecipeError(f"{recipe.where('models')}: no model is listed")
    if (recipe.merge_method is None) == (recipe.combine is None):
        raise RecipeError(f"{recipe.where()}: give either merge_method, or combine (with transforms and finish)")
    if recipe.merge_method is not None and recipe.transforms:
        raise RecipeError(f"{recipe.where('transforms')}: transforms go with combine, not with merge_method")
    seen: set[str] = set()
    for index, entry in enumerate(recipe.models or []):
        if entry.model in seen:
            raise RecipeError(f"{recipe.where('models', index, 'model')}: {entry.model} is listed twice")
        seen.add(entry.model)
    for s, piece in enumerate(recipe.slices or []):
        lengths = {source.layer_range[1] - source.layer_range[0] for source in piece.sources}
        for i, source in enumerate(piece.sources):
            if not 0 <= source.layer_range[0] < source.layer_range[1] <= _MOST_LAYERS:
                where = recipe.where("slices", s, "sources", i, "layer_range")
                raise RecipeError(
                    f"{where}: must be [first, last) with 0 <= first < last <= {_MOST_LAYERS}, got {source.layer_range}"
                )
        if len(lengths) > 1:
            raise RecipeError(f"{recipe.where('slices', s)}: all sources of a slice must have equally many layers")
    for key in ("dtype", "out_dtype"):
        value = getattr(recipe, key)
        if value is not None and not (key == "out_dtype" and value == "base"):
            from_recipe(value, recipe.where(key))
    recipe.names()
