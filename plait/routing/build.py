"""From a plan to a routed model: which layers are routed, what the file holds, and every tensor's numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.decide import TensorPlan
from plait.digests import digest
from plait.dtypes import from_torch, to_torch
from plait.engine import Engine
from plait.errors import CheckpointError, MachineError, RecipeError
from plait.methods.block import Block
from plait.methods.routed import EmrRoute, MlpRoute, SmileRoute, SwitchRoute, TwinRoute
from plait.models.families import family_of
from plait.plan import Plan
from plait.routing.experts import Looked, form, look, parts_of, scales
from plait.routing.layout import WEIGHTS, Layout, dumped
from plait.routing.model import ROUTERS, router_shapes
from plait.routing.skeleton import memory_names, skeleton
from plait.routing.stores import Store
from plait.shards import ShardFile, lay_out
from plait.sources.base import TensorSpec
from plait.state import State, load_state
from plait.units import show_bytes
from plait.writer import FolderWriter

STATE_PREFIX = "router/"


@dataclass(frozen=True)
class Place:
    """A routed parameter: its layer in memory, its name there, and how its experts are stored."""

    layer: str
    parameter: str
    store: Store

    @property
    def base(self) -> str:
        """The base's values in the file."""
        return f"{self.layer}.base.{self.parameter}"

    @property
    def experts(self) -> str:
        """Prefix of the experts' tensors in the file."""
        return f"{self.layer}.experts.{self.parameter.replace('.', '/')}"


