"""What will happen, decided from headers alone: models opened and aligned, every tensor decided about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plait.decide import Planner, Refusal, TensorPlan
from plait.errors import CheckpointError, RecipeError
from plait.experts import Input, Library, Model, align_model
from plait.layers import resize_config
from plait.layout import BASE
from plait.methods.compose import checked, method_of, route_options
from plait.methods.contract import MergeMethod
from plait.methods.learned import options_of
from plait.recipe import Recipe
from plait.settings import Resolver
from plait.vocabulary import Vocabulary, match_vocabularies


@dataclass
class Plan:
    """Everything the run needs, and everything `plait plan` shows."""

    recipe: Recipe
    method: MergeMethod
    tensors: list[TensorPlan]
    heads: dict[str, list[Input]]
    """Task → its own tensors, written beside the model."""
    models: list[Model]
    """Experts in canonical order."""
    base: Model | None
    donor: Model
    """Whose config.json, tokenizer and other side files are taken."""
    config: dict[str, Any]
    notes: list[str]
    refused: list[Refusal]
    """Tensors that do not fit; only where `make_plan` was told not to raise for them."""
    library: Library
    vocabulary: Vocabulary
    fit: Any = None
    """Options of the fit, for methods that learn."""
    route: Any = None
    """Options of the routing, for methods that route."""

    @property
    def bytes_in(self) -> int:
        """Bytes read, each input once."""
        return sum(tensor.bytes_in for tensor in self.tensors)

    @property
    def bytes_out(self) -> int:
        """Bytes of weights written."""
        return sum(tensor.spec.nbytes for tensor in self.tensors)

    @property
    def merged(self) -> list[TensorPlan]:
        """The tensors that are merged."""
        return [tensor for tensor in self.tensors if tensor.action == "merge"]

    def least_memory(self) -> tuple[int, str]:
        """The budget without which the largest job cannot run, and its tensor."""
        return max(((t.working_bytes(), t.name) for t in self.tensors), default=(0, ""))

    def opened(self) -> list[Model]:
        """All models whose files are read: base, experts, and what adapters sit on."""
        found: dict[str, Model] = {}
        for model in [*([self.base] if self.base else []), *self.models]:
            for each in [model, *([model.under] if model.under else [])]:
                found.setdefault(each.label, each)
        return list(found.values())


def make_plan(recipe: Recipe, *, strict: bool = True) -> Plan:
    """Open the recipe's models (headers only), align them, and decide about every tensor.

    Raises RecipeError for what the recipe asks wrongly, CheckpointError for files that do not fit; with `strict` off
    tensors that do not fit are listed in `Plan.refused` instead.
    """
    method, recipe = method_of(recipe)
    fit = fit_options(recipe, method)
    names = recipe.names()
    resolver = Resolver(recipe, method, names)
    resolver.check_names()
    library = Library(recipe)
    base = library.model(recipe.base_model, BASE, None) if recipe.base_model is not None else None
    if base is not None and base.is_adapter:
        raise RecipeError(f"{recipe.where('base_model')}: is an adapter; the base must be a whole model")
    opened = {spec: library.model(spec, name, base) for spec, name in names.items()}
    ordered = sorted(opened.values(), key=lambda model: model.name)
    reference = base or _first_whole(recipe, opened, ordered)
    for model in [reference, *ordered]:
        align_model(model, reference)
    notes = list(resolver.notes)
    if recipe.data is not None and method.learned is None:
        notes.append(f"data is not used: {method.name} learns nothing")
    vocabulary = match_vocabularies(recipe, reference, base, ordered)
    notes += vocabulary.notes
    experts = _experts(recipe, method, base, opened)
    planner = Planner(recipe, method, resolver, reference, base, experts)
    tensors = planner.run()
    if planner.refused and strict:
        raise CheckpointError(refusal_text(planner.refused))
    if not planner.refused:
        resolver.check_filters(planner.merged_names)
    donor = reference if reference is base else _donor(recipe, opened, ordered)
    config = dict(donor.config)
    if recipe.slices is not None:
        config = resize_config(config, planner.layers.counts[planner.layers.main()], planner.picked)
    notes += planner.notes
    for model in ordered:
        notes += [f"{model.name}: {note}" for note in model.notes]
    heads = planner.heads(ordered, library) if recipe.slices is None else {}
    return Plan(
        recipe, method, tensors, heads, ordered, base, donor, config, notes, planner.refused, library, vocabulary, fit,
        route_options(recipe, method),
    )  # fmt: skip


def fit_options(recipe: Recipe, method: MergeMethod) -> Any:
    """The options that a learned method is fitted with; None for a method that learns nothing.

    Raises RecipeError for keys under `fit:` that the method does not have, and values out of range.
    """
    if method.learned is None:
        if recipe.fit:
            raise RecipeError(f"{recipe.where('fit')}: {method.name} learns nothing; remove fit:, or change the method")
        return None
    return options_of(method.learned, checked(recipe, "fit", method, method.learned.parameters))


def refusal_text(refused: list[Refusal]) -> str:
    """The first few refusals, a line each."""
    more = f"\n… and {len(refused) - 5} more" if len(refused) > 5 else ""
    return "\n".join(refusal.why for refusal in refused[:5]) + more


def _first_whole(recipe: Recipe, opened: Mapping[str, Model], ordered: list[Model]) -> Model:
    if recipe.slices is not None:
        first = opened[recipe.slices[0].sources[0].model]  # the order of slices has meaning
        return first.under or first
    for model in ordered:
        if not model.is_adapter:
            return model
    under = ordered[0].under
    assert under is not None
    return under


_COSMETIC = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "id2label", "label2id", "architectures",
    "problem_type", "finetuning_task", "use_cache", "output_past",
}  # fmt: skip


def _donor(recipe: Recipe, opened: Mapping[str, Model], ordered: list[Model]) -> Model:
    """Without a base: the first model by name, but only where it makes no difference which."""
    first = _first_whole(recipe, opened, ordered)
    if recipe.slices is not None:
        return first
    for model in ordered:
        keys = set(first.config) | set(model.config)
        differ = sorted(k for k in keys - _COSMETIC if first.config.get(k) != model.config.get(k))
        if differ:
            raise RecipeError(
                f"{recipe.where('base_model')}: the models' config.json differ ({', '.join(differ[:5])} of "
                f"{first.label} and {model.label}); name a base_model, whose config.json is then taken"
            )
    return first


def _experts(recipe: Recipe, method: MergeMethod, base: Model | None, opened: Mapping[str, Model]) -> list[list[Model]]:
    """Per slice (one for `models`) the experts in canonical order, checked for number and for the base."""
    groups = []
    sources = [[s.model for s in piece.sources] for piece in recipe.slices or []]
    for index, listed in enumerate(sources or [[entry.model for entry in recipe.models or []]]):
        where = recipe.where("slices", index) if recipe.slices else recipe.where("models")
        if len(set(listed)) < len(listed):
            raise RecipeError(f"{where}: one model twice in a slice; list the layers as two slices")
        group = sorted((opened[spec] for spec in listed), key=lambda model: model.name)
        if base is not None and method.base != "unused":
            group = [model for model in group if model.source is not base.source]
        if method.base == "required" and base is None:
            raise RecipeError(f"{recipe.where('base_model')}: {method.name} works on task vectors; add base_model:")
        least, most = method.experts
        if len(group) < least or (most is not None and len(group) > most):
            wanted = f"exactly {least}" if least == most else f"at least {least}"
            beside = " beside the base" if method.base == "required" else ""
            raise RecipeError(f"{where}: {method.name} takes {wanted} model(s){beside}, got {len(group)}")
        groups.append(group)
    return groups
