"""safetensors checkpoints, one file or sharded, read by span.

The headers are parsed here, strictly and without torch, so that opening a checkpoint is quick and a hostile or damaged
file is a sentence and not a crash. Spans are read with `preadv` into fresh memory rather than through a map: a file
that shrinks while it is read gives an error instead of SIGBUS, and resident memory is what was asked for.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.dtypes import check_supported, itemsize, to_torch
from plait.errors import CheckpointError
from plait.sources import files
from plait.sources.base import TensorSpec
from plait.sources.folder import INDEX_SUFFIX, names_in, pick_weights

if TYPE_CHECKING:
    import torch

HEADER_LIMIT = 100_000_000
"""Bytes; the limit of the reference implementation."""


@dataclass(frozen=True)
class Shard:
    """One open file: where its data begins, and where each tensor begins in it."""

    path: Path
    descriptor: int
    size: int
    data_start: int
    header_hash: str
    specs: Mapping[str, TensorSpec]
    """In the order of the data."""
    offsets: Mapping[str, int]
    """Tensor name → position in the file."""
    metadata: Mapping[str, str]


class SafetensorsSource:
    """A safetensors file, a shard index, or a folder that holds `model.safetensors` or an index."""

    def __init__(self, path: Path, label: str) -> None:
        self.label = label
        self.folder = path if path.is_dir() else path.parent
        self.extra_heads = _heads(path)
        self.config: Mapping[str, Any] = files.read_config(self.folder)
        self._header_hashes: dict[str, str] = {}
        self._paths: list[Path] = []
        self._shards: list[Shard] = []
        self._places: dict[str, Shard] = {}
        descriptors: list[int] = []
        self._finalizer = weakref.finalize(self, _close, descriptors)
        try:
            self._open(_entry(path), descriptors)
        except BaseException:
            self.close()
            raise
        self.specs: Mapping[str, TensorSpec] = {name: shard.specs[name] for name, shard in self._places.items()}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a tensor, flat, in storage type."""
        import torch

        spec, shard = self._place(name, start, stop)
        values = torch.empty(stop - start, dtype=to_torch(spec.dtype))
        if stop > start:
            buffer = values.view(torch.uint8).numpy().data
            files.fill(shard.descriptor, buffer, shard.offsets[name] + start * itemsize(spec.dtype), shard.path)
        return values

    def filler(self, name: str) -> Callable[[int, memoryview], None]:
        """(first entry, buffer) → fills the buffer with stored bytes: `read` for those who own the memory."""
        spec, shard = self.specs[name], self._places[name]
        begin, width = shard.offsets[name], itemsize(spec.dtype)

        def fill(start: int, buffer: memoryview) -> None:
            if not self._finalizer.alive:
                raise CheckpointError(f"{self.label}: was closed before '{name}' was read.")
            files.fill(shard.descriptor, buffer, begin + start * width, shard.path)

        return fill

    def read_bytes(self, name: str, start: int, stop: int) -> bytes:
        """The same elements as they are stored, without torch."""
        spec, shard = self._place(name, start, stop)
        width, begin = itemsize(spec.dtype), shard.offsets[name]
        return files.read_bytes(shard.descriptor, begin + start * width, (stop - start) * width, shard.path)

    def soon(self, name: str, limit: int) -> None:
        """Have the system bring the first `limit` bytes of a tensor into its page cache, unless they are there."""
        shard, begin = self._places[name], self._places[name].offsets[name]
        end = begin + min(self.specs[name].nbytes, limit)
        if not self._finalizer.alive or end == begin:
            return
        if not (files.cached(shard.descriptor, begin) and files.cached(shard.descriptor, end - 1)):
            files.bring(shard.descriptor, begin, end)

    def _place(self, name: str, start: int, stop: int) -> tuple[TensorSpec, Shard]:
        if name not in self.specs:
            raise files.no_such_tensor(name, self.label, self.specs)
        if not self._finalizer.alive:
            raise CheckpointError(f"{self.label}: was closed before '{name}' was read.")
        files.check_span(self.specs[name], start, stop)
        return self.specs[name], self._places[name]

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the (first) file's header says beside the tensors."""
        return self._shards[0].metadata

    def fingerprint(self) -> str:
        """SHA-256 of every header with samples of every file's data: cheap, and apart for experts of one layout."""
        digest = hashlib.sha256()
        for shard in self._shards:
            digest.update(bytes.fromhex(shard.header_hash))
            middles = [shard.offsets[name] + spec.nbytes // 2 for name, spec in shard.specs.items()]
            files.sample(digest, shard.path, shard.data_start, shard.size, middles)
        return digest.hexdigest()

    def stamp(self) -> str:
        """Changes when a file is replaced or touched."""
        return files.stamp(self._paths)

    def header_hashes(self) -> dict[str, str]:
        """File name → SHA-256 of the index, or of a safetensors header (with its length)."""
        return dict(self._header_hashes)

    def close(self) -> None:
        """Close the files. Nothing can be read afterwards."""
        self._finalizer()

    def _open(self, entry: Path, descriptors: list[int]) -> None:
        if not entry.name.endswith(INDEX_SUFFIX):
            self._add(open_shard(entry, descriptors), None)
            return
        shards, data = files.read_index(entry)
        self._paths.append(entry)
        self._header_hashes[entry.name] = files.sha256(data)
        seen: dict[str, Path] = {}
        for file, listed in shards.items():
            files.check_inside(entry.parent / file)
            if not (entry.parent / file).exists():
                raise CheckpointError(
                    f"{entry.parent / file}: is missing, though {entry.name} lists it. Download this shard again."
                )
            shard = open_shard(entry.parent / file, descriptors)
            for name in shard.specs:
                files.check_unique(seen, name, shard.path)
                seen[name] = shard.path
            absent = next((name for name in listed if name not in shard.specs), None)
            if absent is not None:
                raise CheckpointError(
                    f"{shard.path}: does not hold tensor '{absent}', though {entry.name} says so. "
                    "Index and shards are of different downloads; download the checkpoint again."
                )
            self._add(shard, set(listed))

    def _add(self, shard: Shard, listed: set[str] | None) -> None:
        self._shards.append(shard)
        self._paths.append(shard.path)
        self._header_hashes[shard.path.name] = shard.header_hash
        self._places.update({name: shard for name in shard.specs if listed is None or name in listed})


def open_shard(path: Path, descriptors: list[int]) -> Shard:
    """Open one file and check its header against the file. The descriptor is added to `descriptors` at once."""
    descriptor = files.open_regular(path)
    descriptors.append(descriptor)
    size = os.fstat(descriptor).st_size
    length = _header_length(descriptor, size, path)
    header = files.read_bytes(descriptor, 0, 8 + length, path)
    if header[8:9] != b"{":
        raise CheckpointError(f"{path}: is not a safetensors file (no header object). Download the file again.")
    table = files.parse_object(header[8:], path, "the safetensors header")
    metadata = _metadata(table.pop("__metadata__", None), path)
    entries = sorted((_entry_of(name, entry, path) for name, entry in table.items()), key=lambda entry: entry[1:])
    end, last = 0, "the header"
    for spec, begin, stop in entries:
        if begin != end:
            fault = "overlaps" if begin < end else f"leaves {begin - end} unused bytes after"
            raise CheckpointError(
                f"{path}: tensor '{spec.name}' {fault} {last}. The file is damaged: download it again."
            )
        end, last = stop, f"'{spec.name}'"
    _check_size(size - 8 - length, end, path)
    return Shard(
        path=path,
        descriptor=descriptor,
        size=size,
        data_start=8 + length,
        header_hash=files.sha256(header),
        specs={spec.name: spec for spec, _, _ in entries},
        offsets={spec.name: 8 + length + begin for spec, begin, _ in entries},
        metadata=metadata,
    )


def _header_length(descriptor: int, size: int, path: Path) -> int:
    start = files.read_bytes(descriptor, 0, min(size, 64), path)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a Git LFS pointer and not the weights. Run 'git lfs pull' in its folder.")
    if size < 8:
        raise CheckpointError(f"{path}: has only {size} bytes, too few for a safetensors file. Download it again.")
    length = int.from_bytes(start[:8], "little")
    if length > HEADER_LIMIT:
        raise CheckpointError(
            f"{path}: claims a header of {length} bytes; the limit is {HEADER_LIMIT}. "
            "This is not a safetensors file, or it is damaged; download it again."
        )
    if length > size - 8:
        raise CheckpointError(
            f"{path}: is truncated: its header of {length} bytes is cut off, {length + 8 - size} bytes are missing. "
            "Download it again."
        )
    return length


def _metadata(metadata: object, path: Path) -> Mapping[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: '__metadata__' is not a table of strings. Save the file again.")
    return metadata


def _entry_of(name: str, entry: object, path: Path) -> tuple[TensorSpec, int, int]:
    """One header entry as spec, begin and end (relative to the data)."""
    files.check_name(name, path)
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{path}: tensor '{name}' lacks dtype, shape or data_offsets. Download the file again.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    check_supported(dtype if isinstance(dtype, str) else repr(dtype), name, path)
    if not _counts(shape):
        raise CheckpointError(f"{path}: tensor '{name}' has shape {shape!r:.80}. Download the file again.")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{path}: tensor '{name}' has data_offsets {offsets!r:.80}. Download the file again.")
    spec = TensorSpec(name, tuple(shape), dtype)
    begin, stop = offsets
    if stop - begin != spec.nbytes:
        raise CheckpointError(
            f"{path}: tensor '{name}' of shape {list(shape)} and type {dtype} needs {spec.nbytes} bytes, "
            f"but its data_offsets span {stop - begin}. The file is damaged; download it again."
        )
    return spec, begin, stop


def _counts(value: object) -> bool:
    """A short list of plain sizes: 64 dimensions and 64 bits are beyond anything torch can hold."""
    if not isinstance(value, list) or len(value) > 64:
        return False
    return all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_size(present: int, described: int, path: Path) -> None:
    if present < described:
        raise CheckpointError(
            f"{path}: is truncated: its header describes {described} bytes of tensors and {present} are there, "
            f"{described - present} bytes are missing. Download it again."
        )
    if present > described:
        raise CheckpointError(
            f"{path}: has {present - described} bytes that no tensor in its header owns. "
            "The file is damaged or hides something; download it again."
        )


def _entry(path: Path) -> Path:
    """The file to begin with."""
    if not path.is_dir():
        return path
    name = pick_weights((name for name in names_in(path) if ".safetensors" in name), str(path))
    if name is None:
        raise CheckpointError(f"{path}: holds no safetensors file. Give the folder of a saved model.")
    return path / name


def _heads(path: Path) -> Path | None:
    head = path / files.HEAD_FILE
    return head if path.is_dir() and head.is_file() else None


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())
