"""The keys of a PEFT LoRA file: which tensors are factors of which base tensor, and which replace one whole.

A key that is not understood is an error: leaving it out would merge a part of the expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from plait.dtypes import FLOATS
from plait.errors import CheckpointError
from plait.sources.adapter_config import AdapterConfig
from plait.sources.base import TensorSpec

_PREFIX = "base_model.model."
_EMBEDDINGS = {
    "embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "tok_embeddings", "embed_in", "embed_out",
    "embeddings", "output", "token_embedding", "decoder",
}  # fmt: skip
"""Modules that PEFT stores whole when the vocabulary was resized or the embedding is adapted."""

Kind = Literal["linear", "embedding", "convolution"]


@dataclass(frozen=True)
class Factors:
    """Stored names of one module's A and B."""

    a: str
    b: str
    kind: Kind


def sort_keys(
    stored: Mapping[str, TensorSpec], settings: AdapterConfig, path: Path
) -> tuple[dict[str, str], dict[str, Factors]]:
    """Stored keys by what they are: whole tensors (base name → key), and factors (base name → keys of A and B)."""
    whole: dict[str, tuple[int, str]] = {}
    halves: dict[str, dict[str, tuple[str, bool]]] = {}
    for key in stored:
        parts = key.removeprefix(_PREFIX).split(".")
        mark = next((part for part in parts if part.startswith("lora_")), None)
        if mark is not None:
            side, embedding, name = _parse_factor(key, parts, mark, path)
            if side in halves.setdefault(name, {}):
                raise CheckpointError(f"{path}: has two '{mark}' for '{name}'. Save one adapter to a file.")
            halves[name][side] = (key, embedding)
        elif "original_module" not in parts:
            order, name = _parse_whole(key, parts, settings, path)
            if name in whole and whole[name][0] == order:
                raise CheckpointError(f"{path}: has two tensors for '{name}'. Save one adapter to a file.")
            whole[name] = min(whole.get(name, (order, key)), (order, key))
    return {name: key for name, (_, key) in whole.items()}, {
        name: _pair(pair, stored, path) for name, pair in halves.items()
    }


def _parse_factor(key: str, parts: list[str], mark: str, path: Path) -> tuple[str, bool, str]:
    """`…q_proj.lora_A[.adapter].weight` or `…embed.lora_embedding_A[.adapter]` as side, embedding, base name."""
    at = parts.index(mark)
    module, tail = parts[:at], parts[at + 1 :]
    embedding = mark.startswith("lora_embedding_")
    fits = len(tail) <= 1 if embedding else len(tail) in (1, 2) and tail[-1] == "weight"
    if mark not in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B") or not fits or not module:
        raise CheckpointError(
            f"{path}: does not understand the key '{key}': it is of a LoRA variant that Plait does not read (DoRA, "
            "lora_bias, …). Merge the adapter with peft (merge_and_unload) and give the merged folder."
        )
    if "base_layer" in module:
        raise CheckpointError(f"{path}: '{key}' wraps one adapter in another. Merge it with peft and give the result.")
    return mark[-1], embedding, ".".join([*module, "weight"])


def _parse_whole(key: str, parts: list[str], settings: AdapterConfig, path: Path) -> tuple[int, str]:
    """A whole tensor's base name, with its order of preference: PEFT reads the plain spelling first."""
    order = 0
    if "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        tail = parts[at + 1 :]
        parts, order = parts[:at] + (tail[1:] or tail), 1 if len(tail) > 1 else 2
    elif "base_layer" in parts:
        parts = [part for part in parts if part != "base_layer"]
    name = ".".join(parts)
    trained = order > 0 or settings.saves_whole(name) or (parts[-1] == "bias" and settings.bias != "none")
    if not trained and not (parts[-1] == "weight" and parts[-2:-1] and parts[-2] in _EMBEDDINGS):
        raise CheckpointError(
            f"{path}: does not understand the key '{key}': it is neither LoRA, nor in modules_to_save, nor a trained "
            "bias or embedding. Merge the adapter with peft (merge_and_unload) and give the merged folder."
        )
    return order, name


def _pair(pair: dict[str, tuple[str, bool]], stored: Mapping[str, TensorSpec], path: Path) -> Factors:
    if len(pair) != 2 or pair["A"][1] != pair["B"][1]:
        there = next(iter(pair.values()))[0]
        raise CheckpointError(f"{path}: holds '{there}' without its counterpart. Download the adapter again.")
    a, b = pair["A"][0], pair["B"][0]
    kind: Kind = "embedding" if pair["A"][1] else "convolution" if len(stored[a].shape) > 2 else "linear"
    return Factors(a=a, b=b, kind=kind)


def check_factors(a: TensorSpec, b: TensorSpec, kind: Kind, path: Path) -> int:
    """Rank of a pair whose shapes and types fit each other."""
    for spec in (a, b):
        if spec.dtype not in FLOATS:
            raise CheckpointError(f"{path}: tensor '{spec.name}' is {spec.dtype}, not floating. Download it again.")
    fits = len(a.shape) == len(b.shape) >= 2 and a.shape[0] == b.shape[1] > 0 and all(n == 1 for n in b.shape[2:])
    if not fits or (kind != "convolution" and len(a.shape) != 2):
        raise CheckpointError(
            f"{path}: '{a.name}' {list(a.shape)} and '{b.name}' {list(b.shape)} do not make a low-rank update "
            "(grouped convolutions are not supported). Merge the adapter with peft and give the merged folder."
        )
    return a.shape[0]
