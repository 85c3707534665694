"""A checkpoint seen through another vocabulary: its vocabulary-sized tensors have the rows of the target, in its order.

Rows are gathered when a span is read, so a remapped embedding costs no more memory than any other tensor.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from plait.dtypes import FLOATS, to_torch, widest
from plait.errors import CheckpointError
from plait.lazy import np
from plait.sources import files
from plait.sources.base import Source, TensorSpec

if TYPE_CHECKING:
    import torch

_INPUTS = re.compile(
    r"(^|\.)(embed_tokens|wte|shared|word_embeddings|embed_in|tok_embeddings|token_embedding|tokens_embed)\.weight$"
)
_OUTPUTS = re.compile(
    r"((^|\.)(lm_head|lm_head\.decoder|embed_out|predictions\.decoder|vocab_projector|generator_lm_head)|^decoder)"
    r"\.(weight|bias)$|(^|\.)predictions\.bias$"
)
LACKING = -1
"""In an index: the model has no row for this one of the target's."""


def is_vocabulary(spec: TensorSpec, rows: int) -> bool:
    """Whether a tensor has one row (or one bias) a token, by its name and its length."""
    known = _INPUTS.search(spec.name) or _OUTPUTS.search(spec.name)
    return bool(known) and spec.dtype in FLOATS and spec.shape[:1] == (rows,)


def embedding_rows(source: Source) -> int:
    """Rows of the input embedding; where there are several, of the one that config.json speaks of."""
    found = [spec.shape[0] for name, spec in sorted(source.specs.items()) if _INPUTS.search(name) and spec.shape]
    if not found:
        raise CheckpointError(
            f"{source.label}: has no token embedding under a known name (embed_tokens, wte, shared, …), so its "
            "vocabulary cannot be matched; leave tokenizer_source out"
        )
    size = vocabulary_size(source.config)
    return size if size in found else found[0]


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """vocab_size, which models of several parts keep in text_config."""
    text = config.get("text_config")
    found = config.get("vocab_size", text.get("vocab_size") if isinstance(text, Mapping) else None)
    return found if type(found) is int else None


@dataclass(frozen=True, eq=False)
class Holder:
    """One stored tensor, by the rows of the target vocabulary."""

    source: Source
    stored: str
    index: np.ndarray
    """Target row → own row, or LACKING."""

    @property
    def spec(self) -> TensorSpec:
        """The tensor as stored."""
        return self.source.specs[self.stored]

    def has(self, row: int) -> bool:
        """Whether the model has a value for this row of the target."""
        return self.index[row] != LACKING

    def part(self, row: int, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the row that stands at `row` in the target."""
        first = int(self.index[row]) * _width(self.spec)
        return self.source.read(self.stored, first + start, first + stop)


@dataclass(frozen=True, eq=False)
class Fill:
    """The rows that a model lacks: the base's, so that its task vector is zero there.

    What the base lacks too is the mean over the models that have it, and then the base has that mean as well. What no
    model has is zero.
    """

    base: Holder | None
    others: Sequence[Holder]
    """In canonical order: a sum of floats depends on it."""

    def dtype(self, own: str) -> str:
        """Type in which a tensor stored as `own` is read, so that it can hold the base's rows exactly."""
        return own if self.base is None else widest([own, self.base.spec.dtype])

    def part(self, row: int, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of target row `row`."""
        import torch

        if self.base is not None and self.base.has(row):
            return self.base.part(row, start, stop)
        having = [holder for holder in self.others if holder.has(row)]
        exact = torch.float64 if any(holder.spec.dtype == "F64" for holder in having) else torch.float32
        total = torch.zeros(stop - start, dtype=exact)
        for holder in having:
            total += holder.part(row, start, stop).to(exact)
        total /= max(len(having), 1)
        return total if self.base is None else total.to(to_torch(self.base.spec.dtype))


@dataclass(frozen=True, eq=False)
class Rows:
    """How one tensor of the remapped checkpoint is made."""

    own: Holder
    fill: Fill


class Remapped:
    """A whole-model source in which some tensors have other rows; all else is the source's own."""

    def __init__(
        self, inner: Source, rows: Mapping[str, Rows], config: Mapping[str, Any], read_from: Mapping[str, str]
    ) -> None:
        self._inner, self._rows = inner, rows
        self._read_from = dict(read_from)
        self.label = inner.label
        self.folder = inner.folder
        self.extra_heads = inner.extra_heads
        self.config: Mapping[str, Any] = config
        self.specs: Mapping[str, TensorSpec] = {
            name: _reshaped(spec, rows[name]) if name in rows else spec for name, spec in inner.specs.items()
        }

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a tensor, flat, in the type of its spec."""
        if name not in self._rows:
            return self._inner.read(name, start, stop)
        import torch

        spec, rows = self.specs[name], self._rows[name]
        files.check_span(spec, start, stop)
        values = torch.empty(stop - start, dtype=to_torch(spec.dtype))
        width = _width(spec)
        for row, own, count in _runs(rows.own.index, start, stop, width):
            begin, end = max(start, row * width), min(stop, (row + count) * width)
            offset, length = begin - row * width, end - begin
            if own == LACKING:
                found = rows.fill.part(row, offset, offset + length)
            else:
                found = self._inner.read(name, own * width + offset, own * width + offset + length)
            values[begin - start : end - start] = found
        return values

    def fingerprint(self) -> str:
        """That of the checkpoint itself: a remapping is not a part of what it is."""
        return self._inner.fingerprint()

    def stamp(self) -> str:
        """Changes when a file is replaced or touched, and when the rows are others: work done is then of no use."""
        digest = hashlib.sha256(self._inner.stamp().encode())
        for name, rows in sorted(self._rows.items()):
            digest.update(name.encode() + rows.own.index.tobytes())
        return digest.hexdigest()

    def header_hashes(self) -> dict[str, str]:
        """Those of the checkpoint, and the tokenizer file its rows were matched by."""
        return {**self._inner.header_hashes(), **self._read_from}

    def close(self) -> None:
        """Close the checkpoint."""
        self._inner.close()


def _reshaped(spec: TensorSpec, rows: Rows) -> TensorSpec:
    dtype = rows.fill.dtype(spec.dtype) if bool((rows.own.index == LACKING).any()) else spec.dtype
    return replace(spec, shape=(len(rows.own.index), *spec.shape[1:]), dtype=dtype)


def _width(spec: TensorSpec) -> int:
    """Elements of a row."""
    return spec.numel // spec.shape[0] if spec.shape[0] else 0


def _runs(index: np.ndarray, start: int, stop: int, width: int) -> Iterator[tuple[int, int, int]]:
    """(target row, own row, count) of the rows that [start, stop) touches; rows that lie side by side are one run."""
    if start == stop:
        return
    first, last = start // width, -(-stop // width)
    own = index[first:last]
    cuts = np.flatnonzero((np.diff(own) != 1) | (own[:-1] == LACKING)) + 1
    bounds = [0, *cuts.tolist(), len(own)]
    for begin, end in pairwise(bounds):
        yield first + begin, int(own[begin]), end - begin
