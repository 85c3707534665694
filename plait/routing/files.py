"""Routed models as folders: config.json, routed.safetensors with strict names, heads; nothing that is code."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.errors import CheckpointError, MachineError
from plait.models.configs import check_config, check_size
from plait.models.families import family_of
from plait.models.quiet import quiet
from plait.routing.layout import WEIGHTS, Layout, dumped
from plait.routing.model import ROUTERS, Tasks, make_routed, routed_layers
from plait.routing.packing import FLOATS
from plait.routing.skeleton import config_of, skeleton, transformers_class
from plait.shards import small_file
from plait.sources import open_source
from plait.sources.files import read_config
from plait.sources.safetensors import SafetensorsSource


def from_pretrained(
    path: str | os.PathLike[str], *, task: Tasks = None, dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> Any:  # fmt: skip
    """Load a routed model, strictly: a tensor too many or too few is an error.

    Gives the transformers model of its architecture, ready for evaluation, with `set_task`. `dtype` defaults to what
    is stored. Raises CheckpointError naming the file and tensor; RecipeError for a task that it does not have.
    """
    folder = local_folder(path)
    label = str(path)
    layout, config = Layout.of(read_config(folder), label)
    check_config(config, label)
    family_of(config, label)
    stored = read_weights(folder, label)
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(wanted, torch.dtype):
        raise CheckpointError(f"dtype {dtype}: is no type of torch; use float32, bfloat16 or float16")
    check_names(stored, layout, config, label)
    body = _load_base(stored, layout, config, label, wanted)
    try:
        model = make_routed(body, layout, {name: value for name, value in stored.items() if _is_own(name)})
    except CheckpointError as error:
        raise CheckpointError(f"{label}: {error}") from None
    if wanted is not None:
        model.to(wanted)
    model.to(device)
    model.routed_from, type(model).saved_by = folder, staticmethod(save)
    if task is not None:
        model.set_task(task)
    return model


def local_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of a model here, or of a hub id in the cache."""
    source = Path(path)
    if source.is_dir():
        return source
    found = open_source(str(path))
    try:
        return found.folder
    finally:
        found.close()


def read_weights(folder: Path, label: str) -> dict[str, Tensor]:
    """All tensors of a routed model's file."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{label}: lacks {WEIGHTS}; the folder is not whole: merge again")
    source = SafetensorsSource(path, str(path))
    try:
        return {s.name: source.read(s.name, 0, s.numel).reshape(s.shape).clone() for s in source.specs.values()}
    finally:
        source.close()


def check_names(stored: Mapping[str, Tensor], layout: Layout, config: Mapping[str, Any], label: str) -> None:
    """Refuse a file whose tensors are not exactly those of the layout. The base's own are checked when it is loaded."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, stores in layout.layers.items():
        for name, store in stores.items():
            for spec in store.specs(f"{layer}.experts.{name.replace('.', '/')}"):
                shapes[spec.name] = spec.shape
    for name, shape in shapes.items():
        if name not in stored:
            raise CheckpointError(f"{label}/{WEIGHTS}: lacks '{name}', which config.json describes; merge again")
        if tuple(stored[name].shape) != shape:
            raise CheckpointError(
                f"{label}/{WEIGHTS}: '{name}' is {list(stored[name].shape)}, but config.json describes {list(shape)}"
            )
    extra = [name for name in stored if ".experts." in name and name not in shapes]
    if extra:
        raise CheckpointError(f"{label}/{WEIGHTS}: holds '{extra[0]}', which config.json does not describe")
    body = skeleton(config, layout.architecture, label)
    check_size(body, sum(value.numel() for value in stored.values()), label)
    allowed = set(body.state_dict())
    base = {_plain(name, layout) for name in stored if not _is_own(name)}
    foreign = sorted(base - allowed)
    if foreign:
        raise CheckpointError(f"{label}/{WEIGHTS}: holds '{foreign[0]}', which {layout.architecture} does not have")


def _is_own(name: str) -> bool:
    return ".experts." in name or name.startswith(f"{ROUTERS}.")


def _plain(name: str, layout: Layout) -> str:
    """`layer.base.weight` → `layer.weight`, for routed layers."""
    for layer in layout.layers:
        if name.startswith(f"{layer}.base."):
            return f"{layer}.{name.removeprefix(f'{layer}.base.')}"
    return name


def _load_base(
    stored: Mapping[str, Tensor], layout: Layout, config: Mapping[str, Any], label: str, dtype: torch.dtype | None
) -> Any:
    cls = transformers_class(layout.architecture, label)
    base = {_plain(name, layout): value for name, value in stored.items() if not _is_own(name)}
    types = [value.dtype for value in base.values() if value.is_floating_point()]
    with quiet():
        try:
            body, info = cls.from_pretrained(
                None, config=config_of(config, label), state_dict=base, output_loading_info=True,
                dtype=dtype or (types[0] if types else torch.float32),
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise CheckpointError(f"{label}: transformers cannot build it: {str(error)[:200]}") from None
    unused = family_of(config, label).unused or ("\0",)
    missing = sorted(name for name in info["missing_keys"] if not name.endswith(unused))
    for kind, names in (("lacks", missing), ("holds the foreign", sorted(info["unexpected_keys"]))):
        if names:
            raise CheckpointError(f"{label}/{WEIGHTS}: {kind} '{names[0]}'; the file is not whole: merge again")
    return body.eval()


def _inside(name: str) -> str:
    layer, _, own = name.rpartition(".")
    return f"{layer}.base.{own}"


def save(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write a routed model in memory as a folder; the same model gives the same bytes."""
    out = Path(folder)
    layout: Layout = model.routing.layout
    tensors: dict[str, Tensor] = {}
    tied = {name for alias in getattr(model, "all_tied_weights_keys", None) or () for name in (alias, _inside(alias))}
    layers = routed_layers(model)
    inside = tuple(f"{name}.experts." for name in layers)
    layers = {name: layer for name, layer in layers.items() if name in layout.layers}
    stores: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        for own, parts in layer.experts.items():
            store: Any = parts.store
            held = parts.stored()  # type: ignore[operator]
            if store.precision in FLOATS:
                kept = next(value.dtype for key, value in held.items() if key not in ("scale", "bits"))
                store = dataclasses.replace(store, precision=str(kept).removeprefix("torch."))
            stores.setdefault(name, {})[own.replace("/", ".")] = store
            for key, value in held.items():
                exact = {"scale": torch.float32}.get(key, torch.float16 if key.endswith("_scales") else value.dtype)
                tensors[f"{name}.experts.{own}.{key}"] = value.to(exact)
    for name, value in model.state_dict().items():
        if not name.startswith(inside) and name not in tied:
            tensors[name] = value
    written = dataclasses.replace(layout, layers=stores)
    config = {**model.config.to_dict(), "dtype": str(model.dtype).removeprefix("torch.")}
    scratch = out.parent / f".{out.name}.writing-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        (scratch / WEIGHTS).write_bytes(small_file({name: tensors[name] for name in sorted(tensors)}))
        (scratch / "config.json").write_bytes(dumped(written.config(config)))
        heads = getattr(model, "routed_from", Path()) / "heads"
        if heads.is_dir():
            shutil.copytree(heads, scratch / "heads")
        out.mkdir(parents=True, exist_ok=True)
        for path in sorted(scratch.iterdir()):
            if path.is_dir():
                shutil.rmtree(out / path.name, ignore_errors=True)
            os.replace(path, out / path.name)
    except OSError as error:
        raise MachineError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
