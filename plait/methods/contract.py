"""What a merge method is: a typed function over a Block whose signature is its schema.

    @merge_method("ties", paper="arXiv:2306.01708", base="required")
    def ties(block: Block, *, density: PerModel[Fraction] = 1.0, normalize: bool = True) -> Stream: ...

Parameter names, types, ranges and defaults are read from the annotations, so the recipe, the command line, the docs
and the function cannot disagree. A trailing underscore is dropped (`lambda_` is `lambda` in a recipe).
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar, Union

from plait.errors import RecipeError, nearest
from plait.lazy import torch
from plait.methods.block import Block
from plait.methods.stream import Scope, Stream

T = TypeVar("T")
BaseUse = Literal["required", "optional", "unused"]


@dataclass(frozen=True)
class Range:
    """Closed interval a number must lie in; `open_low` excludes the lower end."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.open_low else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'> ' if self.open_low else '>= '}{self.low:g}" if self.low > -math.inf else "any number"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}]"


_PER_MODEL = "per model"
PerModel = Annotated[Union[T, Sequence[T]], _PER_MODEL]  # noqa: UP007  (a generic alias must be subscriptable on 3.10)
"""A value per expert; the function may be given one value for all, or a sequence of K."""
Fraction = Annotated[float, Range(0, 1)]
"""A share: 0 to 1."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, as a recipe spells it."""

    name: str
    keyword: str
    kind: type
    default: Any
    per_model: bool = False
    limits: Range | None = None
    choices: tuple[str, ...] = ()
    required: bool = False

    def check(self, value: Any, where: str) -> Any:
        """The value in its own type, or a RecipeError with one sentence: what it must be, what it is."""
        if value is None and self.default is None:
            return None
        if self.kind is bool:
            if isinstance(value, bool):
                return value
            raise RecipeError(f"{where}: must be true or false, got {value!r}")
        if self.choices:
            if value in self.choices:
                return value
            raise RecipeError(f"{where}: must be one of {', '.join(self.choices)}, got {value!r}")
        if self.kind is str:
            if isinstance(value, str):
                return value
            raise RecipeError(f"{where}: must be a text, got {value!r}")
        number = _number(value)
        if number is None or not math.isfinite(number):
            raise RecipeError(f"{where}: must be a number{self._expected()}, got {value!r}")
        if self.kind is int and number != int(number):
            raise RecipeError(f"{where}: must be a whole number{self._expected()}, got {value!r}")
        if self.limits is not None and number not in self.limits:
            raise RecipeError(f"{where}: must be a number{self._expected()}, got {value!r}")
        return int(number) if self.kind is int else number

    def _expected(self) -> str:
        return f" {self.limits}" if self.limits is not None else ""

    def describe(self) -> str:
        """`number in [0, 1], per model`."""
        kind = " | ".join(self.choices) or {bool: "true | false", str: "text", int: "whole number"}.get(self.kind)
        text = kind or "number"
        if self.limits is not None and str(self.limits) != "any number":
            text += f" {self.limits}"
        return text + (", per model" if self.per_model else "")


def _number(value: Any) -> float | None:
    """YAML reads 1e-3 as text; mergekit's users write it, so it counts as a number."""
    if isinstance(value, bool):
        return None
    if not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):  # no number; a whole one beyond all floats
        return None


class _Schema(Mapping[str, Parameter]):
    """`parameters_of` a function, read when first asked: most runs need one method of some fifty."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn

    @cached_property
    def _known(self) -> dict[str, Parameter]:
        return parameters_of(self._fn)

    def __getitem__(self, name: str) -> Parameter:
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def parameters_of(fn: Callable[..., Any]) -> dict[str, Parameter]:
    """The keyword-only parameters of a stage or method, by recipe name."""
    hints = typing.get_type_hints(fn, include_extras=True)
    result = {}
    for keyword, parameter in inspect.signature(fn).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            required = parameter.default is inspect.Parameter.empty
            default = None if required else parameter.default
            result[keyword.rstrip("_")] = _parameter(keyword, hints[keyword], default, required)
    return result


def _parameter(keyword: str, hint: Any, default: Any, required: bool) -> Parameter:
    per_model, limits, choices = False, None, ()
    while True:
        origin = typing.get_origin(hint)
        if origin is Annotated:
            hint, *extras = typing.get_args(hint)
            for extra in extras:
                if extra == _PER_MODEL:
                    per_model = True
                elif isinstance(extra, Range):
                    limits = extra
        elif origin in (Union, types.UnionType):
            # PerModel[x] is x | Sequence[x]; an optional is x | None: the first member says it all.
            hint = typing.get_args(hint)[0]
        elif origin is Literal:
            choices, hint = typing.get_args(hint), str
        else:
            return Parameter(keyword.rstrip("_"), keyword, hint, default, per_model, limits, choices, required)


@dataclass(frozen=True)
class Learned:
    """How a method that learns is fitted; `plait.learn` has the learners."""

    learner: str
    """Name of the procedure that learns."""
    options: Callable[..., Any]
    """Dataclass of the keys under `fit:`; its fields are the schema."""
    vectors: Callable[..., Stream]
    """(block, **parameters) → [K, n]: the task vectors, transformed, that the learned numbers weigh."""
    sees: str = "unlabeled inputs"
    """What data it learns from, for tables."""

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Keys under `fit:`."""
        return parameters_of(self.options)


