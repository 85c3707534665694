"""The method of a recipe: one by name, or one that the recipe spells out of transforms, a combine and finishes.

    transforms: [{trim: {density: 0.2}}, {drop: {density: 0.5}}]
    combine: {elect: {normalize: false}}
    finish: [{scale: {lambda: 0.4}}]

A stage's parameters may also stand wherever a recipe has parameters (per model, with gradients and filters), under
their own name, or as `stage.name` where two stages share it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from plait.errors import RecipeError, nearest
from plait.methods import combines, finishes, geodesic, transforms
from plait.methods.block import Block
from plait.methods.contract import MergeMethod, Parameter, get_method, parameters_of
from plait.methods.stream import Stream
from plait.methods.survey import Model, survey_trim
from plait.recipe import Recipe

_STAGES: dict[str, Mapping[str, Callable[..., Stream]]] = {
    "transforms": transforms.TRANSFORMS,
    "combine": {**combines.COMBINES, **geodesic.COMBINES},
    "finish": finishes.FINISHES,
}


@dataclasses.dataclass(frozen=True)
class _Stage:
    kind: str
    name: str
    fn: Callable[..., Stream]
    parameters: Mapping[str, Parameter]

    def prefix(self) -> str:
        return f"{self.name}__"

    def pick(self, keywords: Mapping[str, Any]) -> dict[str, Any]:
        start = self.prefix()
        return {key[len(start) :]: value for key, value in keywords.items() if key.startswith(start)}


def method_of(recipe: Recipe) -> tuple[MergeMethod, Recipe]:
    """The recipe's method, and the recipe with the stages' own parameters moved to where all parameters are."""
    if recipe.merge_method is not None:
        return get_method(recipe.merge_method), recipe
    stages, inline = [], {}
    listed = [*(("transforms", i, item) for i, item in enumerate(recipe.transforms)), ("combine", None, recipe.combine)]
    listed += [("finish", i, item) for i, item in enumerate(recipe.finish)]
    for kind, index, item in listed:
        where = recipe.where(kind) if index is None else recipe.where(kind, index)
        stage, given = _stage(kind, item, where)
        if any(other.name == stage.name for other in stages):
            raise RecipeError(f"{where}: '{stage.name}' is used twice")
        stages.append(stage)
        inline[stage.name] = given
    shared = Counter(name for stage in stages for name in stage.parameters)
    parameters: dict[str, Parameter] = {}
    settings: dict[str, Any] = {}
    for stage in stages:
        for name, parameter in stage.parameters.items():
            public = f"{stage.name}.{name}" if shared[name] > 1 else name
            parameters[public] = dataclasses.replace(parameter, name=public, keyword=stage.prefix() + parameter.keyword)
            if name in inline[stage.name]:
                settings[public] = inline[stage.name][name]
    method = _method(recipe, stages, parameters)
    return method, recipe.model_copy(update={"parameters": {**settings, **recipe.parameters}})


def _stage(kind: str, item: Any, where: str) -> tuple[_Stage, dict[str, Any]]:
    if isinstance(item, str):
        name, given = item, {}
    elif isinstance(item, Mapping) and len(item) == 1:
        ((name, given),) = item.items()
        given = {} if given is None else given
    else:
        raise RecipeError(f"{where}: must be a stage's name, or one name with its parameters, got {item!r}")
    known = _STAGES[kind]
    if name not in known:
        raise RecipeError(f"{where}: there is no stage '{name}'{nearest(name, known)}")
    if not isinstance(given, Mapping):
        raise RecipeError(f"{where}: the parameters of '{name}' must be a mapping, got {given!r}")
    stage = _Stage(kind, name, known[name], parameters_of(known[name]))
    for key in given:
        if key not in stage.parameters:
            raise RecipeError(f"{where}: '{name}' has no parameter '{key}'{nearest(key, stage.parameters)}")
    return stage, dict(given)


def _method(recipe: Recipe, stages: list[_Stage], parameters: Mapping[str, Parameter]) -> MergeMethod:
    if recipe.base_model is None and any(stage.kind == "transforms" for stage in stages):
        raise RecipeError(f"{recipe.where('transforms')}: transforms work on task vectors; add base_model:")
    trims = [i for i, stage in enumerate(stages) if stage.name == "trim"]

    def run(block: Block, **keywords: Any) -> Stream:
        has_base = block.read_base is not None
        vectors = block.deltas if has_base else block.models
        for stage in stages:
            vectors = stage.fn(block, vectors, **stage.pick(keywords))
        return finishes.add_base(block, vectors) if has_base else vectors

    def survey(model: Model) -> Any:
        stage = stages[trims[0]]
        params = {name: stage.pick(keywords) for name, keywords in model.params.items()}
        if trims[0] > 0 and any(given.get("trim") == "model" for given in params.values()):
            raise RecipeError("transforms: with trim: model, trim must be the first transform")
        return survey_trim(_View(model, params))

    def by_rows(keywords: Mapping[str, Any]) -> bool:
        return any(
            stage.name == "magprune" or (stage.name == "nuslerp" and geodesic.by_rows(stage.pick(keywords)))
            for stage in stages
        )

    two = any(stage.name == "nuslerp" for stage in stages)
    return MergeMethod(
        name=" → ".join(stage.name for stage in stages),
        fn=run,
        paper="composed in the recipe",
        summary="A method composed in the recipe.",
        base="required" if recipe.base_model is not None else "unused",
        scope="element",
        parameters=parameters,
        experts=(2, 2) if two else (1, None),
        survey=survey if trims else None,
        row_scope_if=by_rows,
    )


@dataclasses.dataclass(frozen=True)
class _View:
    """A survey's model with the parameters of one stage."""

    model: Model
    params: Mapping[str, Mapping[str, Any]]

    def each(self, fn: Callable[[Block], Any]) -> dict[str, Any]:
        return self.model.each(fn)

    def total(self, fn: Callable[[Block], Any]) -> Any:
        return self.model.total(fn)
