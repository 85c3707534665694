"""The one way through: plan, survey, merge, write, report."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from plait import atomic
from plait.card import model_card
from plait.decide import TensorPlan
from plait.digests import sealed
from plait.engine import Engine
from plait.errors import CheckpointError, MachineError, RecipeError
from plait.headfiles import head_files
from plait.lazy import torch
from plait.nonfinite import count, sentences
from plait.plan import Plan, make_plan
from plait.recipe import Recipe, load_recipe
from plait.record import inputs_of, provenance
from plait.shards import ShardFile, index_of, lay_out
from plait.sidefiles import side_files
from plait.stages import Progress, Silent
from plait.state import FACTS, NUMBERS, State, check_fits, load_state
from plait.threads import usable_threads
from plait.units import parse_bytes, show_bytes
from plait.writer import FolderWriter


@dataclass(frozen=True)
class Merged:
    """What a merge has made."""

    path: Path
    plan: Plan
    hashes: Mapping[str, str]
    """Weight file → SHA-256."""
    resumed: int
    """Tensors that an interrupted run had already finished."""
    notes: tuple[str, ...] = ()
    """What the plan said that is worth knowing, and what only the merge could tell."""


def merge(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    out: str | os.PathLike[str],
    *,
    memory: int | str = "512MB",
    threads: int | None = None,
    device: str = "cpu",
    shard_size: int | str = "5GB",
    overwrite: bool = False,
    state: str | os.PathLike[str] | None = None,
    engine: str = "local",
    address: str | None = None,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Merge as the recipe says and write the model to folder `out`, whole or not at all.

    `memory` bounds the buffers of the merge (inputs are read by span and not counted); `threads` defaults to the
    processors this process may use. Neither changes a byte of the result. An interrupted merge goes on where it was
    when called again. A method that learns takes `state`, the folder of a fit; without one it is fitted first, from
    the recipe's `data`, and the state is left in `out`/state. With `engine="ray"` the jobs run on the Ray cluster at
    `address`, to the same bytes (docs/ray.md); `memory` is then each worker's. An input with NaN or an infinity is
    refused, unless `allow_nonfinite`: then the result is non-finite in exactly those places, and `notes` says in which
    tensors. Raises RecipeError, CheckpointError, MachineError.
    """
    plan = make_plan(load_recipe(recipe))
    try:
        return run(
            plan, Path(out), memory=parse_bytes(memory, "memory"), threads=threads or usable_threads(), device=device,
            shard_size=parse_bytes(shard_size, "shard_size"), overwrite=overwrite, state=state,
            kind=engine, address=address, allow_nonfinite=allow_nonfinite, progress=progress or Silent(),
        )  # fmt: skip
    finally:
        plan.library.close()


def fit(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    out: str | os.PathLike[str],
    *,
    memory: int | str = "512MB",
    threads: int | None = None,
    device: str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    objective: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    reuse: bool = False,
    progress: Progress | None = None,
) -> State:
    """Learn what the recipe's method needs from the recipe's `data`, and write it to folder `out` as a State.

    `objective`, a function (task, scores [n, classes]) → mean loss, takes the place of the method's own. With `resume`
    an interrupted fit goes on where it was, to the same bytes; with `reuse` a state in `out` that was learned from the
    same question is taken as it is. Raises RecipeError, CheckpointError, MachineError.
    """
    from plait.learn.fit import fit_plan

    plan = make_plan(load_recipe(recipe))
    engine = Engine(
        threads=threads or usable_threads(), memory=parse_bytes(memory, "memory"), device=device,
        progress=progress or Silent(),
    )  # fmt: skip
    try:
        return fit_plan(plan, Path(out), engine, resume=resume, overwrite=overwrite, objective=objective, reuse=reuse)
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
    state: str | os.PathLike[str] | None = None,
    kind: str = "local",
    address: str | None = None,
    allow_nonfinite: bool = False,
) -> Merged:
    """Carry out a plan, on an engine of this kind."""
    refuse_impossible(plan, out, memory)
    if allow_nonfinite and (plan.method.learned is not None or plan.method.dynamic is not None):
        raise RecipeError(
            f"--allow-nonfinite: {plan.method.name} learns or routes, and would carry such entries everywhere; get the "
            "checkpoint again, or merge by a method that does neither"
        )
    plan.library.refuse_changed()
    given: dict[str, Any] = {
        "threads": threads, "memory": memory, "device": device, "progress": progress,
        "allow_nonfinite": allow_nonfinite,
    }  # fmt: skip
    with _engine(plan, kind, address, **given) as engine:
        return _carry_out(plan, out, engine, shard_size=shard_size, overwrite=overwrite, state=state)


