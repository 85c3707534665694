"""Task vectors side by side before anything is merged: norms, angles, agreement of signs. One streaming pass."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from plait.engine import Engine
from plait.errors import RecipeError
from plait.methods.block import Block
from plait.plan import Plan


@dataclass
class Sums:
    """Sums over entries; sums of sums are sums, so groups and the whole model come from the tensors."""

    gram: torch.Tensor
    """[K, K] inner products of the task vectors."""
    agree: torch.Tensor
    """[K, K] entries where both are non-zero and of one sign."""
    both: torch.Tensor
    """[K, K] entries where both are non-zero."""
    base: float
    """Squared norm of the base."""
    numel: int
    unanimous: float
    """Entries where all non-zero task vectors have one sign."""
    touched: float
    """Entries where at least one task vector is non-zero."""

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.gram + other.gram, self.agree + other.agree, self.both + other.both, self.base + other.base,
            self.numel + other.numel, self.unanimous + other.unanimous, self.touched + other.touched,
        )  # fmt: skip

    def report(self, tasks: list[str]) -> dict[str, Any]:
        """Norms, relative norms, cosines and sign agreement as plain numbers."""
        norms = self.gram.diagonal().clamp(min=0).sqrt()
        scale = torch.outer(norms, norms)
        cosine = torch.where(scale > 0, self.gram / torch.where(scale > 0, scale, 1.0), torch.zeros_like(scale))
        share = torch.where(self.both > 0, self.agree / torch.where(self.both > 0, self.both, 1.0), 0.0)
        return {
            "parameters": self.numel,
            "base_norm": self.base**0.5,
            "norm": dict(zip(tasks, norms.tolist(), strict=True)),
            "relative_norm": {
                t: float(n) / self.base**0.5 if self.base else 0.0 for t, n in zip(tasks, norms, strict=True)
            },
            "cosine": cosine.tolist(),
            "sign_agreement": share.tolist(),
            "unanimous": self.unanimous / self.touched if self.touched else 0.0,
            "changed": self.touched / self.numel if self.numel else 0.0,
        }


def inspect_plan(plan: Plan, engine: Engine) -> dict[str, Any]:
    """{tasks, overall, groups, tensors}: the statistics of a plan's experts against its base.

    Raises RecipeError when the plan has no base: without one there are no task vectors.
    """
    if plan.base is None:
        raise RecipeError("inspect compares task vectors, so it needs a base: add base_model, or --base")
    tensors = [
        tensor if tensor.base is not None else replace(tensor, base=plan.base.find(tensor.name))
        for tensor in plan.merged
    ]
    tensors = [tensor for tensor in tensors if tensor.base is not None]
    engine.progress.stage("inspect", sum(tensor.bytes_in for tensor in tensors))

    def job(tensor: Any) -> Sums:
        result = measure(engine.block(tensor, plan.recipe.seed))
        engine.progress.advance(tensor.bytes_in)
        return result

    found = dict(zip((tensor.name for tensor in tensors), engine.each(tensors, job), strict=True))
    if not found:
        raise RecipeError("inspect: no tensor is merged by this recipe, so there is nothing to compare")
    tasks = [item.model for item in tensors[0].inputs]
    return {
        "tasks": tasks,
        "overall": _sum(found.values()).report(tasks),
        "groups": {name: _sum(members).report(tasks) for name, members in _groups(found).items()},
        "tensors": {name: sums.report(tasks) for name, sums in found.items()},
    }


def measure(block: Block) -> Sums:
    """The sums of one tensor."""
    count = len(block.tasks)
    zero = torch.zeros((count, count), dtype=torch.float64)
    total = Sums(zero, zero, zero, 0.0, 0, 0.0, 0.0)
    for piece in block.grid:
        values = block.deltas(piece)
        wide = values.to(torch.float64)
        sign = torch.sign(values)
        nonzero = sign.abs()
        product, both = sign @ sign.T, nonzero @ nonzero.T
        size, summed = nonzero.sum(0), sign.sum(0).abs()
        touched = size > 0
        total += Sums(
            (wide @ wide.T).cpu(),
            ((product + both) / 2).to(torch.float64).cpu(),
            both.to(torch.float64).cpu(),
            float(block.base(piece).to(torch.float64).square().sum()),
            piece.numel,
            float(((summed == size) & touched).sum()),
            float(touched.sum()),
        )
    return total


def _groups(found: Mapping[str, Sums]) -> dict[str, list[Sums]]:
    """Tensors of one kind together: names without numbers and without the last part (weight, bias)."""
    groups: dict[str, list[Sums]] = {}
    for name, sums in found.items():
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", name).rsplit(".", 1)[0]
        groups.setdefault(kind, []).append(sums)
    return groups


def _sum(parts: Any) -> Sums:
    first, *rest = parts
    for part in rest:
        first = first + part
    return first
