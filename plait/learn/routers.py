"""Routers learned on a routed model as it will be: WEMoE's by what the model answers, Twin's by whose input it is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from plait.errors import CheckpointError
from plait.learn.bench import Loss, Workbench, chunks, packed
from plait.models.answers import AnswerNet
from plait.models.net import Net, Sample
from plait.models.outfit import question
from plait.plan import Plan
from plait.routing.build import STATE_PREFIX, prepare, write_folder
from plait.routing.files import from_pretrained
from plait.routing.model import ROUTERS, shared_features
from plait.routing.routers import FeatureRouter


def routed_net(bench: Workbench, plan: Plan, work: Path) -> Net:
    """The bench's net with the plan's routed model for a body; its routers are untrained.

    What the bench held of the base is let go.
    """
    folder = work / "model"
    if not folder.is_dir():
        write_folder(prepare(plan, bench.engine, None), folder)
    old = bench.net
    net = copy.copy(old)
    bench.places.clear()
    net.body = from_pretrained(folder, device=old.device)
    old.body = net.body
    bench.net = net
    return net


_FACT = "fact/"


class LayerRouters:
    """All routers of the layers, by gradients through the routed model."""

    def __init__(self, bench: Workbench, options: Any, loss: Loss) -> None:
        self.bench, self.options, self.loss = bench, options, loss
        self.body: Any = bench.net.body
        self.modules = getattr(self.body, ROUTERS)
        self.modules.requires_grad_(True)
        self.adam = torch.optim.Adam(self.modules.parameters(), lr=options.lr)
        self._weights: dict[str, float] = {}

    def step(self, index: int) -> dict[str, float]:
        """One batch of every task, one step of Adam; the rate falls along half a cosine."""
        rate = 0.5 * self.options.lr * (1 + math.cos(math.pi * index / self.options.steps))
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.zero_grad()
        rows = self.bench.inputs.batch(index, self.options.batch)
        values: dict[str, float] = {}
        own, other = [], []
        for part in packed(rows, self.options.forward):
            batch = self.bench.inputs.collate(self.bench.net, part)
            terms = {task: self.loss(task, out, part[task]) for task, out in self.bench.outputs(batch).items()}
            values.update({task: float(term.detach()) for task, term in terms.items()})
            total = torch.stack(list(terms.values())).sum()
            if not torch.isfinite(total):
                return values
            total.backward()
            mean = torch.stack([w.detach() for w in self.body.routing.weights().values()]).mean(0)
            for task, at in batch.rows.items():
                k = self.body.routing.index(task)
                share = mean[at].mean(0)
                own.append(float(share[k]))
                other.append(float((share.sum() - share[k]) / max(1, len(share) - 1)))
        self._weights = {"own_weight": float(np.mean(own)), "other_weight": float(np.mean(other))}
        self.adam.step()
        return values

    def values(self) -> dict[str, Tensor]:
        """The routers' parameters, and the facts of the step that led to them: a fit that goes on takes none again."""
        facts = {_FACT + name: torch.tensor(value, dtype=torch.float64) for name, value in self._weights.items()}
        return {**self._parameters(), **facts}

    def set_values(self, values: dict[str, Tensor]) -> None:
        """Go back to values of before."""
        self.modules.load_state_dict({name: value for name, value in values.items() if not name.startswith(_FACT)})
        self._weights = {
            name.removeprefix(_FACT): float(value) for name, value in values.items() if name.startswith(_FACT)
        }

    def optimisers(self) -> list[torch.optim.Optimizer]:
        """Adam."""
        return [self.adam]

    def show(self) -> None:
        """Nothing to set: the model is routed by what is learned."""

    def facts(self) -> dict[str, float]:
        """How far a sample's own expert is mixed in, and the mean of the others."""
        return self._weights

    def numbers(self) -> dict[str, Tensor]:
        """What goes into the state."""
        return {STATE_PREFIX + name: value.cpu().clone() for name, value in self._parameters().items()}

    def _parameters(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.modules.state_dict().items()}


