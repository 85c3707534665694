"""How tensors lie in safetensors files: laid out beforehand, so that every byte's place is known before it is made."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from plait.dtypes import from_torch, itemsize
from plait.lazy import torch
from plait.sources.base import TensorSpec


@dataclass(frozen=True)
class ShardFile:
    """One safetensors file to be: its header, and where each tensor's bytes start in the file."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size: int

    def regions(self) -> list[tuple[str, int, int]]:
        """(tensor, first byte, one after its last), in the order of the file."""
        starts = sorted(self.offsets.items(), key=lambda item: item[1])
        return [
            (name, at, end) for (name, at), end in zip(starts, [*(at for _, at in starts[1:]), self.size], strict=True)
        ]


def lay_out(
    tensors: Iterable[TensorSpec], shard_size: int, metadata: Mapping[str, str], stem: str = "model"
) -> list[ShardFile]:
    """Cut tensors, in the order given, into safetensors files of at most `shard_size` bytes (a larger tensor alone)."""
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in tensors:
        if groups[-1] and filled + spec.nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    total = len(groups)
    names = (
        [f"{stem}.safetensors"]
        if total == 1
        else [f"{stem}-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    )
    return [shard(name, group, metadata) for name, group in zip(names, groups, strict=True)]


def shard(name: str, tensors: Iterable[TensorSpec], metadata: Mapping[str, str]) -> ShardFile:
    """The layout of one file. Wide types come first, so that every tensor starts at a multiple of its item size."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    starts = {}
    for spec in sorted(tensors, key=lambda spec: -itemsize(spec.dtype)):
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [at, at + spec.nbytes]}
        starts[spec.name] = at
        at += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    prefix = struct.pack("<Q", len(text)) + text
    return ShardFile(name, prefix, {key: len(prefix) + start for key, start in starts.items()}, len(prefix) + at)


def index_of(shards: Iterable[ShardFile], total: int) -> bytes:
    """model.safetensors.index.json."""
    weight_map = {name: item.name for item in shards for name in item.offsets}
    data = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(data, indent=2).encode() + b"\n"


def small_file(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file of tensors in memory. The same tensors give the same bytes."""
    specs = [TensorSpec(name, tuple(value.shape), from_torch(value.dtype)) for name, value in tensors.items()]
    file = shard("", specs, {"format": "pt", **(metadata or {})})
    content = bytearray(file.size)
    content[: len(file.header)] = file.header
    for spec in specs:
        start = file.offsets[spec.name]
        flat = tensors[spec.name].detach().cpu().contiguous().reshape(-1)
        content[start : start + spec.nbytes] = flat.view(torch.uint8).numpy().tobytes()
    return bytes(content)
