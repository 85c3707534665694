"""A routed model in memory: an ordinary transformers model, some of whose layers mix experts for every sample."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import CheckpointError, RecipeError, nearest
from plait.routing.layers import Parts, Route, Routed, RoutedLinear, layer_for
from plait.routing.layout import Layout
from plait.routing.routers import (
    Context,
    FeatureRouter,
    Features,
    LayerGate,
    LayerRouter,
    SubspaceGate,
    token_mean,
)

Tasks = str | Sequence[str] | Tensor | None
ROUTERS = "routers"
"""The routed model's own modules stand under this name."""


class Routing:
    """The routes of a model, what decides them, and what it is told."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.context = Context()
        self.features: Features | None = None
        self.told: list[int] | None = None
        self.routes: dict[str, Route] = {}
        self._alone = False

    def route(self, name: str) -> Route:
        """The route of that name, made on first use."""
        return self.routes.setdefault(name, Route(name))

    @property
    def kind(self) -> str:
        """Of the router."""
        return str(self.layout.router["kind"])

    def index(self, task: str) -> int:
        """Place of a task. Raises RecipeError with the nearest known name."""
        if task not in self.layout.tasks:
            raise RecipeError(f"no expert is called '{task}'{nearest(task, self.layout.tasks)}")
        return self.layout.tasks.index(task)

    def tell(self, tasks: Tasks) -> list[int] | None:
        """Tasks as places; one for all samples, or one of every sample."""
        if tasks is None:
            return None
        if isinstance(tasks, Tensor):
            return [int(k) for k in tasks.flatten().tolist()]
        return [self.index(task) for task in ([tasks] if isinstance(tasks, str) else tasks)]

    def switched(self, told: list[int], device: torch.device) -> Tensor:
        """One-hot weights."""
        return torch.nn.functional.one_hot(torch.tensor(told, device=device), len(self.layout.tasks)).float()

    def see(self, given: Mapping[str, Any]) -> None:
        """Take note of which tokens are real. `routing_mask` names those that decide: a prompt's alone."""
        for name in ("routing_mask", "attention_mask"):
            mask = given.get(name)
            self.context.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
            if self.context.mask is not None:
                break
        self.context.decoder_mask = given.get("decoder_attention_mask")

    def weights(self) -> dict[str, Tensor]:
        """Route → [batch, K] of the last forward pass; the mean over tokens where every token has its own."""
        found = {name: route.last for name, route in self.routes.items() if route.last is not None}
        return {
            name: token_mean(value, self.context.mask) if value.ndim == 3 else value for name, value in found.items()
        }

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Whatever is decided first stays: every sequence is routed once, by its prompt."""
        for route in self.routes.values():
            route.weights, route.held = None, self.kind != "subspace"  # there every token has its own
        try:
            yield
        finally:
            for route in self.routes.values():
                route.held, route.weights = False, None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """The base alone: what a router by features looks at."""
        before = self._alone
        self._alone = True
        try:
            yield
        finally:
            self._alone = before

    @property
    def is_alone(self) -> bool:
        """Whether experts are left out now."""
        return self._alone


class RoutedMixin:
    """What a routed model has beside its architecture's own class."""

    routing: Routing
    saved_by: Any
    """Writes the model; whoever loaded it knows how."""

    def set_task(self, task: Tasks) -> None:
        """Say which expert answers: one name for all samples, one name of every sample, or None to forget it.

        Also for models with a router, whose choice it replaces. Raises RecipeError for an unknown task.
        """
        self.routing.told = self.routing.tell(task)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the architecture's own; every sequence is routed once, by its prompt."""
        with self.routing.holding():
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Write the folder that `plait.from_pretrained` loads. Options of transformers' own have no meaning here."""
        if kwargs.get("push_to_hub"):
            raise RecipeError("save_pretrained: a routed model is not pushed from here; upload its folder")
        self.saved_by(self, save_directory)


def make_routed(body: Any, layout: Layout, stored: Mapping[str, Tensor]) -> Any:
    """Put routed layers into a loaded model and give it the routed class. `stored` has the experts' and routers'."""
    routing = Routing(layout)
    body.routing = routing
    places = {layer: place for place, group in enumerate(layout.groups) for layer in group}
    shared = bool(layout.router.get("shared"))
    kind = routing.kind
    for name, stores in layout.layers.items():
        try:
            base = body.get_submodule(name)
        except AttributeError:
            raise CheckpointError(f"config.json: routes '{name}', which {type(body).__name__} lacks") from None
        for own, store in stores.items():
            value = base
            for part in own.split("."):  # of a layer inside, where the host is what is called
                value = getattr(value, part, None)
            if not isinstance(value, Tensor) or tuple(value.shape) != store.shape:
                raise CheckpointError(
                    f"config.json: describes experts of '{name}.{own}' as {list(store.shape)}, which that layer is not"
                )
        parts = {
            own.replace(".", "/"): Parts(store, experts_of(stored, f"{name}.experts.{own.replace('.', '/')}."))
            for own, store in stores.items()
        }
        by_group = kind in ("layers", "subspace") and name in places
        route = routing.route(f"group {places[name]}" if by_group and not (shared and kind == "layers") else "model")
        layer = layer_for(base)(base, parts, route)
        parent, _, last = name.rpartition(".")
        setattr(body.get_submodule(parent), last, layer)
    _tie(body, layout)
    if kind == "subspace":
        for group in layout.groups:
            _gate(body.get_submodule(group[0]), layout)
    else:
        body.add_module(ROUTERS, _routers(body, layout, stored))
        _connect(body, routing)
    own = type(body)
    body.__class__ = type(f"Routed{own.__name__}", (RoutedMixin, own), {"forward": _forward(own)})
    body.requires_grad_(False)
    return body


