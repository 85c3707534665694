"""Where a tensor stands in depth, read off the tensor names alone.

A stack is a run of names that differ only in one number: `model.layers.{i}.…`, `encoder.block.{i}.…`. What is not in a
stack comes before it (embeddings, stem) or after it (final norm, heads).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from plait.errors import RecipeError

_BEFORE = re.compile(
    r"(^|[._])(embed(?!_out)\w*|wte|wpe|shared|patch\w*|stem\w*|conv1|cls_token|mask_token|pre_?laye?rnorm)"
)
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers", "depth")


@dataclass(frozen=True)
class Place:
    """`stack` is the name before the number; `index` the layer, of `count`."""

    stack: str
    index: int
    count: int
    rest: str

    @property
    def t(self) -> float:
        """Depth for gradients, as mergekit counts it: 0 for the first layer, 1 for the last (1 for an only layer)."""
        return self.index / (self.count - 1) if self.count > 1 else 1.0


class Layers:
    """The stacks of one model."""

    def __init__(self, names: Iterable[str]) -> None:
        indices: dict[str, Counter[int]] = defaultdict(Counter)
        parts: dict[str, tuple[str, int, str]] = {}
        for name in names:
            # The outermost number is the layer: experts, heads and sub-blocks are numbered further in.
            match = re.match(r"^((?:[^.]+\.)*?)(\d+)\.(.+)$", name)
            if match:
                stack, index, rest = match[1], int(match[2]), match[3]
                indices[stack][index] += 1
                parts[name] = (stack, index, rest)
        self.counts = {stack: max(seen) + 1 for stack, seen in indices.items() if len(seen) == max(seen) + 1}
        # A lone `0.` is a Sequential or a ModuleList of one, unless nothing deeper is there.
        deep = {stack: count for stack, count in self.counts.items() if count > 1}
        self.counts = deep or self.counts
        self._places = {
            name: Place(stack, index, self.counts[stack], rest)
            for name, (stack, index, rest) in parts.items()
            if stack in self.counts
        }

    def place(self, name: str) -> Place | None:
        """The tensor's layer, or None when it is in no stack."""
        return self._places.get(name)

    def t(self, name: str) -> float:
        """mergekit's t: depth inside the stack, and 0 for everything outside."""
        place = self.place(name)
        return place.t if place else 0.0

    def depth(self, name: str) -> float:
        """0 for embeddings and the first layer, 1 for the last layer and what follows it."""
        place = self.place(name)
        if place:
            return place.t
        return 0.0 if is_before(name) else 1.0

    def main(self) -> str:
        """The one stack that slices cut. RecipeError when there is none, or more than one of them."""
        if not self.counts:
            raise RecipeError("slices: the model has no numbered layers in its tensor names; use models instead")
        if len(self.counts) > 1:
            stacks = ", ".join(f"{stack}* ({count})" for stack, count in sorted(self.counts.items()))
            raise RecipeError(f"slices: the model has several stacks of layers ({stacks}); slices need exactly one")
        return next(iter(self.counts))


def is_before(name: str) -> bool:
    """Whether a tensor outside the stacks belongs to the input side (embeddings, stem)."""
    return _BEFORE.search(name) is not None


def resize_config(config: Mapping[str, Any], old: int, picked: list[int]) -> dict[str, Any]:
    """config.json with the number of layers changed from `old` to len(picked); lists with an entry a layer follow."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if key in _LAYER_COUNTS and value == old:
            result[key] = len(picked)
        elif key == "layer_types" and isinstance(value, list) and len(value) == old:
            result[key] = [value[index] for index in picked]
        elif isinstance(value, Mapping) and key in ("text_config", "vision_config"):
            result[key] = resize_config(value, old, picked)
        else:
            result[key] = value
    return result