@dataclass
class Build:
    """A routed model to be."""

    plan: Plan
    engine: Engine
    layout: Layout
    names: dict[str, str]
    """Tensor of the plan → its name in memory."""
    places: dict[str, Place]
    """Tensor of the plan → where its experts go; for those that are routed."""
    routers: dict[str, Tensor]
    scale: Tensor | None
    surveyed: Any
    shared: State | None
    notes: list[str] = field(default_factory=list)

    def outputs(self, tensor: TensorPlan) -> list[TensorSpec]:
        """What one tensor of the plan becomes."""
        place = self.places.get(tensor.name)
        if place is None:
            return [TensorSpec(self.names[tensor.name], tensor.shape, tensor.dtype)]
        return [TensorSpec(place.base, tensor.shape, tensor.dtype), *place.store.specs(place.experts)]

    def tensors(self) -> list[TensorPlan]:
        """Those of the plan that the architecture has."""
        return [tensor for tensor in self.plan.tensors if tensor.name in self.names]

    def shards(self) -> list[ShardFile]:
        """The file to be. One, whatever its size: it is read by our own loader."""
        specs = [spec for tensor in self.tensors() for spec in self.outputs(tensor)]
        for name, value in self.routers.items():
            specs.append(TensorSpec(name, tuple(value.shape), from_torch(value.dtype)))
        return lay_out(specs, 1 << 62, {"format": "pt"}, WEIGHTS.removesuffix(".safetensors"))

    def write(self, writer: FolderWriter) -> None:
        """Every tensor that the writer does not have yet."""
        plan, engine = self.plan, self.engine
        todo = [t for t in self.tensors() if not all(spec.name in writer.done for spec in self.outputs(t))]
        plain = [tensor for tensor in todo if tensor.name not in self.places]
        engine.merge(
            plan.method, plain, plan.recipe.seed, self.surveyed, writer, self.shared,
            {tensor.name: self.names[tensor.name] for tensor in plain},
        )  # fmt: skip
        routed = [whole(tensor) for tensor in todo if tensor.name in self.places]
        engine.progress.stage("experts", sum(tensor.bytes_in for tensor in routed))

        def job(tensor: TensorPlan) -> None:
            for name, value in self._parts(tensor).items():
                writer.write(name, 0, value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            for spec in self.outputs(tensor):
                writer.finish(spec.name)
            engine.progress.advance(tensor.bytes_in)

        engine.each(routed, job)
        for name, value in self.routers.items():
            writer.write(name, 0, value.contiguous().view(-1).view(torch.uint8).numpy().data)
            writer.finish(name)

    def _parts(self, tensor: TensorPlan) -> dict[str, Tensor]:
        place = self.places[tensor.name]
        block = self.engine.block(tensor, self.plan.recipe.seed, self.surveyed, self.shared)
        merged = _merged(self.plan, tensor, block) if _on_shared(self.plan.route) else None
        base = block.base.gather() if merged is None else merged
        parts = parts_of(block, place.store, merged, self.plan.route, self.scale)
        stored = {f"{place.experts}.{name}": value for name, value in place.store.encode(parts).items()}
        return {place.base: base.to(to_torch(tensor.dtype)), **stored}


def whole(tensor: TensorPlan) -> TensorPlan:
    """The same tensor, in one piece."""
    return dataclasses.replace(tensor, scope="tensor")


def _merged(plan: Plan, tensor: TensorPlan, block: Block) -> Tensor:
    return plan.method.fn(block, **tensor.keywords).gather()


def _on_shared(route: Any) -> bool:
    """Whether experts are what they have beyond the merged model, and not beyond the base."""
    return isinstance(route, TwinRoute)


def prepare(plan: Plan, engine: Engine, learned: State | None) -> Build:
    """Look at the experts, choose the layers, and lay out the model. `learned` has the routers; None: untrained ones.

    Raises CheckpointError where the architecture is not known, or nothing in it can be routed.
    """
    assert plan.base is not None
    if plan.recipe.slices is not None:
        raise RecipeError(f"{plan.recipe.where('slices')}: a routed model keeps the base's layers; use models:")
    label = plan.base.label
    family = family_of(plan.config, label)
    architecture = str((plan.config.get("architectures") or [""])[0])
    if not architecture:
        raise CheckpointError(f"{label}: config.json names no architectures; add the transformers class of the base")
    body = skeleton(plan.config, architecture, label)
    names = memory_names(body, plan.config, [tensor.name for tensor in plan.tensors], label)
    shared = _shared_state(plan)
    surveyed = engine.survey(plan.method, plan.merged, plan.recipe.seed)
    looks = _look(plan, engine, surveyed, shared)
    changed = {t.name: names[t.name] for t in plan.merged if t.name in names and looks[t.name].changed}
    hosts, notes = _hosts(body, changed, family.unrouted)
    left = [tensor.name for tensor in plan.tensors if tensor.name not in names]
    if left:
        notes.append(f"{len(left)} tensor(s) are not part of {architecture} and are left out: {', '.join(left[:3])}")
    mlps = family.mlps(body)
    groups, chosen = _choose(plan.route, mlps, hosts, body)
    if not chosen:
        raise CheckpointError(
            f"{plan.method.name}: no expert changes a layer that it routes, so there is nothing to route; check that "
            "base and experts belong together, or merge with a static method"
        )
    places = {}
    tasks = [model.name for model in plan.models]
    by_name = {tensor.name: whole(tensor) for tensor in plan.merged}
    for name in chosen:
        layer, parameter = hosts[name]
        linear = type(body.get_submodule(layer)) in (nn.Linear, nn.Embedding)
        block = engine.block(by_name[name], plan.recipe.seed)
        places[name] = Place(layer, parameter, form(block, linear, plan.route, looks[name]))
    layers: dict[str, dict[str, Store]] = {layer: {} for group in groups for layer in group}
    for place in places.values():
        layers.setdefault(place.layer, {})[place.parameter] = place.store
    layout = Layout(
        plan.method.name, str(plan.config["model_type"]), architecture, tasks, _router(plan.route, body), layers,
        groups,
    )  # fmt: skip
    scale = None
    if isinstance(plan.route, EmrRoute):
        sizes = {tensor.name: tensor.spec.numel for tensor in plan.merged}
        scale = scales({name: looks[name] for name in places}, sizes, plan.route, len(tasks))
    routers = _routers(layout, body, learned, plan)
    return Build(plan, engine, layout, names, places, routers, scale, surveyed, shared, notes)


def _shared_state(plan: Plan) -> State | None:
    given = plan.recipe.shared
    if not isinstance(given, Mapping) or "state" not in given:
        return None
    state = load_state(plan.recipe.folder / str(given["state"]))
    tasks = [model.name for model in plan.models]
    if state.facts["tasks"] != tasks:
        raise RecipeError(
            f"{plan.recipe.where('shared')}: {state.folder} was learned for the experts "
            f"{', '.join(state.facts['tasks'])}, but the recipe has {', '.join(tasks)}"
        )
    return state


def _look(plan: Plan, engine: Engine, surveyed: Any, shared: State | None) -> dict[str, Looked]:
    """One pass over everything: what changed, and what layouts depend on."""
    tensors = [whole(tensor) for tensor in plan.merged]
    need = max((tensor.working_bytes() for tensor in tensors), default=0)
    if need > engine.memory:
        raise MachineError(
            f"--memory {show_bytes(engine.memory)} is too little: {plan.method.name} needs whole tensors of all "
            f"experts, so at least --memory {-(-need // 10**6)}MB"
        )
    energy = isinstance(plan.route, TwinRoute) and plan.route.energy is not None
    engine.progress.stage("look", sum(tensor.bytes_in for tensor in tensors))

    def job(tensor: TensorPlan) -> Looked:
        block = engine.block(tensor, plan.recipe.seed, surveyed, shared)
        found = look(block, _merged(plan, tensor, block) if energy else None, plan.route)
        engine.progress.advance(tensor.bytes_in)
        return found

    return dict(zip([tensor.name for tensor in tensors], engine.each(tensors, job), strict=True))


_TABLE = 1 << 20
"""Entries up to which an embedding may be every sample's own."""


def _too_large(module: nn.Module) -> bool:
    return type(module) is nn.Linear or sum(value.numel() for value in module.parameters()) > _TABLE


def _hosts(
    body: nn.Module, changed: Mapping[str, str], unrouted: tuple[str, ...]
) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Changed tensor → (layer, parameter in it): the innermost module, or the outermost small one around it."""
    owners = {name: memory.rpartition(".")[::2] for name, memory in changed.items()}
    modules = dict(body.named_modules())
    plain = {name for name, module in modules.items() if type(module) in (nn.Linear, nn.Embedding)}
    fixed = {name for name in plain if _too_large(modules[name])}

    def small(layer: str) -> bool:
        start = f"{layer}." if layer else ""
        return layer != "" and not any(name.startswith(start) for name in fixed)

    roots = sorted({layer for layer, _ in owners.values() if layer not in plain and small(layer)}, key=len)
    hosts, loose = {}, []
    for name, (layer, parameter) in owners.items():
        root = next((root for root in roots if layer == root or layer.startswith(f"{root}.")), None)
        if root is not None:
            hosts[name] = (root, f"{layer.removeprefix(root).lstrip('.')}.{parameter}".lstrip("."))
        elif layer in plain and not layer.endswith(unrouted or ("\0",)):
            hosts[name] = (layer, parameter)
        else:
            loose.append(name)
    notes = []
    if loose:
        notes.append(
            f"{len(loose)} tensor(s) are of no layer that is called with samples, so they are merged and not routed: "
            f"{', '.join(loose[:3])}"
        )
    return hosts, notes


def _choose(
    route: Any, mlps: list[list[str]], hosts: Mapping[str, tuple[str, str]], body: nn.Module
) -> tuple[list[list[str]], list[str]]:
    """Layers by group, and the tensors that are routed."""
    changed = {layer for layer, _ in hosts.values()}
    if isinstance(route, MlpRoute):
        groups = [group for group in mlps[route.first_layer :] if changed.intersection(group)]
        inside = {layer for group in groups for layer in group}
        return groups, [name for name, (layer, _) in hosts.items() if layer in inside]
    if isinstance(route, SmileRoute):
        linear = [
            layer
            for layer in sorted(changed)
            if type(body.get_submodule(layer)) is nn.Linear and (layer, "weight") in hosts.values()
        ]
        return [[layer] for layer in linear], [name for name, (layer, _) in hosts.items() if layer in linear]
    return [], list(hosts)


def _router(route: Any, body: Any) -> dict[str, Any]:
    if isinstance(route, MlpRoute):
        return {"kind": "layers", "depth": route.depth, "init": route.init, "shared": route.shared_router}
    if isinstance(route, SmileRoute):
        return {"kind": "subspace", "directions": route.directions, "top": route.top}
    if isinstance(route, SwitchRoute) and not route.router:
        return {"kind": "task"}
    top = route.top if isinstance(route, TwinRoute) else 1
    return {"kind": "features", "width": int(body.config.hidden_size), "top": top}


def _routers(layout: Layout, body: Any, learned: State | None, plan: Plan) -> dict[str, Tensor]:
    """The routers' tensors by their names in the file: learned, or as they start."""
    widths = {place: body.get_submodule(group[0]).in_features for place, group in enumerate(layout.groups)}
    modules = router_shapes(layout, widths)
    if learned is not None:
        values = {}
        for name, expected in modules.state_dict().items():
            value = learned.tensor(STATE_PREFIX + name)
            if value is None or value.shape != expected.shape:
                raise CheckpointError(
                    f"{learned.folder}: its routers are of another form than the recipe's route: asks for (at "
                    f"'{name}'); fit again"
                )
            values[f"{ROUTERS}.{name}"] = value
        return values
    generator = torch.Generator().manual_seed(plan.recipe.seed)
    for module in modules.values():
        found: Any = module
        if layout.router["kind"] == "layers":
            found.reset(float(layout.router["init"]), generator)
        else:
            found.reset(generator)
    return {f"{ROUTERS}.{name}": value for name, value in modules.state_dict().items()}


def write_folder(build: Build, out: Path) -> None:
    """The model alone, to be worked with; it has no heads and no provenance."""
    shards = build.shards()
    with FolderWriter(out, digest(shards[0].header.hex()), shards, overwrite=False) as writer:
        build.write(writer)
        writer.add_file("config.json", dumped(build.layout.config(build.plan.config)))
        writer.commit()
