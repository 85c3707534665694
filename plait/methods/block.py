"""What a method sees of one tensor: its name, the experts' values, the base's values, and its own random numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from plait.kernels.fused import Fused, Raw
from plait.kernels.job import DELTAS, MODELS
from plait.lazy import np, torch
from plait.methods import draws
from plait.methods.stream import Grid, Piece, Scope, Stream

Reader = Callable[[Piece], "torch.Tensor"]
"""Gives a piece of one tensor as flat float32 (float64 where the checkpoint is float64)."""


@dataclass
class Block:
    """One named tensor of K experts and, where there is one, of their base.

    `models` is a stream of [K, n], `base` of [n], `deltas` (task vectors, expert − base) of [K, n]. Experts come in
    canonical order, sorted by task name, so that sums do not depend on the order in a recipe.
    """

    name: str
    shape: tuple[int, ...]
    tasks: tuple[str, ...]
    grid: Grid
    read_models: Sequence[Reader]
    read_base: Reader | None = None
    read_deltas: Sequence[Reader | None] = ()
    """Per expert a reader of its task vector where that is what is stored (LoRA), else None: model − base."""
    depth: float = 0.0
    """0 for the first layer and what precedes it, 1 for the last and what follows it."""
    seed: int = 0
    state: Any = None
    """What the method's survey of the whole model found, if it has one."""
    learned: Any = None
    """What was learned before, for methods that learn (`plait.state.State`)."""
    raw: Raw | None = None
    """The stored bytes and the compiled loops that read them, where both are there."""
    lost: Reader | None = None
    """What the readers hide because it is no finite number, zero elsewhere; None where nothing may be hidden."""
    _held: tuple[int, torch.Tensor] | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        models: Sequence[torch.Tensor],
        base: torch.Tensor | None = None,
        *,
        name: str = "tensor",
        tasks: Sequence[str] | None = None,
        scope: Scope = "element",
        seed: int = 0,
        depth: float = 0.0,
    ) -> Block:
        """A block over tensors in memory, all of one shape."""
        shape = tuple(models[0].shape)
        for tensor in (*models, *([] if base is None else [base])):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: experts and base must have one shape, got {shape} and {tuple(tensor.shape)}")

        def reader(tensor: torch.Tensor) -> Reader:
            flat = as_float(tensor.detach()).reshape(-1)
            return lambda piece: flat[piece.start : piece.stop]

        return cls(
            name=name,
            shape=shape,
            tasks=tuple(tasks) if tasks is not None else tuple(f"expert{k}" for k in range(len(models))),
            grid=Grid.of(shape, scope),
            read_models=[reader(tensor) for tensor in models],
            read_base=None if base is None else reader(base),
            depth=depth,
            seed=seed,
        )

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """[..., n] → [..., rows, columns] by the last axis; whole rows are guaranteed in row and tensor scope."""
        return _fold_rows(values, self.shape[-1] if self.shape else 1)

    def units(self, values: torch.Tensor) -> torch.Tensor:
        """[..., n] → [..., units, n per unit] by the first axis: an output neuron or filter; one unit where 1-D."""
        return _fold_rows(values, self.grid.numel // self.shape[0] if len(self.shape) > 1 else self.grid.numel)

    @property
    def base(self) -> Stream:
        """The base's values, [n]."""
        return Stream(self.grid, self._base)

    @property
    def models(self) -> Stream:
        """The experts' values, [K, n]."""
        return Stream(self.grid, self._models, self._fused(MODELS))

    @property
    def deltas(self) -> Stream:
        """The task vectors, [K, n], in a fresh buffer that may be written into."""
        return Stream(self.grid, self._deltas, self._fused(DELTAS))

    def _fused(self, source: int) -> Fused | None:
        return None if self.raw is None else Fused(self, source)

    def _base(self, piece: Piece) -> torch.Tensor:
        # One piece is held back: a method asks for deltas and then for the base of the same piece.
        if self._held is None or self._held[0] != piece.index:
            assert self.read_base is not None, f"{self.name}: this method needs a base"
            self._held = (piece.index, self.read_base(piece))
        return self._held[1]

    def _delta_reader(self, k: int) -> Reader | None:
        return self.read_deltas[k] if self.read_deltas else None

    def _models(self, piece: Piece) -> torch.Tensor:
        rows = []
        for k, read in enumerate(self.read_models):
            stored = self._delta_reader(k)
            rows.append(read(piece) if stored is None else self._base(piece) + stored(piece))
        return torch.stack(rows)

    def _deltas(self, piece: Piece) -> torch.Tensor:
        base = self._base(piece)
        result = torch.empty((len(self.read_models), base.numel()), dtype=base.dtype, device=base.device)
        for k, read in enumerate(self.read_models):
            stored = self._delta_reader(k)
            if stored is None:
                torch.sub(read(piece), base, out=result[k])
            else:
                result[k] = stored(piece)
        return result

    def uniform(self, k: int, piece: Piece) -> torch.Tensor:
        """Uniform float32 numbers in [0, 1) for expert k, a function of (seed, tensor, task, position) alone."""
        return torch.from_numpy(
            draws.uniform(draws.key_of(self.seed, self.name, self.tasks[k]), piece.start, piece.stop)
        )

    def draw(self, purpose: str, piece: Piece) -> torch.Tensor:
        """Uniform float32 numbers in [0, 1), a function of (seed, tensor, purpose, position) alone.

        Philox 4×64 in counter mode: position p uses 32 of the 256 bits of counter p // 8, and keeps 24 of them.
        """
        identity = f"{self.seed}\0{self.name}\0{purpose}".encode()
        key = int.from_bytes(hashlib.blake2b(identity, digest_size=16).digest(), "little")
        first = piece.start // 8
        words = np.random.Philox(key=key, counter=first).random_raw(4 * (-(-piece.stop // 8) - first))
        halves = words.view(np.uint32)[piece.start - 8 * first :][: piece.numel]
        numbers = (halves >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
        return torch.from_numpy(numbers)


def _fold_rows(values: torch.Tensor, width: int) -> torch.Tensor:
    return values.reshape(*values.shape[:-1], -1, width) if width else values.unsqueeze(-1)


def as_float(tensor: torch.Tensor) -> torch.Tensor:
    """float32, or float64 where the input is float64: the arithmetic of every method."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.to(torch.float32)


def per_model(values: float | Sequence[float], k: int) -> list[float]:
    """One number per expert from a scalar or a sequence of K."""
    if isinstance(values, (int, float)):
        return [values] * k
    if len(values) != k:
        raise ValueError(f"expected one value for each of {k} experts, got {len(values)}")
    return list(values)
