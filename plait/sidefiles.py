"""config.json, tokenizer and the other small files that make weights a model: which are taken, and what is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plait.dtypes import torch_name
from plait.plan import Plan
from plait.tokens import is_tokenizer_file

_ENDINGS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_NOT_TAKEN = {
    "config.json",
    "plait.json",
    "adapter_config.json",
    "trainer_state.json",
    "labels.json",
    "all_results.json",
}
_MOST_BYTES = 256 << 20


def side_files(plan: Plan) -> dict[str, bytes]:
    """Relative name → content of every side file of the merged model, from the donor's folder; no code, no weights."""
    folder = plan.donor.source.folder
    result: dict[str, bytes] = {}
    if plan.config:
        result["config.json"] = config_json(plan)
    tokens = plan.vocabulary.folder or folder
    for place in dict.fromkeys((folder, tokens)):
        for path in sorted([*place.glob("*"), *place.glob("*/*")]):
            name = path.relative_to(place).as_posix()
            if _is_taken(path, name, place) and place == (tokens if is_tokenizer_file(name) else folder):
                result[name] = path.read_bytes()
    return {**result, **plan.vocabulary.files}


def config_json(plan: Plan) -> bytes:
    """The donor's config.json with the layers and the type of what was written; never a pointer to remote code."""
    config: dict[str, Any] = {key: value for key, value in plan.config.items() if key != "auto_map"}
    types = {tensor.dtype for tensor in plan.merged}
    if len(types) == 1:
        name = torch_name(types.pop())
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = name
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _is_taken(path: Path, name: str, folder: Path) -> bool:
    if not path.is_file() or not name.endswith(_ENDINGS) or name in _NOT_TAKEN or name.startswith("."):
        return False
    if name.endswith(".index.json") or path.name.startswith("checkpoint"):
        return False
    if not _stays_inside(path, folder):
        return False
    return path.stat().st_size <= _MOST_BYTES


def _stays_inside(path: Path, folder: Path) -> bool:
    """A link may lead elsewhere in the folder, or from a hub snapshot to its own cache, and nowhere else."""
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parent.parent / "blobs")
    return any(path.resolve().is_relative_to(root) for root in roots)
