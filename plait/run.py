"""The one way through: plan, survey, merge, write, report."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from plait.card import model_card
from plait.decide import TensorPlan
from plait.engine import Engine, Progress, finite
from plait.errors import MachineError, RecipeError
from plait.experts import Input
from plait.plan import Plan, make_plan
from plait.recipe import Recipe, load_recipe
from plait.sidefiles import side_files
from plait.sources.base import TensorSpec
from plait.units import parse_bytes, show_bytes
from plait.writer import FolderWriter, ShardFile, index_of, lay_out, shard

FORMAT = 1
"""Version of plait.json."""


@dataclass(frozen=True)
class Merged:
    """What a merge has made."""

    path: Path
    plan: Plan
    hashes: Mapping[str, str]
    """Weight file → SHA-256."""
    resumed: int
    """Tensors that an interrupted run had already finished."""


class Silent:
    """Shows nothing."""

    def stage(self, name: str, total: int, unit: str = "bytes") -> None:
        """A stage begins."""

    def advance(self, count: int) -> None:
        """So many more of them are done."""


def merge(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    out: str | os.PathLike[str],
    *,
    memory: int | str = "512MB",
    threads: int | None = None,
    device: str = "cpu",
    shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Merge as the recipe says and write the model to folder `out`, whole or not at all.

    `memory` bounds the buffers of the merge (inputs are read by span and not counted); `threads` defaults to the
    processors this process may use. Neither changes a byte of the result. An interrupted merge goes on where it was
    when called again. Raises RecipeError, CheckpointError, MachineError.
    """
    plan = make_plan(load_recipe(recipe))
    try:
        return run(
            plan, Path(out), memory=parse_bytes(memory, "memory"), threads=threads or usable_threads(), device=device,
            shard_size=parse_bytes(shard_size, "shard_size"), overwrite=overwrite, progress=progress or Silent(),
        )  # fmt: skip
    finally:
        plan.library.close()


def run(
    plan: Plan,
    out: Path,
    *,
    memory: int,
    threads: int,
    device: str,
    shard_size: int,
    overwrite: bool,
    progress: Progress,
) -> Merged:
    """Carry out a plan."""
    refuse_impossible(plan, out, memory)
    shards = lay_out([tensor.spec for tensor in plan.tensors], shard_size, {"format": "pt"})
    heads = {f"heads/{task}.safetensors": _head_file(task, items, plan) for task, items in sorted(plan.heads.items())}
    engine = Engine(threads=threads, memory=memory, device=device, progress=progress)
    with FolderWriter(out, _resume_key(plan, shards), shards, overwrite=overwrite) as writer:
        resumed = len(writer.done)
        todo = [tensor for tensor in plan.tensors if tensor.name not in writer.done]
        state = engine.survey(plan.method, plan.merged, plan.recipe.seed) if todo else None
        engine.merge(plan.method, todo, plan.recipe.seed, state, writer)
        hashes = writer.hashes()
        if len(shards) > 1:
            writer.add_file("model.safetensors.index.json", index_of(shards, plan.bytes_out))
        for name, (file, items) in heads.items():
            writer.add_file(name, _head_bytes(file, items))
        for name, content in side_files(plan).items():
            writer.add_file(name, content)
        record = provenance(plan, hashes)
        writer.add_file("plait.json", json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n")
        writer.add_file("README.md", model_card(plan, record).encode())
        writer.commit()
    return Merged(out, plan, hashes, resumed)


def refuse_impossible(plan: Plan, out: Path, memory: int) -> None:
    """Refuse an output that is an input, and a budget that the largest job does not fit."""
    target = out.resolve()
    for model in plan.opened():
        for place in (model.source.folder.resolve(),):
            if target == place or place.is_relative_to(target):
                raise RecipeError(f"{out}: is (or holds) the input {model.label}; write to another folder")
    need, name = plan.least_memory()
    if need > memory:
        raise MachineError(
            f"--memory {show_bytes(memory)} is too little: {plan.method.name} needs whole rows of '{name}', "
            f"so at least --memory {-(-need // 10**6)}MB"
        )


def usable_threads() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Tell the C library not to hand every freed buffer back: pieces are allocated and freed without end.

    Saves almost a quarter of the time of TIES (docs/LOG.md). It changes the whole process: for the command line only.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc
    if mallopt is not None:
        trim_threshold, mmap_threshold, never = -1, -3, 1 << 30
        mallopt(trim_threshold, never)
        mallopt(mmap_threshold, never)


def provenance(plan: Plan, hashes: Mapping[str, str]) -> dict[str, Any]:
    """plait.json: what was asked, what went in, what came out. The same for the same recipe and inputs, always."""
    return {
        "format": FORMAT,
        "plait": version("plait"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "method": plan.method.name,
        "paper": plan.method.paper,
        "recipe": plan.recipe.canonical(),
        "seed": plan.recipe.seed,
        "inputs": {
            model.label: {"fingerprint": model.source.fingerprint(), "headers": model.source.header_hashes()}
            for model in plan.opened()
        },
        "outputs": dict(hashes),
        "tensors": {
            "merged": len(plan.merged),
            "copied": {t.name: t.reason for t in plan.tensors if t.action == "copy"},
            "per_task": {task: [item.stored for item in items] for task, items in sorted(plan.heads.items())},
        },
        "notes": sorted(plan.notes),
    }


def _resume_key(plan: Plan, shards: list[ShardFile]) -> str:
    """Identifies a run: two runs may share unfinished work only when all of this is equal."""
    digest = hashlib.sha256()
    digest.update(json.dumps([version("plait"), plan.recipe.canonical()], sort_keys=True).encode())
    for item in shards:
        digest.update(item.name.encode() + item.header)
    for model in plan.opened():
        digest.update(f"{model.label}\0{model.source.stamp()}\0".encode())
    return digest.hexdigest()


def _head_file(task: str, items: list[Input], plan: Plan) -> tuple[ShardFile, list[Input]]:
    model = next(model for model in plan.models if model.name == task)
    metadata = {"format": "pt", "task": task}
    if model.labels is not None:
        metadata["id2label"] = json.dumps(model.labels, ensure_ascii=False)
    specs = [TensorSpec(item.stored, item.shape, item.dtype) for item in items]
    return shard(f"{task}.safetensors", specs, metadata), items


def _head_bytes(file: ShardFile, items: list[Input]) -> bytes:
    """A small safetensors file of one task's own tensors, as they are."""
    content = bytearray(file.size)
    content[: len(file.header)] = file.header
    for item in items:
        spec = TensorSpec(item.stored, item.shape, item.dtype)
        values = item.read(0, spec.numel)
        if values.is_floating_point():
            whole = TensorPlan(item.stored, item.shape, item.dtype, "copy", "head", (item,))
            finite(values.float(), item, whole, next(iter(whole.grid)))
        start = file.offsets[item.stored]
        content[start : start + spec.nbytes] = values.contiguous().view(torch.uint8).numpy().tobytes()
    return bytes(content)
