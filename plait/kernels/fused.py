"""What a stream computes, said so that compiled loops can do it in one pass from the stored bytes to the output.

Methods are written for torch and stay readable; each stage says beside its function what it is (`described`). A chain
of stages that the loops know is run by them, any other by torch: the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from plait.kernels import job as J


@dataclass(frozen=True)
class Stored:
    """One model's version of a tensor, as it lies in its file."""

    code: int
    """Of the storage type (`job.CODES`)."""
    width: int
    """Bytes of an entry."""
    read: Callable[[int, memoryview], None]
    """(first entry, buffer): fill the buffer with the stored bytes from there."""
    own: Callable[[int, memoryview], None] | None = None
    """The same of the task vector, in the same type, where that is what there is: an adapter on the base."""


@dataclass(frozen=True)
class Raw:
    """The stored bytes behind a block, and the loops that read them."""

    worker: Any
    """This thread's `kernels.worker.Worker`."""
    models: Sequence[Stored]
    base: Stored | None
    out: int
    """Code of the output's storage type."""


@dataclass(frozen=True)
class Fused:
    """A chain of stages over a block's weights or task vectors."""

    block: Any
    """The `methods.block.Block`, whose `raw` is there."""
    source: int
    sparsify: int = J.NOTHING
    cuts: Sequence[Sequence[Any]] = ()
    """CUT: per expert (the cut below which all goes,) or (the cut above which all goes, the one below). SPREAD: one."""
    densities: Sequence[float] = ()
    divide: bool = False
    masks: Sequence[Any] = ()
    """MASKED: per piece [K, bytes] of packed bits; rows of experts that are kept whole are not looked at."""
    masked: Sequence[bool] = ()
    sums: Sequence[tuple[float, float]] = ()
    """MASKED: per expert Σ |v| over the tensor before and after."""
    mu: float = 0.0
    votes: int = 0
    factors: Sequence[float] = ()
    combine: int | None = None
    weights: Sequence[float] = ()
    normalize: bool = False
    divisor: float = 1.0
    zero_is_positive: bool = True
    scale: float | None = None
    on_base: bool = False

    @property
    def plain(self) -> bool:
        """Whether nothing but the variance has been made of what was stored."""
        return (self.sparsify == J.NOTHING or self._variance) and self.combine is None and not self.factors

    @property
    def rows(self) -> int:
        """Vectors there are before they are combined; variances are one."""
        return 1 if self._variance else len(self.block.tasks)

    @property
    def _variance(self) -> bool:
        return self.sparsify == J.SPREAD and not self.cuts


_ORDER = ("sparsify", "factors", "combine", "scale", "on_base")
"""The order of the loops' stages. A stage that comes twice, or too late, is left to torch."""


class Describable(Protocol):
    """A stream."""

    fused: Fused | None


def described(stream: Describable, **stage: Any) -> Fused | None:
    """The stream's description with one stage more, or None where the loops cannot do it."""
    fused = stream.fused
    if fused is None:
        return None
    (name,) = (key for key in _ORDER if key in stage)
    taken = [fused.sparsify != J.NOTHING, bool(fused.factors), fused.combine is not None, fused.scale is not None,
             fused.on_base]  # fmt: skip
    at = _ORDER.index(name)
    if any(taken[at:]) or (name in ("scale", "on_base") and fused.combine is None):
        return None
    if name == "factors" and fused.sparsify not in (J.CUT, J.DROP, J.MASKED):
        return None
    return replace(fused, **stage)
