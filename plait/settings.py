"""Values of a method's parameters for every tensor: scalars, gradients over depth, filters, and who overrides whom.

The rules are mergekit's. A setting is a scalar; a list of scalars (numbers interpolate over depth t, others pick one);
or a list of {filter, value} of which the first whose filter is part of the tensor's name counts. From strongest to
weakest: the model's own parameters, the slice's, the recipe's, the method's default. A setting whose filters all miss
leaves the word to the next weaker one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plait.errors import RecipeError, nearest
from plait.methods.contract import MergeMethod, Parameter
from plait.recipe import IGNORED_PARAMETERS, Recipe, Settings

Path = tuple[str | int, ...]
_UNSET = object()


@dataclass(frozen=True)
class Scope:
    """One `parameters:` mapping and where it stands."""

    settings: Settings
    path: Path


@dataclass
class Resolver:
    """Resolves one recipe's settings for one method."""

    recipe: Recipe
    method: MergeMethod
    names: Mapping[str, str]
    """Model spelling → name."""
    notes: list[str] = field(default_factory=list)

    def check_names(self) -> None:
        """Refuse parameters the method does not have, and values out of range, before any tensor is looked at."""
        for scope in self._all_scopes():
            for key, setting in scope.settings.items():
                where = self.recipe.where(*scope.path, key)
                if key in IGNORED_PARAMETERS and key not in self.method.parameters:
                    self.notes.append(f"{key} has no effect: {IGNORED_PARAMETERS[key]}")
                    continue
                parameter = self.method.parameters.get(key)
                if parameter is None:
                    hint = nearest(key, self.method.parameters) or "; it has none"
                    if self.method.learned is not None and key in self.method.learned.parameters:
                        hint = f"; {key} stands under fit:"
                    raise RecipeError(f"{where}: {self.method.name} has no parameter '{key}'{hint}")
                if _is_model_scope(scope.path) and not parameter.per_model:
                    raise RecipeError(
                        f"{where}: '{key}' of {self.method.name} is one value for all models; "
                        "move it to the recipe's parameters"
                    )
                for value, path in _leaves(setting, (*scope.path, key), self.recipe):
                    parameter.check(value, self.recipe.where(*path))

    def check_filters(self, tensor_names: Sequence[str]) -> None:
        """Refuse filters that are part of no tensor's name."""
        for scope in self._all_scopes():
            for key, setting in scope.settings.items():
                for condition, path in _conditions(setting, (*scope.path, key)):
                    text = condition.get("filter")
                    if text in (None, "*") or any(str(text) in name for name in tensor_names):
                        continue
                    parts = sorted({part for name in tensor_names for part in name.split(".") if not part.isdigit()})
                    raise RecipeError(
                        f"{self.recipe.where(*path, 'filter')}: '{text}' is part of no merged tensor's name"
                        f"{nearest(str(text), parts)}"
                    )

    def keywords(
        self, tensor: str, t: float, models: Sequence[str], inputs: Mapping[str, str], slice_index: int | None = None
    ) -> dict[str, Any]:
        """Keyword arguments for one tensor. `models` in canonical order; `inputs`: model → its name of the tensor.

        Raises RecipeError for a required parameter nobody gives, and for weights that sum to zero where normalised.
        """
        result: dict[str, Any] = {}
        for parameter in self.method.parameters.values():
            if parameter.per_model:
                values = [
                    self._value(parameter, self._scopes(model, slice_index), inputs.get(model, tensor), t)
                    for model in models
                ]
                result[parameter.keyword] = values
            else:
                result[parameter.keyword] = self._value(parameter, self._scopes(None, slice_index), tensor, t)
        self.method.check_together(result, tensor, self._where)
        return result

    def _where(self, key: str) -> str:
        """The first place where a parameter is set, or where all models' parameters are."""
        for scope in self._all_scopes():
            for name in scope.settings:
                if name == key or name.endswith("." + key):
                    return self.recipe.where(*scope.path, name)
        return self.recipe.where("parameters", key)

    def _value(self, parameter: Parameter, scopes: Sequence[Scope], tensor: str, t: float) -> Any:
        for scope in scopes:
            if parameter.name in scope.settings:
                where = self.recipe.where(*scope.path, parameter.name)
                value = evaluate(scope.settings[parameter.name], tensor, t, parameter, where)
                if value is not _UNSET:
                    return value
        if parameter.required:
            raise RecipeError(
                f"{self.recipe.where('parameters')}: {self.method.name} needs '{parameter.name}' "
                f"({parameter.describe()}), and nothing sets it for tensor '{tensor}'"
            )
        return parameter.default

    def _scopes(self, model: str | None, slice_index: int | None) -> list[Scope]:
        scopes = []
        if slice_index is not None and self.recipe.slices is not None:
            piece = self.recipe.slices[slice_index]
            for i, source in enumerate(piece.sources):
                if model is not None and self.names[source.model] == model:
                    scopes.append(Scope(source.parameters, ("slices", slice_index, "sources", i, "parameters")))
            scopes.append(Scope(piece.parameters, ("slices", slice_index, "parameters")))
        for i, entry in enumerate(self.recipe.models or []):
            if model is not None and self.names[entry.model] == model:
                scopes.append(Scope(entry.parameters, ("models", i, "parameters")))
        scopes.append(Scope(self.recipe.parameters, ("parameters",)))
        return scopes

    def _all_scopes(self) -> Iterator[Scope]:
        for i, entry in enumerate(self.recipe.models or []):
            yield Scope(entry.parameters, ("models", i, "parameters"))
        for s, piece in enumerate(self.recipe.slices or []):
            for i, source in enumerate(piece.sources):
                yield Scope(source.parameters, ("slices", s, "sources", i, "parameters"))
            yield Scope(piece.parameters, ("slices", s, "parameters"))
        yield Scope(self.recipe.parameters, ("parameters",))


