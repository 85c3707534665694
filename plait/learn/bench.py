"""The model of a fit: weights go in, outputs and weight gradients come out. It knows nothing of methods.

The gradient of anything that decides about the weights follows from the weights' own gradient, so no graph runs through
the merge: one forward, one backward, and then a pass over the task vectors by whoever asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from plait.engine import Engine
from plait.errors import CheckpointError, RecipeError
from plait.learn.data import Inputs
from plait.methods.learned import Fit
from plait.methods.routed import IdentityFit
from plait.models.answers import AnswerNet
from plait.models.net import Batch, Net, load_net
from plait.models.outfit import outfit, pooling_of
from plait.names import align
from plait.plan import Plan
from plait.renames import in_memory_names

Loss = Callable[[str, Tensor, Sequence[int]], Tensor]
"""(task, its outputs in the batch, the rows) → mean loss."""


class Workbench:
    """The base's model with its tasks' heads, whose weights can be set tensor by tensor."""

    def __init__(self, plan: Plan, engine: Engine, inputs: Inputs, options: Fit) -> None:
        assert plan.base is not None
        self.plan, self.engine, self.inputs, self.options = plan, engine, inputs, options
        folder, suite = plan.base.source.folder, inputs.suite
        net = load_net(
            folder, plan.base.label, processor_from=folder, pooling=pooling_of(suite), max_length=suite.max_length,
            device=str(engine.device),
        )  # fmt: skip
        inputs.check(net)
        net.body.requires_grad_(False)
        self.net = net if inputs.pairs else outfit(net, suite, inputs.classes())
        for task, answers in self.net.answers.items() if isinstance(self.net, AnswerNet) else ():
            if not answers and not isinstance(options, IdentityFit):  # whose input it is, a prompt alone tells
                raise RecipeError(
                    f"{suite.where('tasks', task)}: its answers are written (exact_match), and learning compares the "
                    "likelihoods of given ones; add answers:, or merge the other tasks' experts"
                )
        self._tensors = {tensor.key: tensor for tensor in plan.merged}
        self.places = places(self.net, plan)
        self._learned: list[str] = []

    def learn(self, names: Iterable[str]) -> list[str]:
        """Say whose gradients are wanted; gives those that the model has at all."""
        self._learned = [name for name in names if name in self.places]
        if not self._learned:
            raise CheckpointError(
                f"{self.plan.base.label if self.plan.base else ''}: no merged tensor takes part in the forward pass of "
                f"{type(self.net.body).__name__}, so nothing can be learned; check that base and experts belong "
                "together"
            )
        for name in self._learned:
            self.places[name].requires_grad_(True)
        return self._learned

    @torch.no_grad()
    def install(self, name: str, values: Tensor) -> None:
        """Set one tensor of the model, from flat values."""
        place = self.places[name]
        place.copy_(values.view(place.shape))

    def load_base(self) -> None:
        """Set all weights to the base's."""
        for name, tensor in self._tensors.items():
            if name in self.places:
                block = self.engine.block(tensor, self.plan.recipe.seed)
                self.install(name, torch.cat([block.base(piece).float() for piece in tensor.grid]))

    def install_expert(self, task: str) -> None:
        """Set all weights to one expert's own."""
        k = [model.name for model in self.plan.models].index(task)
        for name, tensor in self._tensors.items():
            if name in self.places:
                block = self.engine.block(tensor, self.plan.recipe.seed)
                self.install(name, torch.cat([block.read_models[k](piece).float() for piece in tensor.grid]))

    @torch.no_grad()
    def answers(self, rows: Mapping[str, Sequence[int]], size: int = 128) -> dict[str, Tensor]:
        """Outputs [rows, classes] of every task as the weights now are, without gradients."""
        found: dict[str, list[Tensor]] = {task: [] for task in rows}
        for part in chunks(rows, size):
            batch = self.inputs.collate(self.net, part)
            for task, values in self.outputs(batch).items():
                found[task].append(values.float())
        return {task: torch.cat(parts) for task, parts in found.items()}

    @torch.no_grad()
    def features(self, rows: Mapping[str, Sequence[int]], size: int = 128) -> dict[str, Tensor]:
        """What every task's head reads [rows, width] as the weights now are, without gradients."""
        found: dict[str, list[Tensor]] = {task: [] for task in rows}
        for part in chunks(rows, size):
            batch = self.inputs.collate(self.net, part)
            with self._precision():
                features = self.net.features(batch).float()
            for task, at in batch.rows.items():
                found[task].append(features[at])
        return {task: torch.cat(parts) for task, parts in found.items()}

    def expert_answers(self, rows: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Every task's own expert on its own rows."""
        self.engine.progress.stage("the experts' answers", len(rows), "experts")
        found = {}
        for task, listed in rows.items():
            self.install_expert(task)
            found.update(self.answers({task: listed}))
            self.engine.progress.advance(1)
        return found

    def gradients(
        self,
        rows: Mapping[str, Sequence[int]],
        loss: Loss,
        weights: Callable[[str], Tensor],
        pull: Callable[[str, Tensor], None],
    ) -> dict[str, float]:
        """One step: set the weights, go forward and backward, hand every tensor's gradient [n] to `pull`.

        Gives the loss of every task. Tasks that do not fit into one forward are done one after another.
        """
        for name in self._learned:
            self.install(name, weights(name))
            self.places[name].grad = None
        values: dict[str, float] = {}
        for part in packed(rows, self.options.forward):
            batch = self.inputs.collate(self.net, part)
            terms = {task: loss(task, out, part[task]) for task, out in self.outputs(batch).items()}
            total = torch.stack(list(terms.values())).sum()
            if not torch.isfinite(total):
                return {task: float(term.detach()) for task, term in terms.items()}
            total.backward()
            values.update({task: float(term.detach()) for task, term in terms.items()})
        for name in self._learned:
            gradient = self.places[name].grad
            if gradient is not None:
                pull(name, gradient.detach().reshape(-1).float())
            self.places[name].grad = None
        return values

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """Scores of every task, or features where pairs are compared."""
        with self._precision():
            if not self.inputs.pairs:
                return self.net.scores(batch)
            features = self.net.features(batch)
            return {task: features[at] for task, at in batch.rows.items()}

    def _precision(self) -> torch.autocast:
        half = self.options.precision == "bfloat16"
        return torch.autocast(self.net.device.type, torch.bfloat16, enabled=half)


def chunks(rows: Mapping[str, Sequence[int]], size: int) -> Iterable[dict[str, Sequence[int]]]:
    """Rows cut into parts of at most `size`, task after task."""
    for task, listed in rows.items():
        for at in range(0, len(listed), size):
            yield {task: listed[at : at + size]}


def packed(rows: Mapping[str, Sequence[int]], size: int) -> Iterable[dict[str, Sequence[int]]]:
    """Whole tasks together, as many as fit into `size` inputs: a task's loss may compare its inputs."""
    part: dict[str, Sequence[int]] = {}
    for task, listed in rows.items():
        if part and sum(map(len, part.values())) + len(listed) > size:
            yield part
            part = {}
        part[task] = listed
    yield part


def places(net: Net, plan: Plan) -> dict[str, Any]:
    """Key of every merged tensor → the parameter of the loaded model that it is.

    transformers renames tensors when it loads; that each was found is proved by its values, which must be the base's.
    """
    assert plan.base is not None
    keys = {tensor.name: tensor.key for tensor in plan.merged}
    memory = in_memory_names(plan.base.config, list(keys))
    spelled = {memory.get(name, name): key for name, key in keys.items()}
    have = dict(net.body.named_parameters(remove_duplicate=False)) | dict(net.body.named_buffers())
    found = align(list(have), list(spelled), type(net.body).__name__, plan.base.label)
    result = {}
    pairs = {own: spelled[name] for own, name in found.names.items()}
    # What stands beside the body, such as lm_head, lacks the prefix under which the body's names were found.
    pairs |= {name: key for name, key in keys.items() if name in have and key not in pairs.values()}
    for own, key in pairs.items():
        place = have[own]
        item = plan.base.find(key)
        if item is None or not place.is_floating_point():
            continue
        stored = item.read(0, place.numel()).to(place.device, place.dtype)
        if tuple(item.shape) != tuple(place.shape) or not torch.equal(stored.view(place.shape), place):
            raise CheckpointError(
                f"{plan.base.label}: '{key}' is not what transformers loads as '{own}'; this architecture's names "
                "cannot be matched, so nothing can be learned on it"
            )
        result[key] = place
    return result
