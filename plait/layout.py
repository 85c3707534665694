"""The output's tensors in order, and which tensor of each model goes into them: plain models, or slices of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from plait.errors import RecipeError
from plait.experts import Model
from plait.layers import Layers, is_before
from plait.recipe import Recipe

BASE = "(base)"
"""The base's name among models; no model of a recipe can be called that."""


@dataclass(frozen=True)
class Entry:
    """One output tensor. `inputs`: model → reference-style name of what it contributes, where not the same name."""

    name: str
    t: float
    depth: float
    slice_index: int = 0
    inputs: Mapping[str, str] = field(default_factory=dict)

    def of(self, model: str) -> str:
        """The model's tensor that goes here, by the reference's naming."""
        return self.inputs.get(model, self.name)


def entries_of(recipe: Recipe, reference: Model, layers: Layers, base: Model | None) -> tuple[list[Entry], list[int]]:
    """Output tensors in the reference's file order, and for slices the first source's layer of every output layer."""
    names = list(reference.specs())
    if recipe.slices is None:
        return [Entry(name, layers.t(name), layers.depth(name)) for name in names], []
    stack = layers.main()
    model_names = recipe.names()
    before = [name for name in names if layers.place(name) is None and is_before(name)]
    after = [name for name in names if layers.place(name) is None and not is_before(name)]
    rests = [place.rest for name in names if (place := layers.place(name)) is not None and place.index == 0]
    result = [Entry(name, 0.0, 0.0, 0) for name in before]
    picked: list[int] = []
    depth = sum(piece.sources[0].layer_range[1] - piece.sources[0].layer_range[0] for piece in recipe.slices)
    for s, piece in enumerate(recipe.slices):
        length = piece.sources[0].layer_range[1] - piece.sources[0].layer_range[0]
        starts = {model_names[source.model]: source.layer_range[0] for source in piece.sources}
        if base is not None:
            starts[BASE] = _base_start(recipe, s, base)
        for offset in range(length):
            at = len(picked)
            t = offset / (length - 1) if length > 1 else 1.0
            for rest in rests:
                inputs = {model: f"{stack}{first + offset}.{rest}" for model, first in starts.items()}
                result.append(Entry(f"{stack}{at}.{rest}", t, at / max(depth - 1, 1), s, inputs))
            picked.append(piece.sources[0].layer_range[0] + offset)
    result += [Entry(name, 0.0, 1.0, len(recipe.slices) - 1) for name in after]
    return result, picked


def _base_start(recipe: Recipe, index: int, base: Model) -> int:
    """Where the base's layers begin: as it is listed in the slice, or as all its sources agree."""
    assert recipe.slices is not None
    sources = recipe.slices[index].sources
    for source in sources:
        if source.model == recipe.base_model:
            return source.layer_range[0]
    starts = {source.layer_range[0] for source in sources}
    if len(starts) > 1:
        raise RecipeError(
            f"{recipe.where('slices', index)}: the sources take different layers, so say which the base gives: "
            f"list {base.label} among the sources with its layer_range"
        )
    return starts.pop()
