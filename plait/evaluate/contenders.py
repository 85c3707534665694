"""What a comparison or a sweep is asked to measure: recipes, model folders, methods by name on a suite's experts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.errors import RecipeError, nearest
from plait.methods import all_methods
from plait.methods.compose import method_of
from plait.methods.contract import split_settings
from plait.recipe import Recipe, load_recipe
from plait.sources import find_local, looks_like_hub_id
from plait.suites.definition import Suite

_RECIPES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Contender:
    """A recipe to merge, or a model that is there."""

    label: str
    recipe: Recipe | None
    model: str | None

    @property
    def slug(self) -> str:
        """A folder name."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.label).strip("-.") or "model"


def contender(spec: str, suite: Suite) -> Contender:
    """Read `[label=]recipe.yaml`, `[label=]folder` or `[label=]method[:parameter=value,…]`.

    A recipe that lists no models merges the suite's experts.
    """
    label, mark, rest = spec.partition("=")
    named = mark and not re.search(r"[:/\\]", label) and find_local(spec) is None
    body = rest if named else spec
    if body.endswith(_RECIPES):
        recipe = suite_recipe(Path(body), suite)
        return Contender(label if named else Path(body).stem, recipe, None)
    if find_local(body) is not None:
        return Contender(label if named else Path(body).resolve().name, None, body)
    method, _, settings = body.partition(":")
    if method in all_methods():
        parameters = dict(_setting(part, body) for part in settings.split(",")) if settings else {}
        return Contender(
            label if named else _method_label(method, parameters), by_method(method, suite, parameters), None
        )
    if looks_like_hub_id(body):
        return Contender(label if named else body, None, body)
    raise RecipeError(
        f"{spec}: is no recipe file, no model folder and no method{nearest(method, all_methods())}; a method's "
        "parameters are written ties:density=0.2,trim=model"
    )


def by_method(method: str, suite: Suite, parameters: Mapping[str, Any] | None = None) -> Recipe:
    """The suite's experts merged by a method. What a learned method is fitted with stands among its parameters."""
    plain = {**suite.recipe(method), **split_settings(method, parameters or {})}
    learns = method_of(load_recipe(plain))[0].learned is not None
    return load_recipe({**plain, **({"data": suite.inputs()} if learns else {})})


def suite_recipe(source: Path, suite: Suite) -> Recipe:
    """A recipe file, on the suite's experts when it lists no models."""
    from plait.yamlfile import parse_file

    data = parse_file(source).data
    listed = isinstance(data, Mapping) and ("models" in data or "slices" in data)
    if listed:
        return load_recipe(source)
    plain = suite.recipe("", None)
    data = {"data": suite.inputs()} if _learns(data) else {}
    return load_recipe(source, {"base_model": plain["base_model"], "models": plain["models"], **data})


def _learns(data: Any) -> bool:
    """Whether a recipe's method learns; a recipe that spells its own is asked by its combine."""
    if not isinstance(data, Mapping):
        return False
    combine = data.get("combine")
    named = data.get("merge_method") or (next(iter(combine), None) if isinstance(combine, Mapping) else combine)
    found = all_methods().get(str(named))
    return found is not None and found.learned is not None


def value_of(text: str) -> Any:
    """A number, a truth value, or else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _setting(part: str, spec: str) -> tuple[str, Any]:
    key, mark, value = part.partition("=")
    if not mark or not key:
        raise RecipeError(f"{spec}: '{part}' must be parameter=value")
    return key.strip(), value_of(value.strip())


def _method_label(method: str, parameters: Mapping[str, Any]) -> str:
    if not parameters:
        return method
    return f"{method} " + " ".join(f"{key}={value}" for key, value in parameters.items())
