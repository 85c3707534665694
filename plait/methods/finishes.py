"""Δ → Δ': what is done to the one merged task vector before it is added to the base."""

from __future__ import annotations

from plait.methods.block import Block
from plait.methods.stream import Stream


def scale(block: Block, delta: Stream, *, lambda_: float = 1.0) -> Stream:
    """λ·Δ."""
    return delta if lambda_ == 1 else delta.map(lambda values: values * lambda_)


FINISHES = {"scale": scale}


def add_base(block: Block, delta: Stream) -> Stream:
    """θ0 + Δ: the last step of every method on task vectors."""
    return delta.map(lambda values, base: base + values, block.base)