@contextmanager
def _engine(plan: Plan, kind: str, address: str | None, **given: Any) -> Iterator[Engine]:
    if kind == "local" and address is None:
        yield Engine(**given)
        return
    if kind != "ray":
        what = f"--engine {kind}: must be local or ray" if kind != "local" else "--address: goes with --engine ray"
        raise RecipeError(what)
    if given.pop("allow_nonfinite"):
        raise RecipeError("--allow-nonfinite: does not go with --engine ray; remove one of them")
    from plait.engine_ray import RayEngine

    with closing(RayEngine(plan, address, **given)) as engine:
        yield engine


def _carry_out(
    plan: Plan, out: Path, engine: Engine, *, shard_size: int, overwrite: bool, state: str | os.PathLike[str] | None
) -> Merged:
    if out.exists() and not overwrite:  # said before a fit, not after it
        raise RecipeError(f"{out}: exists already; choose another folder, or add --overwrite to replace it")
    learned = learned_state(plan, out, engine, state)
    with _held(plan, out, learned):
        if plan.method.dynamic is not None:
            return _run_routed(plan, out, engine, learned, overwrite)
        return _run_static(plan, out, engine, learned, overwrite, shard_size)


def _run_static(
    plan: Plan, out: Path, engine: Engine, learned: State | None, overwrite: bool, shard_size: int
) -> Merged:
    """A model of one set of weights."""
    shards = lay_out([tensor.spec for tensor in plan.tensors], shard_size, {"format": "pt"})
    key = _resume_key(plan, shards, learned)
    follow = engine.here and engine.threads > 1
    with FolderWriter(out, key, shards, overwrite=overwrite, follow=follow) as writer:
        resumed = len(writer.done)
        todo = [tensor for tensor in plan.tensors if tensor.name not in writer.done]
        explain = plan.method.explain
        surveyed = engine.survey(plan.method, plan.merged, plan.recipe.seed) if todo or explain else None
        told = explain(surveyed) if explain is not None and surveyed is not None else {}
        engine.merge(plan.method, todo, plan.recipe.seed, surveyed, writer, learned)
        passed = nonfinite_counts(plan, engine)
        inputs = inputs_of(plan)  # while the last hashes are made
        hashes = writer.hashes()
        if len(shards) > 1:
            writer.add_file("model.safetensors.index.json", index_of(shards, plan.bytes_out))
        for name, content in {**head_files(plan, learned, engine.allow_nonfinite), **side_files(plan)}.items():
            writer.add_file(name, content)
        record = provenance(plan, inputs, hashes, learned, told)
        _finish(plan, writer, learned, {**record, **({"nonfinite": passed} if passed else {})})
    notes = (*plan.notes, *told.get("notes", ()), *sentences(passed), *_left(writer))
    return Merged(out, plan, hashes, resumed, notes)


def nonfinite_counts(plan: Plan, engine: Engine) -> dict[str, int]:
    """Merged tensor → entries that were passed through; counted anew, so that a resumed run says the same."""
    if not engine.allow_nonfinite:
        return {}

    def job(tensor: TensorPlan) -> int:
        return count(engine.block(tensor, plan.recipe.seed))

    found = zip(plan.merged, engine.each(plan.merged, job), strict=True)
    return {tensor.name: number for tensor, number in found if number}