def features_of(bench: Workbench, rows: Mapping[str, Sequence[int]], size: int) -> dict[str, Tensor]:
    """Task → what its router sees of the rows, [rows, d] float32."""
    net, inputs = bench.net, bench.inputs
    found: dict[str, list[Tensor]] = {task: [] for task in rows}
    body: Any = net.body
    for part in chunks(rows, size):
        ((task, listed),) = part.items()
        if isinstance(net, AnswerNet):  # the prompts alone, not one row for every possible answer
            values = [question(net, inputs.suite, task, inputs.splits[task], row) for row in listed]
            batch = Net.collate(net, [Sample(task, value) for value in values])
        else:
            batch = inputs.collate(net, part)
        body.routing.see(batch.inputs)
        found[task].append(shared_features(body, batch.inputs).float().cpu())
        bench.engine.progress.advance(len(listed))
    return {task: torch.cat(parts) for task, parts in found.items()}


def learn_identity(
    bench: Workbench, options: Any, seed: int, progress: Callable[[str], None]
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """A router from features to the task they are of; its numbers, facts and history.

    The epoch is kept that tells most watched inputs, and of those the one with the lowest loss.
    """
    body: Any = bench.net.body
    tasks, inputs = body.routing.layout.tasks, bench.inputs
    learn = {task: inputs.learn[task].tolist()[: options.inputs] for task in tasks}
    watch = {task: inputs.watch[task].tolist() for task in tasks}
    if not all(watch.values()):
        raise CheckpointError(
            "data: a router needs at least 4 inputs of every expert: some to learn from, some to watch"
        )
    bench.engine.progress.stage("features", sum(map(len, [*learn.values(), *watch.values()])), "inputs")
    x, y = _stacked(features_of(bench, learn, 64), tasks)
    held, truth = _stacked(features_of(bench, watch, 64), tasks)
    router = FeatureRouter(x.shape[1], len(tasks))
    router.load_state_dict(getattr(body, ROUTERS)["0"].state_dict())
    router.float()
    router.mean.copy_(x.mean(0))
    router.deviation.copy_(x.std(0).clamp_min(1e-6))
    adam = torch.optim.Adam(router.parameters(), lr=options.lr)
    best: tuple[float, float] = (-1.0, 0.0)
    kept: dict[str, Tensor] = {}
    history: dict[str, list[float]] = {"loss": [], "routed": [], "watched_loss": []}
    bench.engine.progress.stage("learn the router", options.epochs, "epochs")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for epoch in range(options.epochs):
            router.train()
            total = 0.0
            for at in torch.randperm(len(x)).split(options.batch):
                loss = cross_entropy(router(x[at]), y[at])
                adam.zero_grad()
                loss.backward()
                adam.step()
                total += float(loss.detach()) * len(at)
            router.eval()
            with torch.no_grad():
                scores = router(held)
            right = float((scores.argmax(1) == truth).float().mean())
            lost = float(cross_entropy(scores, truth))
            for key, value in (("loss", total / len(x)), ("routed", right), ("watched_loss", lost)):
                history[key].append(value)
            if (right, -lost) > best:
                best = (right, -lost)
                kept = {name: value.clone() for name, value in router.state_dict().items()}
                kept_epoch = epoch + 1
            bench.engine.progress.advance(1)
            progress(f"loss {history['loss'][-1]:.3f}, routed {right:.1%}")
    router.load_state_dict(kept)
    with torch.no_grad():
        chosen = router(held).argmax(1)
    confusion = {
        task: [int(((truth == k) & (chosen == other)).sum()) for other in range(len(tasks))]
        for k, task in enumerate(tasks)
    }
    summary = {"kept_epoch": kept_epoch, "routed": best[0], "confusion": confusion}
    numbers = {f"{STATE_PREFIX}0.{name}": value for name, value in kept.items()}
    return numbers, summary, history


def _stacked(features: Mapping[str, Tensor], tasks: Sequence[str]) -> tuple[Tensor, Tensor]:
    x = torch.cat([features[task] for task in tasks])
    y = torch.cat([torch.full((len(features[task]),), k) for k, task in enumerate(tasks)])
    return x, y
