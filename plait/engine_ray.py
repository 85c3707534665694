"""The same jobs on the machines of a Ray cluster, over storage that all of them share.

The driver lays the files out, keeps the journal and gives the result its name. A task is a group of tensors of like
bytes: its worker plans the recipe itself (once a process), reads by span, merges, and writes at final offsets into the
driver's files. So nothing but names goes through Ray, and a task that is done twice, because its worker
died, writes the same bytes twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.decide import TensorPlan
from plait.engine import Engine, keep_freed_memory
from plait.errors import MachineError, PlaitError, RecipeError
from plait.kernels.native import loops
from plait.methods.contract import MergeMethod
from plait.plan import Plan, make_plan
from plait.recipe import Recipe
from plait.shards import ShardFile
from plait.stages import Progress
from plait.state import load_state
from plait.units import show_bytes
from plait.writer import FolderWriter

if TYPE_CHECKING:
    from plait.state import State

_TASKS_PER_CPU = 16
"""Enough that no processor waits long for the last task; fewer where a task would be less than the next figure."""
_LEAST_BYTES = 64_000_000
"""Read by a task: at a GB a second it is far longer than the milliseconds that Ray takes to hand one out."""
_RETRIES = 5
_STATE_LIMIT = 64_000_000
"""Bytes of a survey's result that every worker is sent."""


@dataclass(frozen=True)
class _Work:
    """What a worker must know to plan and merge as the driver would."""

    recipe: Recipe
    key: str
    folder: str
    memory: int
    seed: int
    state: bytes
    """The survey's result, pickled."""


class RayEngine(Engine):
    """Merges on a cluster; what else there is to do (surveys, fits) is done by the threads of this machine."""

    here = False

    def __init__(
        self, plan: Plan, address: str | None, *, threads: int, memory: int, device: str, progress: Progress
    ) -> None:
        if plan.method.dynamic is not None:
            raise RecipeError(
                f"--engine ray: {plan.method.name} makes a routed model, which one machine writes; remove --engine"
            )
        if device != "cpu":
            raise RecipeError(f"--engine ray: works on processors, not on {device}; remove --device or --engine")
        try:
            import ray  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise MachineError("--engine ray: Ray is not installed; pip install 'plait[ray]'") from None
        super().__init__(threads=threads, memory=memory, device=device, progress=progress)
        self._ray: Any = ray
        self._plan, self._address, self._started = plan, address, False

    def _connected(self) -> Any:
        """Ray: at the address or RAY_ADDRESS, where the program is connected already, or on a cluster of its own."""
        if not self._ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            place: dict[str, Any] = {"address": self._address}
            if self._address is None and "RAY_ADDRESS" not in os.environ:  # as set inside of a Ray job
                place = {
                    "address": "local",
                    "num_cpus": self.threads,
                    "include_dashboard": False,
                    "object_store_memory": 1 << 27,
                }
            try:
                self._ray.init(**place, log_to_driver=False, logging_level="error")
            except Exception as error:
                raise MachineError(f"--engine ray: no cluster at {self._address or 'this machine'}: {error}") from None
            self._started = True
        return self._ray

    def close(self) -> None:
        """Leave the cluster, if this engine has joined it; one of this machine alone ends with that."""
        if self._started:
            self._ray.shutdown()
            self._started = False

    def merge(
        self, method: MergeMethod, tensors: list[TensorPlan], seed: int, state: Any, writer: FolderWriter,
        learned: State | None = None, names: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """As the local engine's; `names` is for routed models and must be None."""
        assert names is None
        ray = self._connected()
        sent = ray.cloudpickle.dumps(state)
        if len(sent) > _STATE_LIMIT:
            raise RecipeError(
                f"--engine ray: with these parameters {method.name} keeps {show_bytes(len(sent))} of its survey in "
                "memory, which is not sent to every machine; remove --engine"
            )
        work = ray.put(_Work(self._plan.recipe, plan_key(self._plan), os.getcwd(), self.memory, seed, sent))
        target = ray.put(
            _Target(
                writer.partial.resolve(), list(writer.shards.values()), ray.get_runtime_context().get_node_id(),
                None if learned is None else learned.folder.resolve(),
            )
        )  # fmt: skip
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        task = ray.remote(num_cpus=1, max_retries=_RETRIES)(_merge_group)
        self.progress.stage("merge", sum(tensor.bytes_in for tensor in tensors))
        waiting = {
            task.remote(work, target, [tensor.name for tensor in group]): group
            for group in grouped(tensors, cpus * _TASKS_PER_CPU)
        }
        try:
            while waiting:
                for reference in ray.wait(list(waiting), num_returns=1)[0]:
                    group = waiting.pop(reference)
                    self._result(reference)
                    for tensor in group:
                        writer.finish(tensor.name)
                    self.progress.advance(sum(tensor.bytes_in for tensor in group))
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)

    def _result(self, reference: Any) -> None:
        """Raise what the task raised."""
        try:
            self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, PlaitError):
                raise error.cause from None
            raise
        except self._ray.exceptions.RayError as error:
            raise MachineError(
                f"--engine ray: a task failed {_RETRIES + 1} times, each time with its worker "
                f"({str(error).splitlines()[0]}); run the same command again to go on, with a smaller --memory if "
                "machines ran out of it"
            ) from None


