"""How what sets the experts apart is stored, for one tensor: dense, low rank, pruned, or one vector under K masks.

A store turns [K, *shape] into named tensors and back. What it writes is known from shapes and options alone, so the
files can be laid out before anything is computed, except for ranks and counts that the data decides (`Found`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from plait.dtypes import from_torch
from plait.errors import CheckpointError
from plait.routing.packing import FLOATS, GROUP, Precision, bits_of, flags_of, pack, packed_width, unpack
from plait.sources.base import TensorSpec

Kind = Literal["dense", "low_rank", "pruned", "masked"]


@dataclass(frozen=True)
class Store:
    """The form of one tensor's experts: everything that is needed to lay out, read and use them."""

    kind: Kind
    shape: tuple[int, ...]
    experts: int
    precision: Precision = "float32"
    ranks: tuple[int, ...] = ()
    """low_rank: of every expert. A row is one direction: down [ΣR, n] reads, up [ΣR, m] writes."""
    counts: tuple[int, ...] = ()
    """pruned: entries kept of every expert."""

    @property
    def numel(self) -> int:
        """Entries of one expert's tensor."""
        return math.prod(self.shape)

    def floats(self) -> dict[str, tuple[int, ...]]:
        """The tensors of numbers, by shape, before any packing."""
        if self.kind == "low_rank":
            total, (m, n) = sum(self.ranks), self.shape
            return {"down": (total, n), "up": (total, m)}
        if self.kind == "pruned":
            return {"values": (1, sum(self.counts))}
        if self.kind == "masked":
            return {"unified": (1, self.numel), "scale": (self.experts,)}
        return {"values": (self.experts, self.numel)}

    def specs(self, prefix: str) -> list[TensorSpec]:
        """What the file holds."""
        found = []
        for name, shape in self.floats().items():
            if self.precision in FLOATS or name == "scale":
                kind = "F32" if name == "scale" else from_torch(FLOATS[self.precision])
                found.append(TensorSpec(f"{prefix}.{name}", shape, kind))
                continue
            rows, n = shape
            groups = -(-n // GROUP)
            found.append(TensorSpec(f"{prefix}.{name}_codes", (rows, packed_width(n, self.precision)), "U8"))
            found.append(TensorSpec(f"{prefix}.{name}_scales", (rows, groups), "F16"))
        if self.kind in ("pruned", "masked"):
            found.append(TensorSpec(f"{prefix}.bits", (self.experts, -(-self.numel // 8)), "U8"))
        return found

    def encode(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`floats()` and `bits` as they are stored, by the names of `specs` without the prefix."""
        found: dict[str, Tensor] = {}
        for name, shape in self.floats().items():
            value = parts[name].reshape(shape)
            if name == "scale":
                found[name] = value.float()
            elif self.precision in FLOATS:
                found[name] = _narrowed(value, FLOATS[self.precision])
            else:
                found[f"{name}_codes"], found[f"{name}_scales"] = pack(value, self.precision)
        if "bits" in parts:
            found["bits"] = bits_of(parts["bits"].reshape(self.experts, -1))
        return found

    def decode(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `encode`, as far as few bits allow; floats come in the type they have now."""
        found: dict[str, Tensor] = {}
        for name, shape in self.floats().items():
            if name in stored:
                found[name] = stored[name]
            else:
                found[name] = unpack(stored[f"{name}_codes"], stored[f"{name}_scales"], shape[1], self.precision)
        if "bits" in stored:
            found["bits"] = flags_of(stored["bits"], self.numel)
        return found

    def deltas(self, parts: Mapping[str, Tensor], picked: Sequence[int] | None = None) -> Tensor:
        """[K, *shape] of all experts, or of some, from what `decode` gave."""
        rows = list(range(self.experts)) if picked is None else list(picked)
        if self.kind == "dense":
            flat = parts["values"] if len(rows) == self.experts else parts["values"][rows]  # all: without a copy
        elif self.kind == "masked":
            flat = parts["bits"][rows] * parts["unified"] * parts["scale"][rows].unsqueeze(1).to(parts["unified"].dtype)
        elif self.kind == "pruned":
            values = parts["values"][0]
            flat = values.new_zeros(len(rows), self.numel)
            for row, k in enumerate(rows):
                first = sum(self.counts[:k])
                flat[row, parts["bits"][k]] = values[first : first + self.counts[k]]
        else:
            starts = [sum(self.ranks[:k]) for k in rows]
            flat = torch.stack(
                [
                    parts["up"][at : at + self.ranks[k]].T @ parts["down"][at : at + self.ranks[k]]
                    for k, at in zip(rows, starts, strict=True)
                ]
            )
        return flat.reshape(len(rows), *self.shape)

    def as_data(self) -> dict[str, Any]:
        """For config.json."""
        data: dict[str, Any] = {"store": self.kind, "shape": list(self.shape), "precision": self.precision}
        if self.ranks:
            data["ranks"] = list(self.ranks)
        if self.counts:
            data["counts"] = list(self.counts)
        return data

    @classmethod
    def from_data(cls, data: Any, experts: int, where: str) -> Store:
        """From config.json, which may be a stranger's. Raises CheckpointError."""
        try:
            kind, precision = data["store"], data["precision"]
            shape, ranks, counts = (tuple(data.get(key, ())) for key in ("shape", "ranks", "counts"))
        except (KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{where}: is no description of stored experts; the file is damaged") from None
        kinds, precisions = ("dense", "low_rank", "pruned", "masked"), (*FLOATS, "int8", "int4")
        known = isinstance(kind, str) and kind in kinds and isinstance(precision, str) and precision in precisions
        sizes = (*shape, *ranks, *counts)
        fits = {"low_rank": len(ranks) == experts and len(shape) == 2, "pruned": len(counts) == experts}
        if (
            not known
            or not fits.get(kind, True)
            or any(type(size) is not int or not 0 <= size < 1 << 40 for size in sizes)
        ):
            raise CheckpointError(f"{where}: describes experts in a form that this version of Plait does not know")
        return cls(kind, shape, experts, precision, ranks, counts)  # pyright: ignore[reportArgumentType]


def _narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return value.clamp(-limit, limit).to(dtype).contiguous()


def ranks_for(shape: tuple[int, ...], experts: int, rank: int | None, ratio: float) -> tuple[int, ...]:
    """Of every expert: `rank`, else ⌊ratio·min(m, n)⌋, at least 1 and at most full (Twin-Merging, arXiv:2406.15479)."""
    least = min(shape)
    wanted = int(ratio * least) if rank is None else rank
    return (max(1, min(wanted, least)),) * experts
