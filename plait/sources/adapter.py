"""PEFT LoRA adapters: low-rank task vectors that are multiplied out span by span, and the whole tensors beside them.

ΔW = scale·B·A is summed over the rank in a fixed order with element-wise operations. A matrix product would be faster,
but BLAS sums in an order that depends on the shape and the number of threads, and then the block size would change
bytes of the result.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.errors import CheckpointError
from plait.lazy import np
from plait.sources import files
from plait.sources.adapter_config import CONFIG_NAME, AdapterConfig
from plait.sources.adapter_keys import check_factors, sort_keys
from plait.sources.base import LowRank, Source, TensorSpec
from plait.sources.safetensors import SafetensorsSource

if TYPE_CHECKING:
    import torch

_FACTOR_CACHE = 256 << 20
"""Bytes of float32 factors kept."""
_PANEL = 1 << 17
"""Elements multiplied out at a time, so that the running sum stays in the processor's cache."""


class AdapterSource:
    """A folder with adapter_config.json and adapter_model.safetensors (or .bin).

    A name may be in both `specs` and `updates` (a resized embedding with LoRA on it): the expert's tensor is then the
    whole tensor stored here plus the delta, otherwise it is the base's tensor plus the delta.
    """

    def __init__(self, folder: Path, label: str) -> None:
        self.label = label
        self.folder = folder
        self.extra_heads: Path | None = None
        data, raw = files.read_object(folder / CONFIG_NAME, "the adapter configuration")
        self.adapter_config: Mapping[str, Any] = data
        self.config: Mapping[str, Any] = files.read_config(folder)
        self._settings = AdapterConfig(data, folder / CONFIG_NAME)
        self.base_label = self._settings.base_label
        self._config_hash = files.sha256(raw)
        self._file = _open_weights(folder, label)
        try:
            self._stored, factors = sort_keys(self._file.specs, self._settings, self._weights_path)
            self.specs: Mapping[str, TensorSpec] = {
                name: replace(self._file.specs[key], name=name) for name, key in self._stored.items()
            }
            self._factors = factors
            self.updates: Mapping[str, LowRank] = {name: self._update(name) for name in factors}
        except BaseException:
            self.close()
            raise
        if not self.updates and not self.specs:
            raise CheckpointError(f"{self._weights_path}: holds no tensors. Download the adapter again.")
        self._cache: OrderedDict[str, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    def orient(self, base: Mapping[str, TensorSpec]) -> None:
        """Check every update against the base's tensors, and settle which are stored as [in, out].

        PEFT writes one fan_in_fan_out for the whole adapter although it decides per module, so the shapes in the base
        have the last word. Square weights follow the other ones of the adapter. Call once, before reading.
        """
        path, trained_on = self._weights_path, f" ({self.base_label})" if self.base_label else ""
        linear = [name for name, factors in self._factors.items() if factors.kind == "linear"]
        for name, update in self.updates.items():
            if name not in base:
                raise CheckpointError(
                    f"{path}: updates '{name}', which the base does not have. Use the base that "
                    f"this adapter was trained on{trained_on}. If the weight is tied there, untie it first."
                )
            shape = base[name].shape
            if shape != update.shape and not (name in linear and shape == update.shape[::-1]):
                raise CheckpointError(
                    f"{path}: updates '{name}' as {list(update.shape)}, but the base holds {list(shape)}. "
                    f"Use the base that this adapter was trained on{trained_on}."
                )
        square = [name for name in linear if len(set(base[name].shape)) == 1]
        wrong = {name: base[name].shape != self.updates[name].shape for name in linear if name not in square}
        if square and len(set(wrong.values())) > 1:
            raise CheckpointError(
                f"{path}: adapts layers of both kinds, [out, in] and [in, out], and '{square[0]}' is square, so that "
                "its kind cannot be told. Merge the adapter with peft (merge_and_unload) and give the merged folder."
            )
        wrong.update(dict.fromkeys(square, any(wrong.values())))
        self.updates = {
            name: replace(update, transposed=not update.transposed, shape=update.shape[::-1])
            if wrong.get(name)
            else update
            for name, update in self.updates.items()
        }

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements of a whole tensor (modules_to_save, bias, resized embedding)."""
        if name not in self._stored:
            raise files.no_such_tensor(name, self.label, self._stored)
        return self._file.read(self._stored[name], start, stop)

    def delta(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of ΔW, float32. A value depends on its place alone: not on the span or on threads."""
        import torch

        if name not in self.updates:
            raise files.no_such_tensor(name, self.label, self.updates)
        update = self.updates[name]
        files.check_span(TensorSpec(name, update.shape, "F32"), start, stop)
        if start == stop:
            return torch.empty(0)
        left, right = (torch.from_numpy(factor) for factor in self.factors(name))  # [rank, rows], [rank, columns]
        columns = right.shape[1]
        first, last = start // columns, (stop - 1) // columns + 1
        rows = _multiply(left[:, first:last], right).mul_(update.scale)  # [last - first, columns]
        return rows.view(-1)[start - first * columns : stop - first * columns]

    def fingerprint(self) -> str:
        """SHA-256 over the configuration and the fingerprint of the weights."""
        return files.sha256(f"{self._config_hash} {self._file.fingerprint()}".encode())

    def stamp(self) -> str:
        """Changes when the configuration or the weights are replaced or touched."""
        return files.sha256(f"{files.stamp([self.folder / CONFIG_NAME])} {self._file.stamp()}".encode())

    def header_hashes(self) -> dict[str, str]:
        """File name → SHA-256 of the configuration and of the weight file's header."""
        return {CONFIG_NAME: self._config_hash, **self._file.header_hashes()}

    def close(self) -> None:
        """Close the weight file."""
        self._file.close()

    @property
    def _weights_path(self) -> Path:
        return self.folder / next(iter(self._file.header_hashes()))

    def _update(self, name: str) -> LowRank:
        factors = self._factors[name]
        a, b = self._file.specs[factors.a], self._file.specs[factors.b]
        rank = check_factors(a, b, factors.kind, self._weights_path)
        scale = self._settings.scale(name.removesuffix(".weight"), rank)
        turned = factors.kind == "embedding" or (factors.kind == "linear" and self._settings.fan_in_fan_out)
        shape = (a.shape[1], b.shape[0]) if turned else (b.shape[0], *a.shape[1:])
        return LowRank(target=name, rank=rank, scale=scale, transposed=turned, shape=shape)

    def factors(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """[rank, rows] and [rank, columns] of an update in float32, for ΔW as it is read, without its scale.

        Read once while the cache has room. Not to be written into.
        """
        with self._lock:
            if name in self._cache:
                self._cache.move_to_end(name)
                return self._cache[name]
        factors, update = self._factors[name], self.updates[name]
        a, b = (self._file.specs[key] for key in (factors.a, factors.b))
        right = _numbers(self._file, a).reshape(update.rank, -1)
        left = np.ascontiguousarray(_numbers(self._file, b).reshape(-1, update.rank).T)
        pair = (right, left) if update.transposed else (left, right)
        with self._lock:
            self._cache[name] = pair
            while len(self._cache) > 1 and sum(f.nbytes for both in self._cache.values() for f in both) > _FACTOR_CACHE:
                self._cache.popitem(last=False)
        return pair


def _numbers(source: Source, spec: TensorSpec) -> np.ndarray:
    """A stored tensor in float32, flat; without torch where the file can be read without."""
    if not isinstance(source, SafetensorsSource):
        return source.read(spec.name, 0, spec.numel).float().numpy()
    data = source.read_bytes(spec.name, 0, spec.numel)
    if spec.dtype == "BF16":
        return (np.frombuffer(data, dtype=np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    kinds = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
    return np.frombuffer(data, dtype=kinds[spec.dtype]).astype(np.float32)


def _multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """leftᵀ·right for [rank, rows] and [rank, columns], summed over the rank from 0 upwards for every element.

    Product and sum are separate operations, each rounded once, so that no fused multiply-add can come and go with the
    position in a vector register.
    """
    import torch

    rows, columns = left.shape[1], right.shape[1]
    result = torch.empty(rows, columns)
    step = max(1, _PANEL // max(columns, 1))
    product = torch.empty(min(step, rows), columns)
    for first in range(0, rows, step):
        panel = result[first : first + step]
        term = product[: len(panel)]
        factors = left[:, first : first + step, None]  # [rank, step, 1]
        torch.mul(factors[0], right[0], out=panel)
        for index in range(1, len(right)):
            panel.add_(torch.mul(factors[index], right[index], out=term))
    return result


def _open_weights(folder: Path, label: str) -> Source:
    safe = folder / "adapter_model.safetensors"
    if safe.exists() or safe.is_symlink():
        return SafetensorsSource(safe, label)
    pickled = folder / "adapter_model.bin"
    if pickled.exists():
        from plait.sources.torchfile import TorchSource

        return TorchSource(pickled, label)
    raise CheckpointError(
        f"{folder}: has {CONFIG_NAME} but neither adapter_model.safetensors nor adapter_model.bin. Download it again."
    )
