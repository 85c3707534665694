"""Tensors that are computed piece by piece, and the reductions over them.

A method reads like mathematics on whole tensors, but nothing larger than a piece is ever in memory: `map` composes
lazily, `sweep` walks all pieces once and collects what it is told to. The pieces of a tensor are fixed by its shape
and the method's scope alone, never by memory budget or threads, so that every reduction adds up in the same order
and every run gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from plait.lazy import torch

if TYPE_CHECKING:
    from plait.kernels.fused import Fused

T = TypeVar("T")
Scope = Literal["element", "row", "tensor"]

GRAIN = 1 << 18
"""Elements of a piece: with K experts and a few temporaries it stays near the CPU's caches."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a tensor in C order; `index` counts the pieces of its grid."""

    index: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start


@dataclass(frozen=True)
class Grid:
    """How one tensor is cut: runs of `unit` elements, the last one shorter."""

    numel: int
    unit: int

    @classmethod
    def of(cls, shape: tuple[int, ...], scope: Scope) -> Grid:
        """element: pieces of GRAIN elements. row: as many whole rows (first axis) as fit. tensor: one piece."""
        numel = 1
        for size in shape:
            numel *= size
        if scope == "tensor":
            return cls(numel, max(numel, 1))
        if scope == "row":
            width = max(numel // shape[0] if len(shape) > 1 and shape[0] else numel, 1)
            return cls(numel, max(1, GRAIN // width) * width)
        return cls(numel, GRAIN)

    def __len__(self) -> int:
        return -(-self.numel // self.unit)

    def __iter__(self) -> Iterator[Piece]:
        for index in range(len(self)):
            yield Piece(index, index * self.unit, min(self.numel, (index + 1) * self.unit))


class Stream:
    """A flat tensor [n], or K stacked ones [K, n], whose pieces are computed on demand."""

    def __init__(self, grid: Grid, load: Callable[[Piece], torch.Tensor], fused: Fused | None = None) -> None:
        self.grid = grid
        self.fused = fused
        """The same in the words of the compiled loops, where they know it; always the same bytes."""
        self._load = load

    def __call__(self, piece: Piece) -> torch.Tensor:
        """The values of one piece; callers may write into what `map` made, never into what a source gave."""
        return self._load(piece)

    def map(self, fn: Callable[..., torch.Tensor], *others: Stream, fused: Fused | None = None) -> Stream:
        """Lazily fn(own piece, the others' same piece, …). `fused` says the same to the compiled loops."""
        return Stream(self.grid, lambda piece: fn(self(piece), *(other(piece) for other in others)), fused)

    def map_pieces(self, fn: Callable[[torch.Tensor, Piece], torch.Tensor], *, fused: Fused | None = None) -> Stream:
        """As `map`, for functions that must know where the piece lies."""
        return Stream(self.grid, lambda piece: fn(self(piece), piece), fused)

    def sweep(self, fn: Callable[[torch.Tensor, Piece], T]) -> list[T]:
        """Compute every piece once, in order, and return fn's results in that order."""
        return [fn(self(piece), piece) for piece in self.grid]

    def total(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Sum of fn(piece) over the tensor, in the order of the pieces; a scalar zero for an empty tensor.

        fn should return float64, or integers, in a tensor of its own: the sum is kept in the first one.
        """
        result: torch.Tensor | None = None
        for piece in self.grid:
            part = fn(self(piece))
            result = part if result is None else result.add_(part)
        return torch.zeros(()) if result is None else result

    def gather(self) -> torch.Tensor:
        """All pieces side by side: the whole tensor, [n] or [K, n]. For tensors that are meant to be in memory."""
        pieces = self.sweep(lambda values, _: values)
        return torch.cat(pieces, dim=-1) if pieces else self(Piece(0, 0, 0))
