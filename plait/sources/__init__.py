"""Opening checkpoints: a path or a hub id becomes a `Source` whose tensors can be read by span.

base.py            the contract: Source, LowRankSource, TensorSpec, LowRank
safetensors.py     .safetensors, single or sharded
torchfile.py       .bin, .pt, .pth state dicts, without unpickling freely
adapter.py         PEFT LoRA adapters
  adapter_config.py  what their configuration means, and which are refused
  adapter_keys.py    what their tensors are for
hub.py             owner/name@revision → local folder
folder.py          which file of a folder holds the weights
files.py           careful reading of files that strangers wrote
"""

from __future__ import annotations

import difflib
from pathlib import Path

from plait.errors import CheckpointError
from plait.sources.adapter import AdapterSource
from plait.sources.adapter_config import CONFIG_NAME
from plait.sources.base import LowRank, LowRankSource, Source, TensorSpec
from plait.sources.files import plain_name
from plait.sources.folder import INDEX_SUFFIX, TORCH_SUFFIXES, names_in, pick_weights
from plait.sources.hub import fetch, looks_like_hub_id
from plait.sources.safetensors import SafetensorsSource
from plait.sources.torchfile import TorchSource

__all__ = [
    "AdapterSource", "LowRank", "LowRankSource", "SafetensorsSource", "Source", "TensorSpec", "TorchSource",
    "find_local", "looks_like_hub_id", "open_source", "split_adapter_spec",
]  # fmt: skip


def open_source(spec: str, *, root: Path | None = None, cache_dir: Path | None = None) -> Source | LowRankSource:
    """Open a file, a folder or a hub id. Relative paths are looked up in `root` (the recipe's folder), then here."""
    path = find_local(spec, root)
    if path is not None:
        return _open_path(path, spec)
    if not looks_like_hub_id(spec):
        raise CheckpointError(f"{spec}: no such file or folder{_hint(spec, root)}. Hub models are written owner/name.")
    try:
        path = fetch(spec, cache_dir)
    except CheckpointError as error:
        hint = _hint(spec, root)
        raise CheckpointError(f"{error} It is not a local path either{hint}.") if hint else error from None
    return _open_path(path, spec)


def find_local(spec: str, root: Path | None = None) -> Path | None:
    """The existing path that `spec` names, or None."""
    if not spec or "\0" in spec:
        return None
    for place in _places(spec, root):
        try:
            if place.exists():
                return place
        except OSError:  # a component that is too long or not readable
            continue
    return None


def split_adapter_spec(spec: str, root: Path | None = None) -> tuple[str, str | None]:
    """mergekit's `base+adapter` as (base, adapter). A `+` that belongs to an existing path does not split."""
    if "+" not in spec or find_local(spec, root) is not None:
        return spec, None
    cuts = [at for at, mark in enumerate(spec) if mark == "+" and 0 < at < len(spec) - 1]
    pairs = [(spec[:at], spec[at + 1 :]) for at in reversed(cuts)]
    if not pairs:
        return spec, None

    def known(side: str) -> int:
        return 2 if find_local(side, root) is not None else int(looks_like_hub_id(side))

    return max(pairs, key=lambda pair: known(pair[0]) + known(pair[1]))


def _open_path(path: Path, label: str) -> Source | LowRankSource:
    if path.is_dir():
        names = names_in(path)
        entry = pick_weights(names, str(path))
        if entry is None and CONFIG_NAME in names:
            return AdapterSource(path, label)
        if entry is None:
            raise CheckpointError(
                f"{path}: holds no weights (no *.safetensors, no *.bin, no {CONFIG_NAME}). "
                "Give the folder in which the model was saved."
            )
        return SafetensorsSource(path, label) if ".safetensors" in entry else TorchSource(path, label)
    if path.name == CONFIG_NAME or (path.name.startswith("adapter_model.") and (path.parent / CONFIG_NAME).exists()):
        return AdapterSource(path.parent, label)
    stem = path.name.removesuffix(INDEX_SUFFIX)
    if stem.endswith(".safetensors"):
        return SafetensorsSource(path, label)
    if stem.endswith(TORCH_SUFFIXES):
        return TorchSource(path, label)
    raise CheckpointError(
        f"{path}: is not a kind of file that Plait reads ({', '.join(['.safetensors', *TORCH_SUFFIXES])}). "
        "Give a model folder or one of these files."
    )


def _places(spec: str, root: Path | None) -> list[Path]:
    try:
        path = Path(spec).expanduser()
    except RuntimeError:  # ~someone who does not exist
        return []
    return [path] if path.is_absolute() or root is None else [root / path, path]


def _hint(spec: str, root: Path | None) -> str:
    """The nearest existing name beside the missing one."""
    for place in _places(spec.rstrip("/"), root) if plain_name(spec.replace("/", "")) else []:
        if not place.parent.is_dir():
            continue
        siblings = names_in(place.parent)
        close = difflib.get_close_matches(place.name, siblings, n=1, cutoff=0.5)
        if close:
            return f" (did you mean '{place.parent / close[0]}'?)"
    return ""
