"""Runs a plan's jobs on this machine's threads. A job is one tensor: it reads its pieces, merges and writes them.

Jobs do not depend on each other, and a job's bytes depend on nothing but its plan, so any engine may run them anywhere
in any order.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from plait.ahead import ReadAhead
from plait.decide import TensorPlan
from plait.dtypes import itemsize, to_torch
from plait.errors import CheckpointError, MachineError
from plait.experts import Input
from plait.kernels import once
from plait.kernels.fused import Raw, Stored
from plait.kernels.job import CODES, F32
from plait.kernels.native import Loops, loops
from plait.kernels.worker import Worker, too_large
from plait.lazy import torch
from plait.methods.block import Block, Reader, as_float
from plait.methods.contract import MergeMethod
from plait.methods.stream import GRAIN, Grid, Piece
from plait.nonfinite import as_they_are, finite, put_back, set_apart
from plait.sources.adapter import AdapterSource
from plait.sources.safetensors import SafetensorsSource
from plait.stages import Progress
from plait.surveyed import Surveyed
from plait.threads import workers
from plait.writer import FolderWriter

R = TypeVar("R")


class Engine:
    """Threads, a memory budget, and a device."""

    here = True
    """Whether this machine writes everything: then what is written can be read back at once."""

    def __init__(
        self, *, threads: int, memory: int, device: str, progress: Progress, allow_nonfinite: bool = False
    ) -> None:
        self.threads, self.memory, self.progress = threads, memory, progress
        self.check = as_they_are if allow_nonfinite else finite
        self.allow_nonfinite = allow_nonfinite
        self.device = device
        if device != "cpu":
            _check_device(device)
        self._loops: Loops | None = None
        self._own = threading.local()
        """What belongs to one thread: its worker for the compiled loops."""
        self._free = memory
        self._room = threading.Condition()
        self._stop = threading.Event()

    def survey(self, method: MergeMethod, tensors: list[TensorPlan], seed: int) -> Any:
        """Run the method's pass over the whole model, if it has one."""
        if method.survey is None or not tensors:
            return None
        self._find_loops(tensors)
        return method.survey(Surveyed(self, tensors, seed))

    def merge(
        self, method: MergeMethod, tensors: list[TensorPlan], seed: int, state: Any, writer: FolderWriter,
        learned: Any = None, names: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Merge or copy every tensor into the writer. `state` is the survey's result, `learned` a fit's.

        `names` says what a tensor is called in the file, where not by its own name.
        """

        def job(tensor: TensorPlan) -> None:
            name = names[tensor.name] if names is not None else tensor.name
            if tensor.action == "copy":
                self._copy(tensor, name, writer)
            else:
                self._merge(method, tensor, self.block(tensor, seed, state, learned), name, writer)
            writer.finish(name)

        self._find_loops(tensors)
        self.progress.stage("merge", sum(tensor.bytes_in for tensor in tensors))
        self.each(tensors, job)

    def _find_loops(self, tensors: list[TensorPlan]) -> None:
        if self.device == "cpu":
            self._loops = loops(sum(tensor.bytes_in for tensor in tensors))

    def _raw(self, tensor: TensorPlan) -> Raw | None:
        """The stored bytes of a tensor for the compiled loops; None where one input is not as they read it."""
        if self._loops is None or tensor.dtype not in CODES or self.allow_nonfinite:
            return None
        if not hasattr(self._own, "worker"):
            self._own.worker = Worker(self._loops, min(1 << 26, self.memory // (4 * self.threads)))
        models = [stored(item) or low_rank(item, tensor.base, self._own.worker) for item in tensor.inputs]
        base = None if tensor.base is None else stored(tensor.base)
        whole = [item for item in models if item is not None]
        if len(whole) < len(models) or (base is None and tensor.base is not None):
            return None
        return Raw(self._own.worker, whole, base, CODES[tensor.dtype])

    def each(self, tensors: list[TensorPlan], job: Callable[[TensorPlan], R]) -> list[R]:
        """job of every tensor, results in the order given; the first error stops all."""
        self._stop.clear()
        # Large tensors first, so that no thread is left alone with one at the end; the rest in file order.
        large = sum(t.spec.numel for t in tensors) // (8 * self.threads) + 1
        order = sorted(range(len(tensors)), key=lambda i: (tensors[i].spec.numel < large, i))
        results: dict[int, R] = {}

        def run(index: int) -> None:
            ahead.begun()
            if self._stop.is_set():
                return
            try:
                with self._holding(tensors[index].working_bytes()):
                    results[index] = job(tensors[index])
            except BaseException:
                self._stop.set()
                raise

        with ReadAhead([tensors[index] for index in order]) as ahead, workers(self.threads) as pool:
            futures = [pool.submit(run, index) for index in order]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()
                for future in futures:
                    future.cancel()
        self._stop.clear()
        errors = [error for future in done if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, _StoppedError)):
            raise error
        return [results[index] for index in range(len(tensors))]

    def block(self, tensor: TensorPlan, seed: int, state: Any = None, learned: Any = None) -> Block:
        """The block of one merged tensor, reading from its sources."""
        readers = [self._reader(item, tensor, tensor.base) for item in tensor.inputs]
        block = Block(
            name=tensor.key,
            shape=tensor.shape,
            tasks=tuple(item.model for item in tensor.inputs),
            grid=tensor.grid,
            read_models=[whole for whole, _ in readers],
            read_base=None if tensor.base is None else self._reader(tensor.base, tensor, None)[0],
            read_deltas=[stored for _, stored in readers],
            depth=tensor.depth,
            seed=seed,
            state=state,
            learned=learned,
            raw=self._raw(tensor),
        )
        return set_apart(block) if self.allow_nonfinite else block

    def _reader(self, item: Input, tensor: TensorPlan, base: Input | None) -> tuple[Reader, Reader | None]:
        """Readers of the whole tensor, and of its task vector where the base is what the adapter sits on."""

        def whole(piece: Piece) -> torch.Tensor:
            if self._stop.is_set():
                raise _StoppedError
            if item.update is None:
                values = as_float(item.read(piece.start, piece.stop))
            else:
                assert item.under is not None
                values = as_float(item.under.read(piece.start, piece.stop)) + item.task_vector(piece.start, piece.stop)
            return self.check(values, item, tensor, piece).to(self.device)

        def stored(piece: Piece) -> torch.Tensor:
            return self.check(item.task_vector(piece.start, piece.stop), item, tensor, piece).to(self.device)

        return whole, stored if on_base(item, base) else None

    def _merge(self, method: MergeMethod, tensor: TensorPlan, block: Block, name: str, writer: FolderWriter) -> None:
        merged = method.fn(block, **tensor.keywords)
        width = itemsize(tensor.dtype)
        share = tensor.bytes_in / max(tensor.grid.numel, 1)
        if merged.fused is not None and merged.fused.combine is not None and block.raw is not None:
            once.merge(merged.fused, _Output(self, writer, name, width, share))
            return
        dtype = to_torch(tensor.dtype)
        for piece in tensor.grid:
            values = merged(piece).to(dtype)
            if tensor.dtype == "F16" and not torch.isfinite(values).all():
                raise too_large(tensor.name)
            if block.lost is not None:
                values = put_back(values, block.lost(piece))
            writer.write(name, piece.start * width, _bytes(values))
            self.progress.advance(int(piece.numel * share))

    def begin(self) -> None:
        """Raise where another job has failed."""
        if self._stop.is_set():
            raise _StoppedError

    def _copy(self, tensor: TensorPlan, name: str, writer: FolderWriter) -> None:
        source, *others = tensor.inputs
        if not others and source.dtype == tensor.dtype and isinstance(source.source, SafetensorsSource):
            self._copy_bytes(tensor, source.source.filler(source.stored), name, writer)
            return
        dtype, width = to_torch(tensor.dtype), itemsize(tensor.dtype)
        for piece in Grid(tensor.spec.numel, GRAIN * 2):
            if self._stop.is_set():
                raise _StoppedError
            values = source.read(piece.start, piece.stop)
            for other in others:
                if not torch.equal(values, other.read(piece.start, piece.stop)):
                    raise CheckpointError(
                        f"{other.model}: '{tensor.name}' ({other.dtype}) differs from {source.model}'s; tensors "
                        f"that are not floating cannot be merged; keep: {{base: [{tensor.name}]}} takes the base's"
                    )
            writer.write(name, piece.start * width, _bytes(values.to(dtype)))
            self.progress.advance(piece.numel * itemsize(source.dtype) * (1 + len(others)))

    def _copy_bytes(
        self, tensor: TensorPlan, read: Callable[[int, memoryview], None], name: str, writer: FolderWriter
    ) -> None:
        width = itemsize(tensor.dtype)
        buffer = memoryview(bytearray(min(GRAIN * 2, tensor.spec.numel) * width))
        for piece in Grid(tensor.spec.numel, GRAIN * 2):
            if self._stop.is_set():
                raise _StoppedError
            part = buffer[: piece.numel * width]
            read(piece.start, part)
            writer.write(name, piece.start * width, part)
            self.progress.advance(len(part))

    @contextmanager
    def _holding(self, size: int) -> Iterator[None]:
        """Wait until the budget has room for a job of `size` bytes."""
        size = min(size, self.memory)
        with self._room:
            self._room.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._room:
                self._free += size
                self._room.notify_all()


@dataclass
class _Output:
    """Where the loops put one tensor."""

    engine: Engine
    writer: FolderWriter
    name: str
    width: int
    share: float
    """Bytes of input behind an entry."""
    begun: int = 0

    def begin(self, piece: Piece) -> None:
        self.engine.begin()
        if piece.index >= self.begun:  # not what is merged anew
            self.begun += 1
            self.engine.progress.advance(int(piece.numel * self.share))

    def write(self, piece: Piece, data: memoryview) -> None:
        self.writer.write(self.name, piece.start * self.width, data)

    def read(self, piece: Piece, data: memoryview) -> None:
        self.writer.read(self.name, piece.start * self.width, data)


class _StoppedError(Exception):
    """Raised inside jobs when another job has failed."""


def keep_freed_memory() -> None:
    """Tell the C library not to hand every freed buffer back: pieces are allocated and freed without end.

    Saves almost a quarter of the time of TIES (docs/LOG.md). It changes the whole process: for our own only.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc
    if mallopt is not None:
        trim_threshold, mmap_threshold, never = -1, -3, 1 << 30
        mallopt(trim_threshold, never)
        mallopt(mmap_threshold, never)


def stored(item: Input) -> Stored | None:
    """An input as the compiled loops read it, or None where they cannot."""
    if item.update is not None or item.dtype not in CODES or not isinstance(item.source, SafetensorsSource):
        return None
    return Stored(CODES[item.dtype], itemsize(item.dtype), item.source.filler(item.stored))


def low_rank(item: Input, base: Input | None, worker: Worker) -> Stored | None:
    """An adapter's version of a tensor as the loops read it: multiplied out in float32 where it is read."""
    if item.update is None or item.under is None or not isinstance(item.source, AdapterSource):
        return None
    under = stored(item.under)
    if under is None:
        return None
    product = partial(worker.product, *item.source.factors(item.update.target), item.update.scale)
    return Stored(F32, 4, partial(product, under), partial(product, None) if on_base(item, base) else None)


def on_base(item: Input, base: Input | None) -> bool:
    """Whether an adapter sits on the very tensor that task vectors are taken from."""
    under = item.under
    return under is not None and base is not None and under.source is base.source and under.stored == base.stored


def _bytes(values: torch.Tensor) -> memoryview:
    return values.cpu().contiguous().view(torch.uint8).numpy().data


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise MachineError(f"--device {device}: torch knows no such device; use cpu, cuda or cuda:1") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise MachineError(f"--device {device}: torch finds no CUDA device here; use --device cpu")
