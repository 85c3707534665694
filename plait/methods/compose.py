"""The method of a recipe: one by name, or one that the recipe spells out of transforms, a combine and finishes.

    transforms: [{trim: {density: 0.2}}, {drop: {density: 0.5}}]
    combine: {elect: {normalize: false}}
    finish: [{scale: {lambda: 0.4}}]

Finishes may also follow a method by name, which is then the first stage. A stage's parameters may also stand wherever a
recipe has parameters (per model, with gradients and filters), under their own name, or as `stage.name` where two stages
share it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from plait.errors import RecipeError, nearest
from plait.methods import combines, finishes, geodesic, learned, spectral, transforms
from plait.methods.awd import diagnostics, subtract, survey_awd
from plait.methods.block import Block
from plait.methods.contract import Learned, MergeMethod, Parameter, get_method, parameters_of
from plait.methods.knots import aligned
from plait.methods.matrices import is_matrix
from plait.methods.routed import routed_over
from plait.methods.stream import Stream
from plait.methods.survey import Model, survey_trim
from plait.methods.wudi import is_linear, least_interference
from plait.recipe import Recipe

_ON_TASK_VECTORS = {**spectral.COMBINES, "wudi": least_interference, "knots": aligned}
_STAGES: dict[str, Mapping[str, Callable[..., Stream]]] = {
    "transforms": {**transforms.TRANSFORMS, "awd": subtract, "tsv": spectral.singular_parts},
    "combine": {**combines.COMBINES, **geodesic.COMBINES, **_ON_TASK_VECTORS, **learned.COMBINES},
    "finish": finishes.FINISHES,
}
_WHOLE: Mapping[str, Callable[[str, tuple[int, ...]], bool]] = {
    **dict.fromkeys(_ON_TASK_VECTORS, is_matrix),
    "wudi": is_linear,
    "svc": is_matrix,
    "tsv": is_matrix,
}
"""Stages that need some tensors in one piece."""
_SURVEYS: Mapping[str, Callable[[Model], Any]] = {"trim": survey_trim, "awd": survey_awd}
"""Transforms that look at the whole model first. They see the task vectors as they are, so they must be first."""


@dataclasses.dataclass(frozen=True)
class _Stage:
    kind: str
    name: str
    fn: Callable[..., Stream]
    parameters: Mapping[str, Parameter]
    whole_if: Callable[[str, tuple[int, ...]], bool] | None = None

    def prefix(self) -> str:
        return f"{self.name}__"

    def pick(self, keywords: Mapping[str, Any]) -> dict[str, Any]:
        start = self.prefix()
        return {key[len(start) :]: value for key, value in keywords.items() if key.startswith(start)}


def method_of(recipe: Recipe) -> tuple[MergeMethod, Recipe]:
    """The recipe's method, and the recipe with the stages' own parameters moved to where all parameters are."""
    named = get_method(recipe.merge_method) if recipe.merge_method is not None else None
    if named is not None and named.dynamic is not None:
        return _routed(named, recipe)
    for key in ("route", "shared"):
        if getattr(recipe, key):
            raise RecipeError(f"{recipe.where(key)}: is for routed methods, such as twin or wemoe; remove it")
    if named is not None and not recipe.finish:
        return named, recipe
    stages, inline, listed = [], {}, []
    if named is not None:
        stages.append(_named(named, recipe))
        inline[named.name] = {}
    else:
        listed += [("transforms", i, item) for i, item in enumerate(recipe.transforms)]
        listed.append(("combine", None, recipe.combine))
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
    method = _method(recipe, stages, parameters, named)
    return method, recipe.model_copy(update={"parameters": {**settings, **recipe.parameters}})


_SHARED = ("merge_method", "transforms", "combine", "finish", "state")


def _routed(named: MergeMethod, recipe: Recipe) -> tuple[MergeMethod, Recipe]:
    """A routed method over what `shared:` says, with the options of `route:`."""
    dynamic, where = named.dynamic, recipe.where("shared")
    assert dynamic is not None
    if recipe.transforms or recipe.combine or recipe.finish:
        raise RecipeError(f"{where}: what {named.name} does not route is merged by shared:; move the stages there")
    options = route_options(recipe, named)
    if recipe.shared is None:
        method = routed_over(named, named.name, named.paper, named.summary, dynamic, options, {})
        return method, recipe
    given: Mapping[str, Any] = {"merge_method": recipe.shared} if isinstance(recipe.shared, str) else recipe.shared
    for key in given:
        if key not in _SHARED:
            raise RecipeError(f"{where}: has no key '{key}'{nearest(key, _SHARED)}; parameters stand under parameters:")
    cleared = {"merge_method": None, "route": {}, "shared": None}
    for key, kind in (("merge_method", str), ("state", str), ("transforms", list), ("finish", list)):
        if not isinstance(given.get(key, kind()), kind):
            what = "text" if kind is str else "list"
            raise RecipeError(f"{where}: {key} must be a {what}, got {given[key]!r:.80}")
    stages = {key: value for key, value in given.items() if key != "state"}
    if ("merge_method" in stages) == ("combine" in stages):
        raise RecipeError(f"{where}: give either merge_method, or combine (with transforms and finish)")
    static, inner = method_of(recipe.model_copy(update={**cleared, **stages}))
    if static.dynamic is not None:
        raise RecipeError(f"{where}: {static.name} is routed itself; name a method that gives one model")
    if static.learned is not None and "state" not in given:
        raise RecipeError(
            f"{where}: {static.name} learns; fit it first (plait fit) and give its folder: "
            f"shared: {{merge_method: {static.name}, state: FOLDER}}"
        )
    method = routed_over(static, named.name, named.paper, named.summary, dynamic, options, {})
    return method, recipe.model_copy(update={"parameters": inner.parameters})


def route_options(recipe: Recipe, method: MergeMethod) -> Any:
    """The options under `route:`, checked; None for a method that routes nothing.

    Raises RecipeError for keys that the method does not have, and values out of range.
    """
    if method.dynamic is None:
        return None
    return method.dynamic.options(**checked(recipe, "route", method, method.dynamic.parameters))


def checked(recipe: Recipe, section: str, method: MergeMethod, known: Mapping[str, Parameter]) -> dict[str, Any]:
    """The options in a section of the recipe as keyword arguments. Raises RecipeError for what is not `known`."""
    given = {}
    for key, value in getattr(recipe, section).items():
        where = recipe.where(section, key)
        if key not in known:
            hint = f"; '{key}' stands under parameters:" if key in method.parameters else nearest(key, known)
            raise RecipeError(f"{where}: {method.name} has no {section} option '{key}'{hint}")
        given[known[key].keyword] = known[key].check(value, where)
    return given


def _named(method: MergeMethod, recipe: Recipe) -> _Stage:
    """A whole method as the first stage: what it adds to the base."""
    where = recipe.where("finish")
    if method.base == "unused":
        raise RecipeError(f"{where}: {method.name} merges weights, not task vectors; give combine instead of it")
    if method.learned is not None:
        raise RecipeError(f"{where}: {method.name} learns, and would not see what follows; remove finish")

    def added(block: Block, _: Stream, **keywords: Any) -> Stream:
        return method.fn(block, **keywords).map(lambda merged, base: merged - base, block.base)

    return _Stage("merge_method", method.name, added, method.parameters, method.whole_if)


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
    stage = _Stage(kind, name, known[name], parameters_of(known[name]), _WHOLE.get(name))
    for key in given:
        if key not in stage.parameters:
            raise RecipeError(f"{where}: '{name}' has no parameter '{key}'{nearest(key, stage.parameters)}")
    return stage, dict(given)


def _method(
    recipe: Recipe, stages: list[_Stage], parameters: Mapping[str, Parameter], named: MergeMethod | None
) -> MergeMethod:
    for stage in stages:
        on_task_vectors = (
            stage.kind in ("transforms", "merge_method") or stage.name in _WHOLE or stage.name in learned.COMBINES
        )
        if recipe.base_model is None and on_task_vectors:
            raise RecipeError(f"{recipe.where(stage.kind)}: {stage.name} works on task vectors; add base_model:")
        if stage.name == "awd" and stage is not stages[0]:
            raise RecipeError(f"{recipe.where('transforms')}: awd must be the first transform")
    fit = _learned(recipe, stages)
    looks = named.survey if named is not None else _SURVEYS.get(stages[0].name)

    def transformed(block: Block, **keywords: Any) -> Stream:
        vectors = block.deltas if block.read_base is not None else block.models
        for stage in stages:
            if stage.kind == "transforms":
                vectors = stage.fn(block, vectors, **stage.pick(keywords))
        return vectors

    def run(block: Block, **keywords: Any) -> Stream:
        vectors = transformed(block, **keywords)
        for stage in stages:
            if stage.kind != "transforms":
                vectors = stage.fn(block, vectors, **stage.pick(keywords))
        return finishes.add_base(block, vectors) if block.read_base is not None else vectors

    def survey(model: Model) -> Any:
        params = [{name: stage.pick(keywords) for name, keywords in model.params.items()} for stage in stages]
        for stage, given in zip(stages[1:], params[1:], strict=True):
            if stage.name == "trim" and any(own.get("trim") == "model" for own in given.values()):
                raise RecipeError("transforms: with trim: model, trim must be the first transform")
        return looks(_View(model, params[0])) if looks is not None else None

    def by_rows(keywords: Mapping[str, Any]) -> bool:
        if named is not None:
            return named.row_scope_if is not None and named.row_scope_if(stages[0].pick(keywords))
        return any(
            stage.name == "magprune" or (stage.name == "nuslerp" and geodesic.by_rows(stage.pick(keywords)))
            for stage in stages
        )

    def whole(name: str, shape: tuple[int, ...]) -> bool:
        return any(stage.whole_if is not None and stage.whole_if(name, shape) for stage in stages)

    two = any(stage.name == "nuslerp" for stage in stages)
    return MergeMethod(
        name=" → ".join(stage.name for stage in stages),
        fn=run,
        paper="composed in the recipe",
        summary="A method composed in the recipe.",
        base="required" if recipe.base_model is not None else "unused",
        scope=named.scope if named is not None else "element",
        parameters=parameters,
        experts=named.experts if named is not None else (2, 2) if two else (1, None),
        survey=survey if looks is not None or any(stage.name == "trim" for stage in stages) else None,
        row_scope_if=by_rows,
        whole_if=whole,
        learned=None if fit is None else dataclasses.replace(fit, vectors=transformed),
        explain=named.explain if named is not None else diagnostics if stages[0].name == "awd" else None,
    )


def _learned(recipe: Recipe, stages: list[_Stage]) -> Learned | None:
    """How the combine is fitted, if it learns."""
    found = next((stage for stage in stages if stage.name in learned.COMBINES), None)
    if found is not None and stages[-1] is not found:
        raise RecipeError(
            f"{recipe.where('finish')}: {found.name} learns, and would not see what follows; remove finish"
        )
    return None if found is None else get_method(found.name).learned


@dataclasses.dataclass(frozen=True)
class _View:
    """A survey's model with the parameters of one stage."""

    model: Model
    params: Mapping[str, Mapping[str, Any]]

    @property
    def numel(self) -> int:
        return self.model.numel

    @property
    def memory(self) -> int:
        return self.model.memory

    def each(self, fn: Callable[[Block], Any]) -> dict[str, Any]:
        return self.model.each(fn)

    def total(self, fn: Callable[[Block], Any]) -> Any:
        return self.model.total(fn)
