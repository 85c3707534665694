"""What the rest of Plait knows of a checkpoint: named tensors that can be read by span.

A source is opened by reading headers only. Tensors are flat runs of elements in storage order (C order), so a reader
can ask for any span of any tensor without loading the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from plait.dtypes import itemsize

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and storage type (safetensors spelling, `BF16`) of one stored tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensor."""
        return self.numel * itemsize(self.dtype)


@runtime_checkable
class Source(Protocol):
    """A checkpoint whose tensors can be read by span. All methods are safe to call from several threads."""

    label: str
    """How the user named it (path, hub id)."""
    folder: Path
    """Where its side files (config.json, tokenizer) are."""
    config: Mapping[str, Any]
    """config.json as data; empty when there is none."""
    specs: Mapping[str, TensorSpec]
    """Whole tensors stored here, in file order."""
    extra_heads: Path | None
    """A file beside the model that holds its task's head alone (head.safetensors), if there is one."""

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of tensor `name`: a flat CPU tensor in storage type. May be a read-only view."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the headers and sampled bytes: the same for the same content anywhere."""
        ...

    def stamp(self) -> str:
        """Identity for resuming on this machine: changes when a file is replaced or touched."""
        ...

    def header_hashes(self) -> dict[str, str]:
        """File name → SHA-256 of its header (index, safetensors header, adapter config)."""
        ...

    def close(self) -> None:
        """Release maps and descriptors."""
        ...


@runtime_checkable
class LowRankSource(Source, Protocol):
    """An adapter: whole tensors as above (modules_to_save, biases), and low-rank task vectors made when read."""

    base_label: str | None
    """base_model_name_or_path of the adapter's config."""
    updates: Mapping[str, LowRank]
    """Tensor name in the base → its update."""

    def orient(self, base: Mapping[str, TensorSpec]) -> None:
        """Fit the updates to the base's shapes; `base`: target name → the tensor it updates. CheckpointError if not."""
        ...

    def delta(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of scale·B·A for base tensor `name`, flat float32, in the base's storage order."""
        ...


@dataclass(frozen=True)
class LowRank:
    """One module's update: ΔW = scale · B·A, with A [rank, in] and B [out, rank] after flattening.

    `transposed`: the base stores this weight as [in, out] (fan_in_fan_out modules, embeddings), so ΔWᵀ is what is read.
    """

    target: str
    rank: int
    scale: float
    transposed: bool
    shape: tuple[int, ...]
    """Shape of ΔW as the base stores it (a convolution's [out, in, kh, kw])."""

    @property
    def numel(self) -> int:
        """Number of elements of ΔW."""
        count = 1
        for size in self.shape:
            count *= size
        return count
