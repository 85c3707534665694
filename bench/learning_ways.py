"""The ways to take one learning step that bench/learning_step.py compares; each runs in a process of its own.

ours     plait.learn: one forward and backward of the merged model, then weight gradients against mapped task vectors
sum      autograd through theta0 + sum_k lambda_k tau_k as the authors write it, all task vectors in memory
product  the same with one matrix product per tensor in place of the sum
one      forward and backward of one model with weight gradients: what no way can do without

The process takes commands on stdin (`step`, `save PATH`) and answers each with a line of JSON. The optimiser's update,
the same in all ways, is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import hashlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from plait.engine import Engine
from plait.learn.bench import Workbench
from plait.learn.coefficients import Coefficients
from plait.learn.concrete import ConcreteTaskArithmetic
from plait.learn.data import Inputs
from plait.learn.objectives import entropy
from plait.learn.vectors import TaskVectors
from plait.methods.learned import concrete
from plait.models.net import Batch, Net
from plait.plan import Plan, make_plan
from plait.recipe import load_recipe
from plait.run import Silent
from plait.suites.places import load_suite

METHODS = {"adamerging": "adamerging", "mask": "concrete_task_arithmetic"}
_SEED, _DRAW = 0, 0
Rows = dict[str, list[int]]
_times: defaultdict[str, float] = defaultdict(float)
"""Of the step that runs: its seconds, and processor seconds of it and of its parts."""


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Adds up the processor seconds of what happens inside under this name."""
    begin = time.process_time()
    yield
    _times[name] += time.process_time() - begin


class Way(Protocol):
    """One way to take a step."""

    def step(self, rows: Rows) -> None:
        """Find the gradients of one batch."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """Those that the last step found."""
        ...


class TimedBench(Workbench):
    """Setting weights is a part of merging."""

    def install(self, name: str, values: Tensor) -> None:
        with part("merge"):
            super().install(name, values)


class OurCoefficients(Coefficients):
    """AdaMerging as plait.learn does it."""

    def step(self, rows: Rows) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.pull(rows)

    def weights(self, name: str) -> Tensor:
        with part("merge"):
            return super().weights(name)

    def _collect(self, name: str, gradient: Tensor) -> None:
        with part("products"):
            super()._collect(name, gradient)

    def gradients(self) -> dict[str, Tensor]:
        assert self.lambdas.grad is not None
        return {"lambdas": self.lambdas.grad}


class OurMask(ConcreteTaskArithmetic):
    """The Concrete mask as plait.learn does it."""

    def step(self, rows: Rows) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        with part("merge"):
            self.mask.draw(_DRAW)
        self.bench.gradients(rows, self.loss, self._merged, self._collect)

    def _merged(self, name: str) -> Tensor:
        with part("merge"):
            return super()._merged(name)

    def _collect(self, name: str, gradient: Tensor) -> None:
        with part("products"):
            super()._collect(name, gradient)

    def gradients(self) -> dict[str, Tensor]:
        return {name: x.grad for name, x in self.mask.logits.items() if x.grad is not None}


class Scores(torch.nn.Module):
    """The net as a module, so that functional_call can put other weights in."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.body, self._net = net.body, net

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self._net.scores(batch)


class Plain:
    """Autograd through the merge; base and task vectors in memory."""

    def __init__(self, bench: Workbench, vectors: TaskVectors, options: Any, product: bool, masked: bool) -> None:
        self.bench, self.options, self.product = bench, options, product
        self.names = [name for name in vectors.names if name in bench.places]
        self.taus = {name: vectors.rows(name).clone() for name in self.names}
        self.bases = {name: bench.places[name].detach() for name in self.names}
        self.scores = Scores(bench.net)
        own = {id(parameter): name for name, parameter in self.scores.named_parameters(remove_duplicate=False)}
        self.own = {name: own[id(bench.places[name])] for name in self.names}
        shape = (len(self.names), len(vectors.tasks))
        self.lambdas = torch.full(shape, options.init) if masked else start(shape).requires_grad_()
        self.logits = {name: torch.zeros(self.taus[name].shape[1]).requires_grad_() for name in self.names if masked}

    def step(self, rows: Rows) -> None:
        self.lambdas.grad = None
        for logits in self.logits.values():
            logits.grad = None
        with part("merge"):
            weights = {self.own[name]: self.merged(name, place) for place, name in enumerate(self.names)}
        batch = self.bench.inputs.collate(self.bench.net, rows)
        outputs = functional_call(self.scores, weights, (batch,))
        torch.stack([entropy(outputs[task]) for task in rows]).sum().backward()

    def merged(self, name: str, place: int) -> Tensor:
        taus, weights = self.taus[name], self.lambdas[place]
        if self.product:
            total = weights @ taus
        else:
            total = torch.zeros(())
            for weight, tau in zip(weights, taus, strict=True):
                total = total + weight * tau
        if self.logits:
            mask = concrete(self.logits[name], noise(name, taus.shape[1]), self.options.concrete)
            total = total * (mask / mask.mean())
        return self.bases[name] + total.view(self.bases[name].shape)

    def gradients(self) -> dict[str, Tensor]:
        leaves = self.logits or {"lambdas": self.lambdas}
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