def _tie(body: Any, layout: Layout) -> None:
    """A layer whose weight is another name of a routed one (lm_head and the embedding) has that one's experts."""
    for alias, source in dict(getattr(body, "all_tied_weights_keys", None) or {}).items():
        layer, other = alias.rpartition(".")[0], source.rpartition(".")[0]
        if other not in layout.layers or layer in layout.layers or alias.rpartition(".")[2] != "weight":
            continue
        first, base = body.get_submodule(other), body.get_submodule(layer)
        parent, _, last = layer.rpartition(".")
        setattr(body.get_submodule(parent), last, layer_for(base)(base, dict(first.experts.items()), first.route))


def experts_of(stored: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}


def _gate(layer: Any, layout: Layout) -> None:
    parts = layer.parts("weight") if isinstance(layer, RoutedLinear) else None
    if parts is None or parts.store.kind != "low_rank":
        raise CheckpointError("config.json: a gate by subspaces needs experts of low rank")
    layer.router = SubspaceGate(parts, int(layout.router["directions"]), int(layout.router["top"]))


def router_shapes(layout: Layout, widths: Mapping[int, int]) -> nn.ModuleDict:
    """The modules that decide, untrained. `widths`: group (or 0 for a router of the whole model) → its input's."""
    router, count = layout.router, len(layout.tasks)
    found = nn.ModuleDict()
    if router["kind"] == "layers":
        places = [0] if router.get("shared") else range(len(layout.groups))
        for place in places:
            found[str(place)] = LayerRouter(widths[place], count, int(router["depth"]))
    elif router["kind"] == "features":
        found["0"] = FeatureRouter(int(router["width"]), count)
    return found


def _routers(body: Any, layout: Layout, stored: Mapping[str, Tensor]) -> nn.ModuleDict:
    widths = {}
    for place, group in enumerate(layout.groups):
        first: Any = body.get_submodule(group[0])
        widths[place] = first.base.in_features
    with torch.device("meta"):  # the sizes are the file's word: nothing is made before the tensors bear them out
        modules = router_shapes(layout, widths)
    values = experts_of(stored, f"{ROUTERS}.")
    for name, expected in modules.state_dict().items():
        value = values.get(name)
        if value is None:
            raise CheckpointError(f"lacks '{ROUTERS}.{name}' of its router; the file is not whole")
        if value.shape != expected.shape:
            raise CheckpointError(
                f"'{ROUTERS}.{name}' is {list(value.shape)}, but the router of this model needs "
                f"{list(expected.shape)}: {len(layout.tasks)} experts on inputs of the width of its layers; the router "
                "belongs to another model, so fit it again"
            )
    modules.load_state_dict(values, strict=True, assign=True)
    return modules.eval()


def _connect(body: Any, routing: Routing) -> None:
    layout, modules = routing.layout, getattr(body, ROUTERS)
    if routing.kind == "layers":
        groups = layout.groups[:1] if layout.router.get("shared") else layout.groups
        for place, group in enumerate(groups):
            in_decoder = bool(getattr(body.config, "is_encoder_decoder", False)) and "decoder" in group[0].split(".")
            body.get_submodule(group[0]).router = LayerGate(modules[str(place)], routing.context, in_decoder)
    elif routing.kind == "features":
        top = int(layout.router.get("top", 0))
        routing.features = Features(modules["0"], routing.route("model"), routing.context, top)


def _forward(own: type) -> Any:
    """The class's forward pass with the routing around it."""
    plain: Any = own.forward  # type: ignore[attr-defined]
    names = list(inspect.signature(plain).parameters)[1:]

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, tasks: Tasks = None, routing_mask: Tensor | None = None, **kwargs: Any) -> Any:
        routing: Routing = self.routing
        if routing.is_alone:
            return plain(self, *args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        routing.see({**given, "routing_mask": routing_mask})
        _decide(self, routing, given, routing.tell(tasks) if tasks is not None else routing.told)
        try:
            return plain(self, *args, **kwargs)
        finally:
            for route in routing.routes.values():
                route.rest()

    return forward


def _decide(model: Any, routing: Routing, given: Mapping[str, Any], told: list[int] | None) -> None:
    """Before the forward pass: what is decided for the whole model."""
    if told is not None:
        weights = routing.switched(told, model.device)
        for route in routing.routes.values():
            route.fix(weights)
        return
    if routing.kind == "task":
        raise RecipeError(
            "this model switches by task and was not told which: call model.set_task('NAME'), or give the call "
            f"tasks=[…], one of every sample (tasks: {', '.join(routing.layout.tasks)})"
        )
    if routing.features is not None:
        route = routing.route("model")
        if not (route.held and route.weights is not None):
            route.set(routing.features.decide(shared_features(model, given)))


@torch.no_grad()
def shared_features(model: Any, given: Mapping[str, Any]) -> Tensor:
    """[B, d]: mean over tokens of the last hidden state, without any expert."""
    trunk = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model.base_model
    known = set(inspect.signature(trunk.forward).parameters)
    wanted = ("input_ids", "inputs_embeds", "pixel_values", "attention_mask", "token_type_ids", "position_ids")
    inputs = {name: given[name] for name in wanted if name in known and given.get(name) is not None}
    if "use_cache" in known:
        inputs["use_cache"] = False
    with model.routing.alone():
        tokens = trunk(**inputs).last_hidden_state
    return token_mean(tokens, model.routing.context.mask)


def routed_layers(model: nn.Module) -> dict[str, Routed]:
    """The routed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Routed)}


def stored_experts(model: nn.Module) -> list[Tensor]:
    """What is stored of the experts, in all layers."""
    parts = [part for part in model.modules() if isinstance(part, Parts)]
    return [value for part in parts for value in part.stored().values()]