def plan_key(plan: Plan) -> str:
    """The same on two machines that mean the same by a recipe: version of Plait, recipe, and headers of every model."""
    headers = {model.label: model.source.header_hashes() for model in plan.opened()}
    return hashlib.sha256(json.dumps([version("plait"), plan.recipe.canonical(), headers]).encode()).hexdigest()


def grouped(tensors: list[TensorPlan], count: int) -> list[list[TensorPlan]]:
    """About `count` groups of like bytes in the order given, or fewer; the largest first."""
    share = max(_LEAST_BYTES, sum(tensor.bytes_in for tensor in tensors) // count)
    groups: list[list[TensorPlan]] = []
    filled = share
    for tensor in tensors:
        if filled + tensor.bytes_in > share:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.bytes_in
    return sorted(groups, key=lambda group: -sum(tensor.bytes_in for tensor in group))


# What follows runs in a worker.


@dataclass(frozen=True)
class _Target:
    """Where a merge writes to, and the state that it applies."""

    partial: Path
    shards: list[ShardFile]
    home: str
    """The driver's node."""
    learned: Path | None


class _Joined(FolderWriter):
    """Files that the driver has laid out, filled in from another process; the journal is the driver's."""

    def __init__(self, target: _Target, names: list[str]) -> None:
        super().__init__(target.partial, "", target.shards, overwrite=True)
        self.partial, self._names = target.partial, names

    def __enter__(self) -> _Joined:
        try:
            for name in sorted({self._where[tensor][0] for tensor in self._names}):
                self._files[name] = os.open(self.partial / name, os.O_RDWR)
        except OSError as error:
            self._close()
            raise MachineError(
                f"{self.partial}: {socket.gethostname()} cannot write there ({error.strerror}); with --engine ray the "
                "output must be on storage that all machines share, under the same path"
            ) from None
        return self

    def finish(self, tensor: str) -> None:
        """Nothing: the driver notes what is done when the whole task is."""

    def sync(self) -> None:
        """Make what was written durable."""
        for descriptor in self._files.values():
            os.fdatasync(descriptor)


class _Quiet:
    """A worker shows nothing."""

    def stage(self, name: str, total: int, unit: str = "bytes") -> None: ...

    def advance(self, count: int) -> None: ...

    def note(self, text: str) -> None: ...


_PLANS: dict[str, tuple[Plan, Engine]] = {}
"""The plan that this worker has made, by its key."""


def _planned(work: _Work) -> tuple[Plan, Engine]:
    if work.key not in _PLANS:
        keep_freed_memory()
        if os.path.isdir(work.folder):  # a recipe's relative paths may start at the driver's
            os.chdir(work.folder)
        plan = make_plan(work.recipe)
        if plan_key(plan) != work.key:
            raise MachineError(
                f"--engine ray: {socket.gethostname()} has another version of Plait, or other files under the paths of "
                "the recipe; all machines must share both"
            )
        loops(plan.bytes_in)  # compiled now if this machine has not: a single task may be too small to ask for it
        _PLANS.clear()
        _PLANS[work.key] = plan, Engine(threads=1, memory=work.memory, device="cpu", progress=_Quiet())
    return _PLANS[work.key]


def _merge_group(work: _Work, target: _Target, names: list[str]) -> None:
    import ray  # pyright: ignore[reportMissingImports]

    plan, engine = _planned(work)
    chosen = set(names)
    tensors = [tensor for tensor in plan.tensors if tensor.name in chosen]
    learned = load_state(target.learned) if target.learned is not None else None
    with _Joined(target, names) as writer:
        engine.merge(plan.method, tensors, work.seed, pickle.loads(work.state), writer, learned)
        if ray.get_runtime_context().get_node_id() != target.home:  # the driver's own machine syncs before the rename
            writer.sync()
    if learned is not None:
        learned.close()