def _run_routed(plan: Plan, out: Path, engine: Engine, learned: State | None, overwrite: bool) -> Merged:
    """The same for a model whose experts stay apart."""
    from plait.routing.build import prepare
    from plait.routing.layout import dumped

    build = prepare(plan, engine, learned)
    plan.notes += build.notes
    shards = build.shards()
    with FolderWriter(out, _resume_key(plan, shards, learned), shards, overwrite=overwrite) as writer:
        resumed = len(writer.done)
        build.write(writer)
        hashes = writer.hashes()
        files = {**head_files(plan, None), **side_files(plan)}
        files["config.json"] = dumped(build.layout.config(json.loads(files["config.json"])))
        for name, content in files.items():
            writer.add_file(name, content)
        _finish(plan, writer, learned, provenance(plan, inputs_of(plan), hashes, learned))
    return Merged(out, plan, hashes, resumed, (*plan.notes, *_left(writer)))


def _finish(plan: Plan, writer: FolderWriter, learned: State | None, record: dict[str, Any]) -> None:
    """What says how the model was made; then it gets its name."""
    if learned is not None:
        for name in (FACTS, NUMBERS):
            writer.add_file(f"state/{name}", (learned.folder / name).read_bytes())
    writer.add_file("README.md", model_card(plan, record).encode())
    files = {name: digest for name, digest in writer.added.items() if name != "README.md"}  # it is there to be edited
    writer.add_file("plait.json", sealed({**record, "files": files, "marks": writer.marks}))
    try:
        plan.library.refuse_changed()
    except CheckpointError:
        writer.discard()
        raise
    writer.commit()


def _left(writer: FolderWriter) -> list[str]:
    found = ", ".join(str(path) for path in writer.leftovers())
    return (
        [f"unfinished work of another merge to this folder is left: {found}; plait clean removes it"] if found else []
    )


@contextmanager
def _held(plan: Plan, out: Path, learned: State | None) -> Iterator[None]:
    """Hold the state that this merge has fitted while it is applied; once the output is whole, clear it away."""
    if learned is None:
        yield
        return
    place = _fitted(plan, out)
    guard = atomic.lock_folder(place) if learned.folder == place else -1
    try:
        if guard is None:
            raise MachineError(f"{out}: another merge is writing this folder now; wait for it to end")
        yield
        for work in (place, *atomic.beside(place, "fitting")):
            shutil.rmtree(work, ignore_errors=True)
    finally:
        learned.close()
        if guard is not None and guard >= 0:
            os.close(guard)


def learned_state(plan: Plan, out: Path, engine: Engine, state: str | os.PathLike[str] | None) -> State | None:
    """The state to merge with: the one given, else one that is fitted now; None for methods that learn nothing."""
    if plan.method.learned is None:
        if state is not None:
            raise RecipeError(f"--state: {plan.method.name} learns nothing, so it takes no state")
        return None
    from plait.learn.fit import fingerprints, fit_plan, vector_settings

    if state is not None:
        found = load_state(state)
        names = [model.name for model in plan.models]
        check_fits(found, plan.method.name, names, fingerprints(plan), vector_settings(plan))
        return found
    place = _fitted(plan, out)
    if (place / FACTS).is_file():  # an interrupted merge had already fitted
        return load_state(place)
    return fit_plan(plan, place, engine, resume=True, overwrite=True)


def _fitted(plan: Plan, out: Path) -> Path:
    """Where a merge that fits first keeps the state until the output is whole."""
    digest = hashlib.sha256(json.dumps(plan.recipe.canonical(), sort_keys=True).encode())
    for model in plan.opened():
        digest.update(f"{model.label}\0{model.source.stamp()}\0".encode())
    return out.parent / f".{out.name}.state-{digest.hexdigest()[:16]}"


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
            f"--memory {show_bytes(memory)} is too little: {plan.method.name} needs whole rows, or all, of '{name}', "
            f"so at least --memory {-(-need // 10**6)}MB"
        )


def _resume_key(plan: Plan, shards: list[ShardFile], learned: State | None = None) -> str:
    """Identifies a run: two runs may share unfinished work only when all of this is equal."""
    digest = hashlib.sha256()
    if learned is not None:
        digest.update((learned.folder / NUMBERS).read_bytes())
    digest.update(json.dumps([version("plait"), plan.recipe.canonical()], sort_keys=True).encode())
    for item in shards:
        digest.update(item.name.encode() + item.header)
    for model in plan.opened():
        digest.update(f"{model.label}\0{model.source.stamp()}\0".encode())
    return digest.hexdigest()
