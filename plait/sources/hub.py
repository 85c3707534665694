"""`owner/name@revision` on the Hugging Face hub → a local folder, downloading weights and side files and never code."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from plait.errors import CheckpointError
from plait.sources.adapter_config import CONFIG_NAME
from plait.sources.files import HEAD_FILE
from plait.sources.folder import belongs_to, pick_weights

_PART = r"[A-Za-z0-9_][\w.-]{0,95}"
_ID = re.compile(rf"(?P<name>{_PART}/{_PART})(?:@(?P<revision>[\w./-]{{1,200}}))?", re.ASCII)
_SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def looks_like_hub_id(text: str) -> bool:
    """True for `owner/name`, with or without `@revision`."""
    return bool(_ID.fullmatch(text)) and ".." not in text and "--" not in text


def fetch(spec: str, cache_dir: Path | None = None) -> Path:
    """The local folder of a hub model, downloaded unless it is in the cache. HF_HUB_OFFLINE is respected."""
    match = _ID.fullmatch(spec)
    if match is None or not looks_like_hub_id(spec):
        raise CheckpointError(f"{spec}: is not a hub id. Write owner/name or owner/name@revision.")
    name, revision = match["name"], match["revision"]
    import huggingface_hub
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return _cached(name, revision, cache_dir, "HF_HUB_OFFLINE is set")
    try:
        listed = huggingface_hub.HfApi().list_repo_files(name, revision=revision)
        wanted = files_to_download(listed, spec)
        folder = huggingface_hub.snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=wanted)
    except CheckpointError:
        raise
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{spec}: is gated on the hub. Ask for access at https://huggingface.co/{name}, then run 'hf auth login'."
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(
            f"{spec}: {name} on the hub has no revision '{revision}'. Check the branch, tag or commit."
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{spec}: is not on the hub under this id (or is private: run 'hf auth login'), and not a local path. "
            "Check the spelling."
        ) from None
    except Exception as error:
        return _cached(name, revision, cache_dir, f"the hub cannot be reached ({_brief(error)})")
    return Path(folder)


def files_to_download(names: Iterable[str], spec: str) -> list[str]:
    """Top-level side files with one set of weights: safetensors where there is a choice, the adapter otherwise."""
    names = sorted(name for name in names if "/" not in name)
    entry = pick_weights(names, spec)
    if entry is not None:
        weights = [name for name in names if belongs_to(entry, name)]
    else:
        weights = [name for name in _ADAPTER_WEIGHTS if name in names and CONFIG_NAME in names][:1]
    if not weights:
        raise CheckpointError(
            f"{spec}: has no safetensors or PyTorch weights on the hub (GGUF and other formats are not read). "
            "Look for the original model of which this is a conversion."
        )
    side = [name for name in names if name.endswith(_SIDE_SUFFIXES) or name == HEAD_FILE]
    return sorted({_literal(name) for name in [*weights, *(name for name in side if not name.endswith(".index.json"))]})


def _cached(name: str, revision: str | None, cache_dir: Path | None, why: str) -> Path:
    """What an earlier download left. A shard that is missing there is found when the folder is opened."""
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, cache_dir=cache_dir, local_files_only=True, allow_patterns=["*config.json"]
            )
        )
    except Exception as error:
        wanted = f"{name}@{revision}" if revision else name
        command = f"hf download {name}{f' --revision {revision}' if revision else ''}"
        raise CheckpointError(
            f"{wanted}: {why}, and the cache does not hold it ({_brief(error)}). "
            f"Go online (unset HF_HUB_OFFLINE), run '{command}' where there is a network, or give a local folder."
        ) from None


def _brief(error: Exception) -> str:
    text = str(error).split("\n", 1)[0]
    return f"{type(error).__name__}: {text[:120]}" if text else type(error).__name__


def _literal(name: str) -> str:
    """A file name as a pattern that matches only itself."""
    return re.sub(r"([*?[])", r"[\1]", name)
