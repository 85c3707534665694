"""Methods on tensors and state dicts that are already in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from plait.errors import RecipeError
from plait.lazy import torch
from plait.methods.block import Block
from plait.methods.contract import MergeMethod


class InMemory:
    """The whole model as blocks over tensors in memory: what a survey is given."""

    def __init__(self, blocks: Mapping[str, Block], params: Mapping[str, Any]) -> None:
        self.blocks = dict(sorted(blocks.items()))
        self.params = dict.fromkeys(self.blocks, params)

    @property
    def numel(self) -> int:
        """Entries of all tensors."""
        return sum(block.grid.numel for block in self.blocks.values())

    @property
    def memory(self) -> int:
        """No bound but the machine's: the model is in memory already."""
        return 1 << 62

    def each(self, fn: Callable[[Block], Any]) -> dict[str, Any]:
        """fn of every block, by name, in sorted order."""
        return {name: fn(block) for name, block in self.blocks.items()}

    def total(self, fn: Callable[[Block], torch.Tensor]) -> torch.Tensor:
        """Sum of fn over the blocks that have entries."""
        parts = [fn(block) for block in self.blocks.values() if block.grid.numel]
        return torch.stack(parts).sum(0) if parts else torch.zeros(())


def merge_in_memory(
    method: MergeMethod,
    models: Sequence[torch.Tensor] | Sequence[Mapping[str, torch.Tensor]],
    base: torch.Tensor | Mapping[str, torch.Tensor] | None,
    *,
    tasks: Sequence[str] | None,
    seed: int,
    params: Mapping[str, Any],
) -> Any:
    """A tensor from tensors, a state dict from state dicts. Tensors that are not floating are taken from the base.

    Raises ValueError when the numbers or names of models do not fit the method, or tensors differ in shape.
    """
    if method.learned is not None:
        raise RecipeError(f"{method.name} learns before it can merge: use plait.merge or plait.fit with a recipe")
    least, most = method.experts
    if len(models) < least or (most is not None and len(models) > most):
        wanted = f"{least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{method.name} merges {wanted} models beside the base, got {len(models)}")
    if method.base == "required" and base is None:
        raise ValueError(f"{method.name} works on task vectors: give base=…")
    models, names, params = canonical_order(method, models, tasks, params)

    def block(name: str, tensors: Sequence[torch.Tensor], origin: torch.Tensor | None) -> Block:
        scope = method.scope_for(params, name, tuple(tensors[0].shape))
        return Block.of(tensors, origin, name=name, tasks=names, scope=scope, seed=seed)

    if isinstance(models[0], torch.Tensor):
        assert base is None or isinstance(base, torch.Tensor)
        blocks = {"tensor": block("tensor", list(models), base)}  # type: ignore[arg-type]
        return _run(method, blocks, params)["tensor"]
    state_dicts: Sequence[Mapping[str, torch.Tensor]] = models  # type: ignore[assignment]
    layout: Mapping[str, torch.Tensor] = base if isinstance(base, Mapping) else state_dicts[0]
    for name in layout:
        for task, state in zip(names, state_dicts, strict=True):
            if name not in state:
                raise ValueError(f"{task} has no tensor '{name}'")
    floats = [name for name, tensor in layout.items() if tensor.is_floating_point()]
    blocks = {
        name: block(name, [state[name] for state in state_dicts], base[name] if isinstance(base, Mapping) else None)
        for name in floats
    }
    merged = _run(method, blocks, params)
    return {name: merged.get(name, tensor) for name, tensor in layout.items()}


def canonical_order(
    method: MergeMethod, models: Sequence[Any], tasks: Sequence[str] | None, params: Mapping[str, Any]
) -> tuple[list[Any], tuple[str, ...], dict[str, Any]]:
    """Models, names and per-model values sorted by name, as the streaming run has them: sums then round alike."""
    names = tuple(tasks) if tasks is not None else tuple(f"expert{k:03d}" for k in range(len(models)))
    if len(names) != len(models) or len(set(names)) != len(names):
        raise ValueError(f"tasks must be {len(models)} different names, got {list(names)}")
    order = sorted(range(len(names)), key=names.__getitem__)
    moved = dict(params)
    for parameter in method.parameters.values():
        value = moved.get(parameter.keyword)
        if parameter.per_model and isinstance(value, list):
            moved[parameter.keyword] = [value[i] for i in order] if len(value) == len(order) else value
    return [models[i] for i in order], tuple(names[i] for i in order), moved


def _run(method: MergeMethod, blocks: Mapping[str, Block], params: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    state = method.survey(InMemory(blocks, params)) if method.survey is not None else None
    result = {}
    for name, block in blocks.items():
        block.state = state
        result[name] = method.fn(block, **params).gather().reshape(block.shape)
    return result
