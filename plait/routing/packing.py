"""Numbers in few bits: masks at one bit an entry, and integers with a scale for every group of entries.

What is packed is packed by position, so that the same tensor gives the same bytes, and unpacked by arithmetic alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Precision = Literal["float32", "bfloat16", "float16", "int8", "int4"]

GROUP = 32
"""Entries that share a scale: a float16 scale makes 4.5 bits of 4."""
FLOATS: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LEVELS = {"int8": 127, "int4": 7}


def bits_of(flags: Tensor) -> Tensor:
    """Booleans [..., n] → bytes [..., ceil(n/8)], the first entry in the lowest bit."""
    n = flags.shape[-1]
    padded = torch.nn.functional.pad(flags.to(torch.uint8), (0, -n % 8)).view(*flags.shape[:-1], -1, 8)
    return (padded << _shifts(flags.device)).sum(-1, dtype=torch.uint8)


def flags_of(packed: Tensor, n: int) -> Tensor:
    """Bytes [..., ceil(n/8)] → booleans [..., n]."""
    return ((packed.unsqueeze(-1) >> _shifts(packed.device)) & 1).flatten(-2)[..., :n].bool()


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def packed_width(n: int, precision: Precision) -> int:
    """Bytes of n packed integers: groups are filled up."""
    whole = -(-n // GROUP) * GROUP
    return whole // 2 if precision == "int4" else whole


def pack(values: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """[K, n] → codes [K, bytes] uint8 and scales [K, groups] float16: the nearest multiple of each group's scale.

    The scale is the group's largest magnitude over 7 (int4) or 127 (int8), so that zero stays zero.
    """
    levels = _LEVELS[precision]
    rows, n = values.shape
    groups = torch.nn.functional.pad(values.float(), (0, -n % GROUP)).view(rows, -1, GROUP)
    # Rounded up to float16, so that no code leaves its range; at least a normal number, so that nothing divides by 0.
    scale = (groups.abs().amax(-1) / levels).clamp_(min=2.0**-14, max=6e4).mul_(1 + 2.0**-10).to(torch.float16)
    codes = torch.round(groups / scale.float().unsqueeze(-1)).clamp_(-levels, levels).to(torch.int8).view(rows, -1)
    if precision == "int8":
        return codes.view(torch.uint8), scale
    low, high = (codes + 8).to(torch.uint8).view(rows, -1, 2).unbind(-1)
    return low | (high << 4), scale


def unpack(codes: Tensor, scales: Tensor, n: int, precision: Precision) -> Tensor:
    """The inverse of `pack`: [K, n] float32."""
    rows = codes.shape[0]
    if precision == "int8":
        whole = codes.view(torch.int8).float()
    else:
        whole = torch.stack([codes & 15, codes >> 4], dim=-1).view(rows, -1).float() - 8
    return (whole.view(rows, -1, GROUP) * scales.float().unsqueeze(-1)).view(rows, -1)[:, :n]