def evaluate(setting: Any, tensor: str, t: float, parameter: Parameter, where: str) -> Any:
    """A setting's value for one tensor at depth t, or _UNSET when no filter matches."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return parameter.check(setting, where)
    if not setting:
        return _UNSET
    if not any(isinstance(item, Mapping) for item in setting):
        return _gradient([parameter.check(item, where) for item in setting], t, parameter, where)
    for item in setting:
        text = item.get("filter")
        if text in (None, "*") or str(text) in tensor:
            return evaluate(item["value"], tensor, t, parameter, where)
    return _UNSET


def _gradient(values: list[Any], t: float, parameter: Parameter, where: str) -> Any:
    place = t * (len(values) - 1)
    if parameter.kind not in (float, int):
        return values[int(place)]
    if None in values:
        raise RecipeError(f"{where}: a gradient goes from number to number, and one of these is null")
    first = int(place)
    share = place - first
    value = (1 - share) * values[first] + share * values[min(len(values) - 1, first + 1)]
    return parameter.check(value, where)


def _is_model_scope(path: Path) -> bool:
    return "models" in path or "sources" in path


def _conditions(setting: Any, path: Path) -> Iterator[tuple[Mapping[str, Any], Path]]:
    if isinstance(setting, Mapping):
        yield setting, path
    elif isinstance(setting, list):
        for i, item in enumerate(setting):
            if isinstance(item, Mapping):
                yield item, (*path, i)


def _leaves(setting: Any, path: Path, recipe: Recipe) -> Iterator[tuple[Any, Path]]:
    """All scalars of a setting, after checking its form."""
    if isinstance(setting, Mapping):
        for key in setting:
            if key not in ("filter", "value"):
                raise RecipeError(f"{recipe.where(*path, key)}: unknown key '{key}'{nearest(key, ('filter', 'value'))}")
        if "value" not in setting:
            raise RecipeError(f"{recipe.where(*path)}: a filter needs a value")
        yield from _leaves(setting["value"], (*path, "value"), recipe)
    elif isinstance(setting, list):
        if not setting:
            raise RecipeError(f"{recipe.where(*path)}: the list is empty")
        conditional = [isinstance(item, Mapping) for item in setting]
        if any(conditional) and not all(conditional):
            raise RecipeError(f"{recipe.where(*path)}: a list holds either values (a gradient) or filters, not both")
        for i, item in enumerate(setting):
            yield from _leaves(item, (*path, i), recipe)
    else:
        yield setting, path