@dataclass(frozen=True)
class Dynamic:
    """How a routed model is made: its experts stay apart, and inputs decide how far each is mixed in."""

    options: Callable[..., Any]
    """Dataclass of the keys under `route:`; its fields are the schema."""
    shared: str = "task_arithmetic"
    """The method of what is not routed, unless the recipe's `shared:` names another."""
    shared_parameters: Mapping[str, Any] = field(default_factory=dict)
    """Its parameters, where they differ from the method's own defaults."""
    router: Callable[[Any], Learned | None] = lambda options: None
    """(options) → how the router is fitted; None where there is nothing to learn."""

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Keys under `route:`."""
        return parameters_of(self.options)


@dataclass(frozen=True)
class MergeMethod:
    """A registered method. Callable on a Block, on tensors in memory, or on state dicts in memory."""

    name: str
    fn: Callable[..., Stream]
    paper: str
    summary: str
    base: BaseUse
    scope: Scope
    parameters: Mapping[str, Parameter]
    experts: tuple[int, int | None]
    """Least and greatest number of experts (the base not counted)."""
    survey: Callable[..., Any] | None = None
    """survey(blocks, params) → state: a pass over the whole model before the merge, or None when not needed."""
    row_scope_if: Callable[[Mapping[str, Any]], bool] | None = None
    """Parameters under which an element-wise method needs whole rows."""
    whole_if: Callable[[str, tuple[int, ...]], bool] | None = None
    """(name, shape) → whether this tensor is needed in one piece; the others are cut as `scope` says."""
    cost: float = 1.0
    """Nanoseconds of one thread per entry and expert, measured (docs/LOG.md): for time estimates only."""
    learned: Learned | None = None
    """What it learns before it can merge; None for methods that learn nothing."""
    explain: Callable[[Any], dict[str, Any]] | None = None
    """explain(state of the survey) → what it found, as small plain data; `notes` in it are told to the user."""
    dynamic: Dynamic | None = None
    """How it routes; None for methods whose result has one set of weights for all inputs."""

    def scope_for(self, params: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Scope:
        """How far a tensor may be cut, given the parameters."""
        if self.whole_if is not None and self.whole_if(name, shape):
            return "tensor"
        return "row" if self.row_scope_if is not None and self.row_scope_if(params) else self.scope

    def check_together(self, keywords: Mapping[str, Any], tensor: str, where: Callable[[str], str]) -> None:
        """Refuse values that are fine one by one but not together. `where` tells a key's place in the recipe."""
        stages: dict[str, dict[str, Any]] = {}
        for keyword, value in keywords.items():  # composed methods prefix their stages' keywords
            stage, _, name = keyword.rpartition("__")
            stages.setdefault(stage, {})[name] = value
        for given in stages.values():
            self._check_weights(given, tensor, where)
            for d, e in zip(given.get("density", ()), given.get("epsilon", ()), strict=False):
                if 0 < d < 1 and not (d - e > 0 and d + e < 1):
                    raise RecipeError(
                        f"{where('epsilon')}: density ± epsilon must lie inside (0, 1), got {d} ± {e} for "
                        f"tensor '{tensor}'; lower epsilon"
                    )

    def _check_weights(self, given: Mapping[str, Any], tensor: str, where: Callable[[str], str]) -> None:
        weights = given.get("weight")
        normalized = given.get("normalize", given.get("normalize_weights", False))
        if normalized and isinstance(weights, Sequence) and weights and abs(sum(weights)) < 1e-12:
            raise RecipeError(
                f"{where('weight')}: the weights {list(weights)} for tensor '{tensor}' sum to zero, and "
                f"{self.name} divides by their sum; change a weight, or set normalize: false"
            )

    def __call__(
        self,
        models: Block | Sequence[torch.Tensor] | Sequence[Mapping[str, torch.Tensor]],
        base: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        *,
        tasks: Sequence[str] | None = None,
        seed: int = 0,
        **params: Any,
    ) -> Any:
        """Merge in memory.

        A Block gives a Stream; a list of tensors [*s] and an optional base [*s] give a tensor [*s]; a list of state
        dicts and an optional base state dict give a state dict. Results are float32 (float64 for float64 input).
        Raises RecipeError for an unknown or invalid parameter, ValueError for shapes that differ.
        """
        keywords = self.keywords(params)
        if self.dynamic is not None:
            raise RecipeError(f"{self.name}: makes a routed model, not tensors; use plait.merge")
        if isinstance(models, Block):
            return self.fn(models, **keywords)
        from plait.methods.memory import merge_in_memory

        return merge_in_memory(self, models, base, tasks=tasks, seed=seed, params=keywords)

    def keywords(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Checked keyword arguments from recipe names or Python names."""
        result = {}
        for name, value in params.items():
            parameter = self.parameters.get(name.rstrip("_"))
            if parameter is None:
                raise RecipeError(f"{self.name}: unknown parameter '{name}'{nearest(name, self.parameters)}")
            where = f"{self.name}: {parameter.name}"
            if parameter.per_model and isinstance(value, Sequence) and not isinstance(value, str):
                result[parameter.keyword] = [parameter.check(item, where) for item in value]
            else:
                result[parameter.keyword] = parameter.check(value, where)
        missing = [p.name for p in self.parameters.values() if p.required and p.keyword not in result]
        if missing:
            raise RecipeError(f"{self.name}: parameter '{missing[0]}' is required; add it under parameters:")
        return result


_METHODS: dict[str, MergeMethod] = {}


def merge_method(
    name: str,
    *,
    paper: str,
    base: BaseUse = "required",
    scope: Scope = "element",
    experts: tuple[int, int | None] = (1, None),
    survey: Callable[..., Any] | None = None,
    row_scope_if: Callable[[Mapping[str, Any]], bool] | None = None,
    whole_if: Callable[[str, tuple[int, ...]], bool] | None = None,
    cost: float = 1.0,
    learned: Learned | None = None,
    explain: Callable[[Any], dict[str, Any]] | None = None,
    register: bool = True,
) -> Callable[[Callable[..., Stream]], MergeMethod]:
    """Make a MergeMethod of a function and register it; a name that is taken is an error."""

    def decorate(fn: Callable[..., Stream]) -> MergeMethod:
        summary = (inspect.getdoc(fn) or "").split("\n\n")[0].replace("\n", " ")
        method = MergeMethod(
            name, fn, paper, summary, base, scope, _Schema(fn), experts, survey, row_scope_if, whole_if, cost,
            learned, explain,
        )  # fmt: skip
        return add_method(method) if register else method

    return decorate


def add_method(method: MergeMethod) -> MergeMethod:
    """Make a method known by its name; a name that is taken is an error."""
    if method.name in _METHODS:
        raise ValueError(f"a merge method named '{method.name}' is already registered")
    _METHODS[method.name] = method
    return method


def get_method(name: str) -> MergeMethod:
    """The method of that name; RecipeError with the nearest known name otherwise."""
    if name not in _METHODS:
        raise RecipeError(f"merge_method: unknown method '{name}'{nearest(name, _METHODS)}")
    return _METHODS[name]


def split_settings(name: str, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings of a method by where they stand in a recipe: under `parameters:`, `route:` or `fit:`."""
    method = get_method(name)
    places: dict[str, Mapping[str, Parameter]] = {"parameters": method.parameters}
    if method.dynamic is not None:
        places["route"] = method.dynamic.parameters
    if method.learned is not None:
        places["fit"] = method.learned.parameters
    found: dict[str, dict[str, Any]] = {"parameters": {}}
    for key, value in settings.items():
        place = next((place for place, known in places.items() if key in known), "parameters")
        found.setdefault(place, {})[key] = value
    return found


def all_methods() -> dict[str, MergeMethod]:
    """All registered methods by name."""
    return dict(sorted(_METHODS.items()))
