"""The files in `heads/` of a merged model: every task's own tensors as they are, and what was learned for its head."""

from __future__ import annotations

import json

from plait.decide import TensorPlan
from plait.experts import Input
from plait.lazy import torch
from plait.nonfinite import finite
from plait.plan import Plan
from plait.shards import small_file
from plait.sources.base import TensorSpec
from plait.state import State


def head_files(plan: Plan, learned: State | None, allow_nonfinite: bool = False) -> dict[str, bytes]:
    """Name → content of a small safetensors file, with the task's labels in its metadata.

    Raises CheckpointError for an entry that is no finite number, unless those are allowed.
    """
    extra = learned.heads() if learned is not None else {}
    labels = {model.name: model.labels for model in plan.models}
    found = {}
    for task in sorted({*plan.heads, *extra}):
        tensors = {item.stored: _values(item, allow_nonfinite) for item in plan.heads.get(task, [])} | extra.get(
            task, {}
        )
        names = labels[task] if task in plan.heads or learned is None else learned.labels(task)
        spoken = {} if names is None else {"id2label": json.dumps(names, ensure_ascii=False)}
        found[f"heads/{task}.safetensors"] = small_file(tensors, {"task": task, **spoken})
    return found


def _values(item: Input, allow_nonfinite: bool) -> torch.Tensor:
    spec = TensorSpec(item.stored, item.shape, item.dtype)
    values = item.read(0, spec.numel)
    if values.is_floating_point() and not allow_nonfinite:
        whole = TensorPlan(item.stored, item.shape, item.dtype, "copy", "head", (item,))
        finite(values.float(), item, whole, next(iter(whole.grid)))
    return values.reshape(item.shape)
