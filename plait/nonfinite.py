"""Entries that are no finite numbers: refused, or passed through (`--allow-nonfinite`).

To pass them through they are taken out before anything is computed and put back into the result: at a place where any
input has one, every input reads as zero, so that no sum, norm or threshold sees it, and the merged entry there is the
sum of what was taken out (NaN, or an infinity where all agree on its sign). So the result is non-finite exactly where
an input is.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from plait.decide import TensorPlan
from plait.errors import CheckpointError
from plait.experts import Input
from plait.lazy import torch
from plait.methods.block import Block, Reader
from plait.methods.stream import Piece


def set_apart(block: Block) -> Block:
    """The block with readers that give zero where any input is no number, and with `lost`, the sum of those."""
    models, base = list(block.read_models), block.read_base
    deltas = list(block.read_deltas) or [None] * len(models)
    readers = [
        *(own or whole for whole, own in zip(models, deltas, strict=True)),
        *([base] if base is not None else []),
    ]
    held: list[tuple[int, torch.Tensor]] = []

    def lost(piece: Piece) -> torch.Tensor:
        if not held or held[0][0] != piece.index:  # one piece is held: every reader of it asks
            total: torch.Tensor | None = None
            for read in readers:
                values = read(piece)
                hidden = torch.where(torch.isfinite(values), torch.zeros_like(values), values)
                total = hidden if total is None else total + hidden
            assert total is not None
            held[:] = [(piece.index, total)]
        return held[0][1]

    def without(read: Reader) -> Reader:
        def clean(piece: Piece) -> torch.Tensor:
            values = read(piece)
            return torch.where(torch.isfinite(lost(piece)), values, torch.zeros_like(values))

        return clean

    return dataclasses.replace(
        block, read_models=[without(read) for read in models], read_base=None if base is None else without(base),
        read_deltas=[None if own is None else without(own) for own in deltas], lost=lost,
    )  # fmt: skip


def put_back(values: torch.Tensor, lost: torch.Tensor) -> torch.Tensor:
    """Merged values [n] with what was taken out in its places."""
    lost = lost.to(values.device)
    return torch.where(torch.isfinite(lost), values, lost.to(values.dtype))


def count(block: Block) -> int:
    """Entries that are no numbers in any input."""
    assert block.lost is not None
    return sum(int((~torch.isfinite(block.lost(piece))).sum()) for piece in block.grid)


def sentences(counts: dict[str, int]) -> list[str]:
    """A note per tensor, in the order of names."""
    return [
        f"'{name}': {found} entries are no finite numbers in some input, and none in the result"
        for name, found in sorted(counts.items())
    ]


def as_they_are(values: torch.Tensor, *_: Any) -> torch.Tensor:
    """The values, whatever they are."""
    return values


def finite(values: torch.Tensor, item: Input, tensor: TensorPlan, piece: Piece) -> torch.Tensor:
    """The values, or a CheckpointError that names the first one that is not a finite number."""
    if values.numel():
        low, high = torch.aminmax(values)  # either is NaN where any entry is
        if not (math.isfinite(float(low)) and math.isfinite(float(high))):
            at = int(torch.nonzero(~torch.isfinite(values))[0, 0]) + piece.start
            place = []
            for size in reversed(tensor.shape):
                place.append(at % size)
                at //= size
            kind = "NaN" if torch.isnan(values).any() else "an infinity"
            raise CheckpointError(
                f"{item.source.label}: tensor '{item.stored}' holds {kind} at {place[::-1]}; this checkpoint is "
                f"broken: get it again, or take the base's with keep: {{base: [{tensor.name}]}}"
            )
    return values