class One:
    """A training step of one model, without an optimiser."""

    def __init__(self, bench: Workbench, names: list[str]) -> None:
        self.bench, self.names = bench, bench.learn(names)

    def step(self, rows: Rows) -> None:
        for name in self.names:
            self.bench.places[name].grad = None
        outputs = self.bench.net.scores(self.bench.inputs.collate(self.bench.net, rows))
        torch.stack([entropy(outputs[task]) for task in rows]).sum().backward()

    def gradients(self) -> dict[str, Tensor]:
        return {}


def start(shape: tuple[int, int]) -> Tensor:
    """Coefficients [granules, K] at which all ways take their gradients."""
    return 0.1 + 0.4 * torch.rand(shape, generator=torch.Generator().manual_seed(0))


def noise(name: str, size: int) -> Tensor:
    """The uniform numbers of `Mask.draw`, which all ways must share."""
    key = hashlib.sha256(f"{_SEED}\0{_DRAW}\0{name}".encode()).digest()
    return torch.rand(size, generator=torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True)))


def plan_of(method: str, base: str, experts: dict[str, str], images: int) -> Plan:
    """The plan of a fit whose batch goes through the model at once."""
    models = [{"model": path, "name": name} for name, path in experts.items()]
    recipe = {"merge_method": METHODS[method], "base_model": base, "models": models, "fit": {"forward": images}}
    return make_plan(load_recipe(recipe))


def way_of(name: str, method: str, plan: Plan, inputs: Inputs, work: Path, threads: int) -> Way:
    """A way, ready for its first step."""
    engine = Engine(threads=threads, memory=512_000_000, device="cpu", progress=Silent())
    bench = TimedBench(plan, engine, inputs, plan.fit)
    assert plan.method.learned is not None
    file = work / f"{name}.bin"
    vectors = TaskVectors(plan, engine, file, plan.method.learned.vectors)
    if name == "ours":
        if method == "mask":
            return OurMask(bench, vectors, plan.fit, lambda task, out, rows: entropy(out), seed=_SEED)
        made = OurCoefficients(bench, vectors, plan.fit, lambda task, out, rows: entropy(out))
        made.set_values({"lambdas": start((made.lambdas.shape[0], made.lambdas.shape[1]))})
        return made
    found = (
        One(bench, vectors.names) if name == "one"
        else Plain(bench, vectors, plan.fit, product=name == "product", masked=method == "mask")
    )  # fmt: skip
    file.unlink()
    return found


def main() -> None:
    """Get ready, then do what stdin says."""
    parser = argparse.ArgumentParser()
    for option in ("way", "method", "suite", "base", "experts", "work"):
        parser.add_argument(f"--{option}", required=True)
    for option in ("images", "threads"):
        parser.add_argument(f"--{option}", type=int, required=True)
    given = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    sys.stdout = sys.stderr  # nothing but answers on the pipe
    torch.set_num_threads(given.threads)
    plan = plan_of(given.method, given.base, json.loads(given.experts), given.images)
    inputs = Inputs(load_suite(given.suite), "adapt", seed=0)
    way = way_of(given.way, given.method, plan, inputs, Path(given.work), given.threads)
    rows = inputs.batch(0, given.images // len(inputs.tasks))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what getting ready has freed is not the step's
    print("{}", file=answers)
    for command in map(str.split, sys.stdin):
        _times.clear()
        if command[0] == "save":
            torch.save(way.gradients(), command[1])
        else:
            begin = time.perf_counter()
            with part("all"):
                way.step(rows)
            _times["step"] = time.perf_counter() - begin
        print(json.dumps(_times), file=answers)


if __name__ == "__main__":
    main()
