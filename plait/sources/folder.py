"""Which file of a folder holds the model's weights. The same rule chooses what to download from the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from plait.errors import CheckpointError
from plait.sources.files import HEAD_FILE

INDEX_SUFFIX = ".index.json"
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_NOT_A_MODEL = re.compile(r"(adapter_model|training_args|optimizer|scheduler|scaler|random_states|rng_state).*")


def names_in(folder: Path) -> list[str]:
    """What a folder holds, sorted."""
    try:
        return sorted(child.name for child in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed ({error.strerror}). Check its permissions.") from None


def pick_weights(names: Iterable[str], where: str) -> str | None:
    """The file to open first: a whole file, else a shard index, else the only candidate. safetensors before pickles.

    None when there are no weights at all; an error when several files could be meant.
    """
    names = sorted(name for name in names if name != HEAD_FILE and not _NOT_A_MODEL.match(name))
    for whole, suffixes in (("model.safetensors", (".safetensors",)), ("pytorch_model.bin", TORCH_SUFFIXES)):
        for name in (whole, whole + INDEX_SUFFIX):
            if name in names:
                return name
        indexes = [name for name in names if name.endswith(tuple(suffix + INDEX_SUFFIX for suffix in suffixes))]
        candidates = indexes or [name for name in names if name.endswith(suffixes)]
        if len(candidates) > 1:
            raise CheckpointError(
                f"{where}: holds {len(candidates)} weight files and no '{whole}' or '{whole}{INDEX_SUFFIX}' "
                f"({', '.join(candidates[:5])}{', …' if len(candidates) > 5 else ''}). Name the one file that is "
                "meant, or download the index that belongs to these shards."
            )
        if candidates:
            return candidates[0]
    return None


def belongs_to(entry: str, name: str) -> bool:
    """True when `name` is `entry` itself, or may be a shard of the index `entry`."""
    if not entry.endswith(INDEX_SUFFIX):
        return name == entry
    stem, suffix = entry.removesuffix(INDEX_SUFFIX).rsplit(".", 1)
    return name == entry or bool(re.fullmatch(rf"{re.escape(stem)}-\d+-of-\d+\.{re.escape(suffix)}", name))
