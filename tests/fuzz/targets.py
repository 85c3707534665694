"""What reads what strangers wrote, as functions of bytes. Each may return or raise a `PlaitError`; all else broke.

A target is slow when a case takes longer than `SLOW` seconds; the runner bounds memory besides.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import plait.methods  # noqa: F401  (registers the methods)
from plait.errors import PlaitError, RecipeError
from plait.evaluate.results import load
from plait.layers import Layers
from plait.methods.compose import method_of
from plait.names import align, tie_candidates
from plait.plan import fit_options
from plait.recipe import load_recipe
from plait.routing.layout import Layout, is_switched
from plait.settings import Resolver
from plait.shards import lay_out, small_file
from plait.show_state import state_data
from plait.sources import files
from plait.sources.adapter_config import AdapterConfig
from plait.sources.adapter_keys import check_factors, sort_keys
from plait.sources.safetensors import SafetensorsSource
from plait.state import FACTS, NUMBERS, check_fits, load_state
from plait.suites.definition import read_suite
from plait.writer import JOURNAL, FolderWriter

SLOW = 2.0
_MEMORY = Path("/dev/shm")
_PLACE = Path(tempfile.mkdtemp(prefix="plait-fuzz-", dir=_MEMORY if _MEMORY.is_dir() else None))
"""One file of one name, written for every case; in memory where the machine has a place for that."""


def _written(name: str, data: bytes) -> Path:
    path = _PLACE / name
    path.write_bytes(data)
    return path


def _json(data: bytes) -> Any:
    """What a program would hand over: not a target of its own, so what is no JSON is no case."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def recipe_file(data: bytes) -> None:
    """A recipe as YAML: parsed, its method found, its settings checked, its canonical form made."""
    _use(load_recipe(_written("recipe.yaml", data)))


def recipe_mapping(data: bytes) -> None:
    """A recipe that a program hands over."""
    value = _json(data)
    if isinstance(value, dict):
        _use(load_recipe(value))


def _use(recipe: Any) -> None:
    json.dumps(recipe.canonical(), sort_keys=True)
    method, recipe = method_of(recipe)
    fit_options(recipe, method)
    resolver = Resolver(recipe, method, recipe.names())
    resolver.check_names()
    resolver.check_filters(["model.layers.0.mlp.weight"])
    models = sorted(set(recipe.names().values()))
    piece = 0 if recipe.slices else None
    resolver.keywords("model.layers.0.mlp.weight", 0.5, models, {}, piece)


def settings(data: bytes) -> None:
    """Values of parameters for tensors: scalars, gradients, filters, overrides."""
    given = _json(data)
    if not isinstance(given, dict) or not isinstance(given.get("recipe"), dict):
        return
    recipe = load_recipe({"merge_method": "ties", "models": [{"model": "a"}, {"model": "b"}], **given["recipe"]})
    method, recipe = method_of(recipe)
    resolver = Resolver(recipe, method, recipe.names())
    resolver.check_names()
    for tensor in ("a.0.weight", "lm_head.weight"):
        for t in (0.0, 0.3, 1.0):
            resolver.keywords(tensor, t, sorted(recipe.names().values()), {}, None)


def header(data: bytes) -> None:
    """A safetensors file: opened, every tensor's ends read, printed."""
    source = SafetensorsSource(_written("model.safetensors", data), "model")
    try:
        for name, spec in source.specs.items():
            source.read(name, 0, min(spec.numel, 4))
            source.read(name, max(0, spec.numel - 4), spec.numel)
        source.fingerprint()
    finally:
        source.close()


def index(data: bytes) -> None:
    """A shard index; what it names stays in the folder."""
    shards, _ = files.read_index(_written("model.safetensors.index.json", data))
    for file in shards:
        assert (_PLACE / file).parent == _PLACE, f"{file!r} leaves its folder"


_ADAPTER = {"q.lora_A.weight": [2, 3], "q.lora_B.weight": [5, 2], "layers.1.k.lora_A.weight": [2, 3],
            "layers.1.k.lora_B.weight": [5, 2]}  # fmt: skip
_SPECS = {
    f"base_model.model.{n}": files.TensorSpec(f"base_model.model.{n}", tuple(s), "F32") for n, s in _ADAPTER.items()
}


def adapter(data: bytes) -> None:
    """An adapter's configuration, applied to fixed tensors."""
    path = _written("adapter_config.json", data)
    config = AdapterConfig(files.read_object(path, "the adapter configuration")[0], path)
    _, factors = sort_keys(_SPECS, config, path)
    for name, pair in factors.items():
        rank = check_factors(_SPECS[pair.a], _SPECS[pair.b], pair.kind, path)
        config.scale(name.removesuffix(".weight"), rank)
        config.saves_whole(name)


