"""RegMean (arXiv:2212.09849) and RegMean++ (arXiv:2508.03121): Linear layers by least squares on activations.

With X_k [n, in] the inputs of a layer, G_k = X_kᵀX_k/n with off-diagonals times a, and τ_k = W_k − W_0:
Wᵀ = W_0ᵀ + (Σ_k G_k)⁻¹ Σ_k G_k τ_kᵀ. Every other tensor is the mean of the experts. Only the two sums are kept, for as
many layers at once as the memory budget holds, so memory does not depend on the number of experts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plait.learn.bench import Workbench, chunks
from plait.learn.vectors import TaskVectors
from plait.methods.fitted import RegressionFit
from plait.methods.granules import granule_of
from plait.methods.matrices import is_matrix
from plait.models.net import Batch

_RIDGE = 1e-10
"""Share of the mean diagonal of Σ_k G_k that pulls towards the mean: it decides only where no input reaches."""
_OWN_STATES = re.compile(r"decoder\.(?!.*EncDecAttention\.[kv]$)")
"""Layers of a text-to-text model that read what the decoder has so far, and not the encoder's states."""


class Activations:
    """Adds up XᵀX of some Linear layers while a model runs, and ends the run when all of them have been called."""

    def __init__(self, modules: Mapping[str, tuple[str, nn.Linear]], calls: Sequence[str]) -> None:
        """`modules`: module → (key of its weight, layer). `calls`: modules as one forward calls them."""
        self.grams: dict[str, Tensor] = {}
        self.rows: Counter[str] = Counter()
        self._modules = modules
        self._awaited = sum(name in modules for name in calls)
        self._left = 0
        self._inputs: Mapping[str, Tensor] = {}

    @torch.no_grad()
    def run(self, bench: Workbench, batch: Batch) -> None:
        """One forward."""
        self._inputs, self._left = batch.inputs, self._awaited
        hooks = [layer.register_forward_pre_hook(self._hook(name)) for name, (_, layer) in self._modules.items()]
        try:
            bench.outputs(batch)
        except _AllSeenError:
            pass
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            key = self._modules[name][0]
            x = without_padding(args[0], name, self._inputs).float()  # [n, in]
            gram = (x.T @ x).double()
            self.grams[key] = self.grams[key].add_(gram) if key in self.grams else gram
            self.rows[key] += len(x)
            self._left -= 1
            if not self._left:
                raise _AllSeenError

        return add


class _AllSeenError(Exception):
    """Raised inside a forward whose rest nobody needs."""


def without_padding(x: Tensor, name: str, inputs: Mapping[str, Tensor]) -> Tensor:
    """[n, tokens, in] → [real tokens, in]; [n, in], and images, which have no padding, as they are."""
    mask = inputs.get("attention_mask")
    if mask is not None and "targets" in inputs and _OWN_STATES.match(name):
        mask = inputs["targets"] >= 0
    if mask is None or x.ndim != 3:
        return x.reshape(-1, x.shape[-1])
    return x[mask.bool()]


