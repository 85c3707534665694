"""What `plait inspect` found, checked, and put in order of depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pydantic
from pydantic import BaseModel

from plait.errors import CheckpointError
from plait.layers import Layers, is_before


class Part(BaseModel):
    """The statistics of a tensor, or of all."""

    parameters: int
    base_norm: float
    norm: dict[str, float]
    cosine: list[list[float]]
    sign_agreement: list[list[float]]
    unanimous: float
    changed: float

    @property
    def touched(self) -> float:
        """How many entries any expert changed."""
        return self.changed * self.parameters


class Inspected(BaseModel):
    """The experts, all of them together, and every tensor."""

    tasks: list[str]
    overall: Part
    tensors: dict[str, Part]

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Inspected:
        size = len(self.tasks)
        for part in (self.overall, *self.tensors.values()):
            squares = (part.cosine, part.sign_agreement)
            if any(len(square) != size or any(len(row) != size for row in square) for square in squares):
                raise ValueError(f"cosine and sign_agreement must be {size} by {size}, as there are {size} tasks")
            if set(part.norm) != set(self.tasks):
                raise ValueError("norm must have every task, and nothing else")
        return self


def read_inspection(inspection: Mapping[str, Any] | None) -> Inspected | None:
    """The checked statistics; None when there are none. Raises CheckpointError when they are something else."""
    if not inspection:
        return None
    try:
        found = Inspected.model_validate(inspection)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("inspection", *first["loc"])))
        raise CheckpointError(
            f"{where}: {first['msg']}; it must be what plait inspect writes, so run plait compare again"
        ) from None
    return found if found.tasks else None


@dataclass(frozen=True)
class Level:
    """One layer, or what stands before or after all layers."""

    stack: str
    label: str
    parts: list[Part]
    only: bool = True
    """There is but one stack, so that it needs no name."""

    @property
    def where(self) -> str:
        """In words."""
        if not self.label.isdigit():
            return f"{self.label} the layers"
        return f"layer {self.label}" if self.only else f"layer {self.stack}{self.label}"

    @property
    def unanimous(self) -> float | None:
        """Share of the changed entries that all experts moved one way."""
        return _weighted([(part.unanimous, part.touched) for part in self.parts])

    def agreement(self, tasks: Sequence[str], a: int, b: int) -> float | None:
        """Sign agreement of two experts over the tensors that both changed, each as heavy as what was changed in it."""
        both = [part for part in self.parts if part.norm[tasks[a]] > 0 and part.norm[tasks[b]] > 0]
        return _weighted([(part.sign_agreement[a][b], part.touched) for part in both])

    def norm(self, task: str) -> float:
        """Of the task vector in this level."""
        return math.hypot(*(part.norm[task] for part in self.parts))

    @property
    def base_norm(self) -> float:
        """Of the base in this level."""
        return math.hypot(*(part.base_norm for part in self.parts))


def _weighted(values: list[tuple[float, float]]) -> float | None:
    total = sum(weight for _, weight in values)
    return sum(value * weight for value, weight in values) / total if total > 0 else None


def by_depth(tensors: Mapping[str, Part]) -> list[Level]:
    """Before the stacks, layer by layer, after them. Encoders stand before decoders."""
    layers = Layers(tensors)
    found: dict[tuple[int, str, int], list[Part]] = {}
    for name, part in tensors.items():
        found.setdefault(side_of(layers, name), []).append(part)
    labels = {0: "before", 3: "after"}
    only = len({stack for _, stack, _ in found} - {""}) < 2
    return [
        Level(stack, labels.get(side, str(index)), found[side, stack, index], only)
        for side, stack, index in sorted(found)
    ]


def side_of(layers: Layers, name: str) -> tuple[int, str, int]:
    """What sorts tensors by depth: before, in an encoder, in a decoder or after; the stack; the layer."""
    place = layers.place(name)
    if place:
        return 2 if "decoder" in place.stack else 1, place.stack, place.index
    return (0, "", 0) if is_before(name) else (3, "", 0)


def named_levels(labels: Sequence[str], most: int) -> list[int]:
    """Which levels a plot names: at most so many layers, and none so close to an end that the words would touch."""
    room = max(1, math.ceil(len(labels) / most))
    ends = [i for i, label in enumerate(labels) if not label.isdigit()]
    clear = 1 + (room > 1)
    return [
        i for i, label in enumerate(labels)
        if i in ends or (int(label) % room == 0 and all(abs(i - end) >= clear for end in ends))
    ]  # fmt: skip
