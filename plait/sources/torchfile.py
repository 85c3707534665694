"""PyTorch state dicts (.bin, .pt, .pth), one file or sharded, loaded without running anything they contain.

`torch.load` is only ever called with `weights_only=True`. A file that needs more than that is refused: unpickling it
would run whatever its author put there.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.dtypes import check_supported, from_torch
from plait.errors import CheckpointError
from plait.sources import files
from plait.sources.base import TensorSpec
from plait.sources.folder import INDEX_SUFFIX, TORCH_SUFFIXES, names_in, pick_weights

if TYPE_CHECKING:
    import torch

_NESTED = ("state_dict", "model_state_dict", "model")
_PICKLE_LIMIT = 100 << 20
_LEGACY_HEADER = 1 << 20
_SAMPLE = 1024
_ADVICE = (
    "Take the safetensors version of this checkpoint, or load it in a sandbox with the program that wrote it and save "
    "the weights with safetensors.torch.save_file."
)


class TorchSource:
    """A state dict file, a shard index, or a folder that holds `pytorch_model.bin` or an index."""

    def __init__(self, path: Path, label: str) -> None:
        self.label = label
        self.folder = path if path.is_dir() else path.parent
        head = path / files.HEAD_FILE
        self.extra_heads: Path | None = head if path.is_dir() and head.is_file() else None
        self.config: Mapping[str, Any] = files.read_config(self.folder)
        self.nested_under: str | None = None
        """Key of the file under which the state dict was found, when it was not at the top."""
        self._header_hashes: dict[str, str] = {}
        self._paths: list[Path] = []
        self._tensors: dict[str, torch.Tensor] = {}
        self._open(_entry(path))
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(name, tuple(tensor.shape), from_torch(tensor.dtype))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a tensor, flat, in C order whatever its strides are."""
        if name not in self.specs:
            raise files.no_such_tensor(name, self.label, self.specs)
        tensor = self._tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.label}: was closed before '{name}' was read.")
        files.check_span(self.specs[name], start, stop)
        if tensor.is_contiguous() or not tensor.numel():
            return tensor.reshape(-1)[start:stop]
        per_row = tensor.numel() // len(tensor)
        first, last = start // per_row, -(-stop // per_row)
        return tensor[first:last].reshape(-1)[start - first * per_row : stop - first * per_row]

    def fingerprint(self) -> str:
        """SHA-256 of every file's pickle (or first megabyte), with samples of its bytes and of the tensors."""
        import torch

        digest = hashlib.sha256()
        for path in self._paths:
            if path.name.endswith(INDEX_SUFFIX):
                continue
            digest.update(bytes.fromhex(self._header_hashes[path.name]))
            files.sample(digest, path, 0, path.stat().st_size)
        for name in files.thinned(list(self.specs)):
            middle, count = self.specs[name].numel // 2, self.specs[name].numel
            values = self.read(name, middle, min(middle + _SAMPLE, count)).contiguous()
            digest.update(values.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def stamp(self) -> str:
        """Changes when a file is replaced or touched."""
        return files.stamp(self._paths)

    def header_hashes(self) -> dict[str, str]:
        """File name → SHA-256 of the index, of the pickle inside a zip file, or of an old file's first megabyte."""
        return dict(self._header_hashes)

    def close(self) -> None:
        """Drop the tensors, and the maps with them. Nothing can be read afterwards."""
        self._tensors.clear()

    def _open(self, entry: Path) -> None:
        if not entry.name.endswith(INDEX_SUFFIX):
            self._add(entry, None)
            return
        shards, data = files.read_index(entry)
        self._paths.append(entry)
        self._header_hashes[entry.name] = files.sha256(data)
        for file, listed in shards.items():
            files.check_inside(entry.parent / file)
            if not (entry.parent / file).exists():
                raise CheckpointError(
                    f"{entry.parent / file}: is missing, though {entry.name} lists it. Download this shard again."
                )
            self._add(entry.parent / file, listed)

    def _add(self, path: Path, listed: list[str] | None) -> None:
        self._header_hashes[path.name] = _header_hash(path)
        self._paths.append(path)
        tensors, nested = _state_dict(_load(path), path)
        self.nested_under = nested or self.nested_under
        for name in tensors if listed is None else listed:
            if name not in tensors:
                raise CheckpointError(
                    f"{path}: does not hold tensor '{name}', though its index says so. "
                    "Index and shards are of different downloads; download the checkpoint again."
                )
            self._tensors[name] = _checked(tensors[name], name, path)


def _load(path: Path) -> object:
    """The file's content, mapped where its format allows. Never with `weights_only=False`."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        text = str(error)
        unsafe = re.search(r"GLOBAL (\S+)|[Tt]orchScript", text)
        if unsafe:
            what = f" ({unsafe[1]})" if unsafe[1] else ""
            reason = f"holds something other than tensors{what}; reading it could run code, so it is not read"
            raise CheckpointError(f"{path}: {reason}. {_ADVICE}") from None
        inner = re.search(r"WeightsUnpickler error: (.+)|$", text)
        reason = " ".join((inner[1] if inner and inner[1] else text).split())[:120]
        raise CheckpointError(
            f"{path}: is not a readable PyTorch state dict of tensors alone ({type(error).__name__}: {reason}). "
            f"Download it again if it is damaged. {_ADVICE}"
        ) from None


def _state_dict(content: object, path: Path) -> tuple[Mapping[str, Any], str | None]:
    """The mapping name → tensor: the content itself, or what lies under a usual key when it has no tensors itself."""
    import torch

    if isinstance(content, Mapping) and not any(isinstance(value, torch.Tensor) for value in content.values()):
        for key in _NESTED:
            inner = content.get(key)
            if isinstance(inner, Mapping) and any(isinstance(value, torch.Tensor) for value in inner.values()):
                return inner, key
    elif isinstance(content, Mapping):
        return content, None
    raise CheckpointError(f"{path}: holds no table of tensors, at the top or under {', '.join(_NESTED)}. {_ADVICE}")


def _checked(value: Any, name: object, path: Path) -> torch.Tensor:
    """A plain dense tensor of a type that is supported, no larger than what is stored for it."""
    import torch

    if not isinstance(name, str):
        raise CheckpointError(f"{path}: has the key {name!r:.80}, which is not a tensor name. {_ADVICE}")
    files.check_name(name, path)
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(f"{path}: '{name}' is not a tensor ({type(value).__name__}). {_ADVICE}")
    tensor = value.detach()
    if tensor.is_quantized or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise CheckpointError(f"{path}: tensor '{name}' is quantised, sparse or without data. {_ADVICE}")
    check_supported(from_torch(tensor.dtype), name, path)
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: tensor '{name}' claims more elements than are stored for it. {_ADVICE}")
    return tensor


def _header_hash(path: Path) -> str:
    """The hash of the pickle of a zip file, of the first megabyte of an older one. Compressed archives are refused."""
    descriptor = files.open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        if not zipfile.is_zipfile(file):
            length = min(os.fstat(descriptor).st_size, _LEGACY_HEADER)
            return files.sha256(files.read_bytes(descriptor, 0, length, path))
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                    raise CheckpointError(f"{path}: is a compressed archive, which PyTorch does not write. {_ADVICE}")
                pickles = [member for member in members if member.filename.endswith("/data.pkl")]
                if len(pickles) != 1 or pickles[0].file_size > _PICKLE_LIMIT:
                    raise CheckpointError(f"{path}: is an archive without one PyTorch state dict in it. {_ADVICE}")
                return files.sha256(archive.read(pickles[0]))
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError, ValueError) as error:
            raise CheckpointError(f"{path}: is a damaged archive ({error}). Download it again.") from None


def _entry(path: Path) -> Path:
    """The file to begin with."""
    if not path.is_dir():
        return path
    suffixes = (*TORCH_SUFFIXES, *(suffix + INDEX_SUFFIX for suffix in TORCH_SUFFIXES))
    name = pick_weights((name for name in names_in(path) if name.endswith(suffixes)), str(path))
    if name is None:
        raise CheckpointError(f"{path}: holds no PyTorch state dict. Give the folder of a saved model.")
    return path / name
