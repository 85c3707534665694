"""Where a routed model sent its inputs: which experts every task's samples were mixed from, and how often rightly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.evaluate.results import Routing, TaskResult
from plait.models.answers import AnswerNet
from plait.models.net import Net


class Record:
    """Collects the weights of every batch."""

    def __init__(self, net: Net, tasks: Sequence[str]) -> None:
        self._routing: Any = net.body.routing
        self._net, self._tasks = net, tasks
        self._sums: dict[str, dict[str, Tensor]] = {task: {} for task in tasks}
        self._chosen: dict[str, dict[int, int]] = {task: {} for task in tasks}

    @classmethod
    def of(cls, net: Net, tasks: Sequence[str]) -> Record | None:
        """A record for a model that routes by its input; None for all others."""
        routing = getattr(net.body, "routing", None)
        return None if routing is None or routing.kind == "task" else cls(net, tasks)

    def add(self, places: Mapping[str, Sequence[int]], picked: Sequence[tuple[str, int]], fan: bool) -> None:
        """The weights of the batch that was answered last. `places`: task → where its samples stand in the batch.

        `fan`: a sample stands there once for every answer that it may have.
        """
        weights = {name: value.detach().float().cpu() for name, value in self._routing.weights().items()}
        mean = torch.stack(list(weights.values())).mean(0)
        for task, at in places.items():
            if fan and isinstance(self._net, AnswerNet):
                at = at[:: len(self._net.answers[task])]
            rows = [row for name, row in picked if name == task]
            for name, value in weights.items():
                part = value[at].double().sum(0)
                self._sums[task][name] = self._sums[task].get(name, torch.zeros_like(part)) + part
            for row, k in zip(rows, mean[at].argmax(1).tolist(), strict=True):
                self._chosen[task][row] = k

    def result(self, results: Mapping[str, TaskResult]) -> Routing | None:
        """What was found, beside the scores of the same samples."""
        tasks = [task for task in self._tasks if self._chosen[task]]
        if not tasks:
            return None
        experts = self._routing.layout.tasks
        routes = sorted(self._sums[tasks[0]], key=_place)
        weights, chosen, right, blind = {}, {}, {}, {}
        for task in tasks:
            count = len(self._chosen[task])
            weights[task] = [(self._sums[task][name] / count).tolist() for name in routes]
            picked = np.array([self._chosen[task][row] for row in sorted(self._chosen[task])])
            chosen[task] = np.bincount(picked, minlength=len(experts)).tolist()
            if task in experts:
                own = picked == experts.index(task)
                right[task] = float(own.mean())
                found = results[task]
                if found.metric == "accuracy":
                    hits = np.array(found.predictions) == np.array(found.labels)
                    blind[task] = float((hits & own).mean())
        return Routing(experts=experts, routes=routes, weights=weights, chosen=chosen, right=right, blind=blind)


def _place(route: str) -> tuple[int, str]:
    number = route.rpartition(" ")[2]
    return (int(number) if number.isdigit() else -1, route)
