"""Entries that are no finite numbers, where they are to be passed through (`--allow-nonfinite`) and not refused.

They are taken out before anything is computed and put back into the result: at a place where any input has one, every
input reads as zero, so that no sum, norm or threshold sees it, and the merged entry there is the sum of what was taken
out (NaN, or an infinity where all agree on its sign). So the result is non-finite exactly where an input is.
"""

from __future__ import annotations

import dataclasses

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