class Regression:
    """The Linear layers that some expert changes, and their least squares."""

    def __init__(self, bench: Workbench, vectors: TaskVectors, options: RegressionFit) -> None:
        self.bench, self.vectors, self.options = bench, vectors, options
        self.inputs = bench.inputs.some(options.inputs)
        keys = {id(bench.places[key]): key for key in vectors.names if key in bench.places}
        self.modules: dict[str, tuple[str, nn.Linear]] = {}
        for name, layer in bench.net.body.named_modules():
            key = keys.get(id(layer.weight)) if isinstance(layer, nn.Linear) else None
            if key is not None and is_matrix(key, vectors.shape(key)):
                assert isinstance(layer, nn.Linear)
                self.modules[name] = (key, layer)
        self.calls = self._order()
        self.keys = list(dict.fromkeys(self.modules[name][0] for name in self.calls))

    @torch.no_grad()
    def _order(self) -> list[str]:
        """The layers as one forward calls them."""
        calls: list[str] = []

        def note(name: str) -> Callable[..., None]:
            return lambda module, args: calls.append(name)

        hooks = [layer.register_forward_pre_hook(note(name)) for name, (_, layer) in self.modules.items()]
        task = self.vectors.tasks[0]
        self.bench.outputs(self.bench.inputs.collate(self.bench.net, {task: self.inputs[task][:1]}))
        for hook in hooks:
            hook.remove()
        return calls

    def solve(self, keys: Sequence[str], prepare: Callable[[int], None]) -> dict[str, Tensor]:
        """Δ [out, in] of some layers. `prepare` sets the model for the inputs of expert k."""
        found = {}
        for part in self._parts(keys):
            sums: dict[str, tuple[Tensor, Tensor]] = {}
            for k, task in enumerate(self.vectors.tasks):
                prepare(k)
                for key, gram in self._grams(part, task).items():
                    tau = self._matrix(key, self.vectors.rows(key)[k])
                    if key not in sums:
                        sums[key] = gram, gram @ tau.T
                    else:
                        sums[key][0].add_(gram)
                        sums[key][1].addmm_(gram, tau.T)
            for key, (gram, pull) in sums.items():
                mean = self._matrix(key, self.vectors.rows(key).mean(0))
                found[key] = least_squares(gram, pull, mean).float().contiguous()
        return found

    def _grams(self, keys: Sequence[str], task: str) -> dict[str, Tensor]:
        """G of some layers on one task's inputs, [in, in] float64."""
        wanted = set(keys)
        seen = Activations({name: item for name, item in self.modules.items() if item[0] in wanted}, self.calls)
        for part in chunks({task: self.inputs[task]}, self.options.batch):
            seen.run(self.bench, self.bench.inputs.collate(self.bench.net, part))
            self.bench.engine.progress.advance(len(part[task]))
        return {key: shrunk(gram / seen.rows[key], self.options.off_diagonal) for key, gram in seen.grams.items()}

    def _matrix(self, key: str, values: Tensor) -> Tensor:
        return values.to(self.bench.net.device, torch.float64).view(self.vectors.shape(key))

    def _parts(self, keys: Sequence[str]) -> Iterator[list[str]]:
        """Layers whose Gram matrices and sums fit into the budget together, one at least."""
        part: list[str] = []
        held = 0
        for key in keys:
            out, width = self.vectors.shape(key)
            size = 8 * width * (2 * width + 2 * out)
            if part and held + size > self.bench.engine.memory:
                yield part
                part, held = [], 0
            part.append(key)
            held += size
        if part:
            yield part

    def passes(self, groups: Sequence[Sequence[str]]) -> int:
        """Inputs that go through the model, counted once for every time."""
        return sum(map(len, self.inputs.values())) * sum(len(list(self._parts(group))) for group in groups)


def shrunk(gram: Tensor, share: float) -> Tensor:
    """Off-diagonals times `share`."""
    diagonal = gram.diagonal().clone()
    gram *= share
    gram.diagonal().copy_(diagonal)
    return gram


def least_squares(gram: Tensor, pull: Tensor, mean: Tensor) -> Tensor:
    """Δ [out, in] from Σ_k G_k [in, in], Σ_k G_k τ_kᵀ [in, out] and the mean τ [out, in], float64."""
    ridge = _RIDGE * gram.diagonal().mean()
    if not ridge > 0:  # no input but zeros
        return mean
    whole = gram.clone()
    whole.diagonal().add_(ridge)
    return torch.linalg.solve(whole, pull + ridge * mean.T).T


def regmean(bench: Workbench, vectors: TaskVectors, options: RegressionFit) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Task vectors of the Linear layers, and facts: every expert as it is."""
    fit = Regression(bench, vectors, options)
    bench.engine.progress.stage("regmean", fit.passes([fit.keys]), "inputs")
    found = fit.solve(fit.keys, lambda k: bench.install_expert(vectors.tasks[k]))
    return found, _facts(fit)


def regmean_pp(
    bench: Workbench, vectors: TaskVectors, options: RegressionFit
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same, layer by layer: the layers before are the merged model's, the layer at hand is the expert's."""
    fit = Regression(bench, vectors, options)
    names = [name for name in vectors.names if name in bench.places]
    layers = {granule_of(key, "layer"): [] for key in fit.keys}
    for key in fit.keys:
        layers[granule_of(key, "layer")].append(key)
    bench.engine.progress.stage("regmean_pp", fit.passes(list(layers.values())), "inputs")
    found: dict[str, Tensor] = {}

    def install(name: str, delta: Tensor) -> None:
        bench.install(name, vectors.base(name) + delta.reshape(-1).cpu())

    for name in names:
        install(name, vectors.rows(name).mean(0))
    for layer, keys in layers.items():
        own = [name for name in names if granule_of(name, "layer") == layer]

        def prepare(k: int, own: list[str] = own) -> None:
            for name in own:
                install(name, vectors.rows(name)[k])

        found |= fit.solve(keys, prepare)
        for name in own:
            install(name, found[name] if name in found else vectors.rows(name).mean(0))
    return found, _facts(fit)


def _facts(fit: Regression) -> dict[str, Any]:
    return {"inputs": {task: len(rows) for task, rows in fit.inputs.items()}, "linear_layers": len(fit.keys)}