def names(data: bytes) -> None:
    """Two lists of tensor names, aligned."""
    given = _json(data)
    if isinstance(given, list) and len(given) == 2 and all(isinstance(side, list) for side in given):
        reference, stored = ([item for item in side if _usable(item)] for side in given)
        Layers(reference)
        for name in reference:
            tie_candidates(name, stored)
        found = align(reference, stored, "expert", "base")
        assert set(found.names.values()) <= set(stored)
        assert set(found.names) <= set(reference)


def _usable(name: object) -> bool:
    """Names that a header may have."""
    try:
        files.check_name(name if isinstance(name, str) else "", Path("x"))
    except PlaitError:
        return False
    return True


_SHARDS = lay_out([files.TensorSpec(n, (4,), "F32") for n in ("a", "b", "c")], 100, {})


def journal(data: bytes) -> None:
    """The journal of an interrupted merge: whatever it holds, only tensors of the plan count as done."""
    writer = FolderWriter(_PLACE / "out", "0" * 16, _SHARDS, overwrite=False)
    writer.partial.mkdir(exist_ok=True)
    (writer.partial / JOURNAL).write_bytes(data)
    writer._read_journal()
    assert writer.done <= {"a", "b", "c"}


_NUMBERS = {
    "coefficients/all": torch.zeros(2),
    "mask/w": torch.zeros(3, dtype=torch.int8),
    "mask_scale/w": torch.ones(()),
}


def state(data: bytes) -> None:
    """What a fit has learned, from another's hands: read, compared with a plan, shown."""
    folder = _PLACE / "state"
    folder.mkdir(exist_ok=True)
    if not (folder / NUMBERS).exists():
        (folder / NUMBERS).write_bytes(small_file(_NUMBERS))
    (folder / FACTS).write_bytes(data)
    found = load_state(folder)
    try:
        state_data(found)
        found.coefficients("w")
        found.labels("a")
        check_fits(found, "adamerging", ["a", "b"], {"a": "0"}, {})
    finally:
        found.close()


def layout(data: bytes) -> None:
    """The config.json of a routed model."""
    config = files.read_object(_written("config.json", data), "the model configuration")[0]
    is_switched(config)
    found, _ = Layout.of(config, "model")
    for layer, stores in found.layers.items():
        for name, store in stores.items():
            store.specs(f"{layer}.{name}")


def suite(data: bytes) -> None:
    """A suite's YAML: every path it names is text, every task's name a file name."""
    found = read_suite(_written("suite.yaml", data))
    for task in found.tasks:
        assert files.plain_name(task), f"{task!r} is no file name"
    with contextlib.suppress(RecipeError):
        found.inputs()


def results(data: bytes) -> None:
    """A results file."""
    load(_written("results.json", data))


Target = Callable[[bytes], None]
TARGETS: dict[str, Target] = {
    f.__name__: f
    for f in (
        recipe_file, recipe_mapping, settings, header, index, adapter, names, journal, state, layout, suite, results,
    )
}  # fmt: skip
MODULES = [
    "yamlfile", "recipe", "settings", "names", "layers", "state", "sources/files", "sources/safetensors",
    "sources/adapter_config", "sources/adapter_keys", "routing/layout", "routing/stores", "suites/definition",
    "evaluate/results", "methods/compose", "writer",
]  # fmt: skip
"""What the targets are about: coverage is told of these."""


_place: list[object] = [None]


def last_place() -> object:
    """Where in the code the last case was refused or broke: the line of every frame; None where it was fine."""
    return _place[0]


def run(target: str, data: bytes) -> str | None:
    """One case: None for what is fine or refused, else what broke."""
    _place[0] = None
    try:
        TARGETS[target](data)
    except PlaitError as error:
        _place[0] = _lines(error)
        text = str(error)
        if not text.strip() or any(ord(mark) < 32 and mark != "\n" for mark in text):
            return f"a sentence that is empty or holds control characters: {text[:120]!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        _place[0] = (type(error).__name__, *_lines(error)[-3:])
        return f"{type(error).__name__}: {str(error)[:120]}"
    return None


def _lines(error: BaseException) -> tuple[object, ...]:
    found, trace = [], error.__traceback__
    while trace is not None:
        found.append((trace.tb_frame.f_code.co_name, trace.tb_lineno))
        trace = trace.tb_next
    return tuple(found[:40])


def seeds(target: str) -> list[bytes]:
    """Cases that are fine, to begin with: those in seeds.json, and files made here where they are binary."""
    stored = json.loads(Path(__file__).with_name("seeds.json").read_text(encoding="utf-8"))
    found = [item.encode() if isinstance(item, str) else json.dumps(item).encode() for item in stored.get(target, [])]
    if target == "header":
        found += [small_file({"a": torch.zeros(2, 3), "b.c": torch.ones(4, dtype=torch.int64)}), small_file({})]
    return found


def clear() -> None:
    """Remove what the targets wrote."""
    import shutil

    shutil.rmtree(_PLACE, ignore_errors=True)
    os.makedirs(_PLACE, exist_ok=True)
