"""Methods that fit no family: passthrough, nearswap, and the anchor schedule for segmentation and domain adaptation."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from plait.errors import RecipeError, nearest
from plait.lazy import torch
from plait.methods.block import Block, per_model
from plait.methods.contract import Fraction, PerModel, Range, merge_method
from plait.methods.stream import Stream
from plait.methods.transforms import fold


@merge_method("passthrough", paper="mergekit", base="unused", experts=(1, 1))
def passthrough(block: Block, *, scale: PerModel[float] = 1.0) -> Stream:
    """The one model as it is, times `scale`: for stacking layers with slices."""
    (factor,) = per_model(scale, 1)
    return block.models.map(lambda values: values[0] if factor == 1 else values[0] * factor)


@merge_method("nearswap", paper="mergekit", experts=(1, 1))
def nearswap(block: Block, *, t: Annotated[float, Range(0)]) -> Stream:
    """Move each entry to the other model where the two differ by less than `t`, and in proportion where by more.

    w = clamp(t/|θ0 − θ1|, 0, 1); w·θ1 + (1−w)·θ0.
    """

    def swap(models: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        share = (t / (base - models[0]).abs().clamp(min=1e-6)).clamp(0, 1)
        return share * models[0] + (1 - share) * base

    return block.models.map(swap, block.base)


@merge_method("anchor_schedule", paper="arXiv:2409.15813", base="unused", experts=(2, None))
def anchor_schedule(
    block: Block,
    *,
    anchor: str,
    schedule: Literal["linear", "cosine", "step"] = "linear",
    step_at: Fraction = 0.5,
) -> Stream:
    """Unify early layers, leave late ones to the anchor: (1 − a(l))·mean_k θ_k + a(l)·θ_anchor.

    a rises with depth from 0 (first layer and what precedes it) to 1 (last layer, heads, decoder). `anchor` is the name
    of one of the models, which are all in the mean. After "layer-wise model merging" for UDA in segmentation; the
    authors' exact schedule is not published, so linear, cosine, and a step at depth `step_at` are offered.
    """
    if anchor not in block.tasks:
        raise RecipeError(f"anchor_schedule: anchor: no model is named '{anchor}'{nearest(anchor, block.tasks)}")
    k, depth = block.tasks.index(anchor), block.depth
    share = {
        "linear": depth,
        "cosine": (1 - math.cos(math.pi * depth)) / 2,
        "step": 1.0 if depth >= step_at else 0.0,
    }[schedule]

    def merge(values: torch.Tensor) -> torch.Tensor:
        if share >= 1:
            return values[k]
        return fold(values) / len(values) * (1 - share) + values[k] * share

    return block.models.map(merge)
