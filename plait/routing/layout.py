"""What config.json says of a routed model: which layers are routed, how their experts are stored, who decides."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from plait.errors import CheckpointError
from plait.routing.stores import Store

MODEL_TYPE = "plait_routed"
"""Not the base architecture's own: a program that does not know it must not load the base with fresh layers."""
WEIGHTS = "routed.safetensors"
"""Not model.safetensors, for the same reason."""
FORMAT = 1
_WIDEST = 1 << 20
"""Of a router's input, and of what it counts."""


@dataclass
class Layout:
    """A routed model's form. Everything but the numbers."""

    method: str
    model_type: str
    """The base architecture's."""
    architecture: str
    """transformers class of the base."""
    tasks: list[str]
    router: dict[str, Any]
    """`kind`: layers, features, task or subspace, and what that needs."""
    layers: dict[str, dict[str, Store]] = field(default_factory=dict)
    """Layer → its parameter → how the experts' are stored."""
    groups: list[list[str]] = field(default_factory=list)
    """Layers that share one route, the one that sees the input first; for routers of kind layers and subspace."""

    def _check_router(self, label: str) -> None:
        needs = {"layers": ("depth",), "features": ("width",), "subspace": ("directions", "top")}
        for key in ("depth", "width", "directions", "top"):
            value, most = self.router.get(key), 2 if key == "depth" else _WIDEST
            if value is None and key not in needs.get(self.router["kind"], ()):
                continue
            if type(value) is not int or not 0 <= value <= most:
                raise CheckpointError(
                    f"{label}: config.json: the router's {key} is {value!r:.40}; it must be 0 to {most}"
                )
        for group in self.groups:
            if not group or any(layer not in self.layers for layer in group):
                raise CheckpointError(f"{label}: config.json: groups names layers that are not routed: {group!r:.80}")

    def config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """The base's config.json with the layout in it."""
        data = {
            "format": FORMAT, "method": self.method, "model_type": self.model_type, "architecture": self.architecture,
            "tasks": self.tasks, "router": self.router, "groups": self.groups,
            "layers": {
                layer: {name: store.as_data() for name, store in stores.items()}
                for layer, stores in self.layers.items()
            },
        }  # fmt: skip
        return {**base, "model_type": MODEL_TYPE, "architectures": ["RoutedModel"], "plait": data}

    @classmethod
    def of(cls, config: Mapping[str, Any], label: str) -> tuple[Layout, dict[str, Any]]:
        """The layout in a config.json, and the base architecture's config. Raises CheckpointError."""
        data = config.get("plait")
        if config.get("model_type") != MODEL_TYPE or not isinstance(data, Mapping):
            raise CheckpointError(f"{label}: is no routed model; load it with transformers")
        if data.get("format") != FORMAT:
            raise CheckpointError(
                f"{label}: is of format {data.get('format')}, and this version of Plait reads {FORMAT}; upgrade Plait"
            )
        try:
            tasks, router = [str(task) for task in data["tasks"]], dict(data["router"])
            kind = str(data["model_type"])
            layers = {
                str(layer): {
                    str(name): Store.from_data(entry, len(tasks), f"{label}: config.json: {layer}.{name}")
                    for name, entry in stores.items()
                }
                for layer, stores in data["layers"].items()
            }
            found = cls(
                str(data["method"]), kind, str(data["architecture"]), tasks, router, layers,
                [[str(layer) for layer in group] for group in data["groups"]],
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError, ValueError):
            raise CheckpointError(f"{label}: config.json: its description of routed layers is damaged") from None
        if router.get("kind") not in ("layers", "features", "task", "subspace") or not tasks:
            raise CheckpointError(f"{label}: config.json: has a router of a kind that is not known")
        found._check_router(label)
        rest = {key: value for key, value in config.items() if key not in ("plait", "auto_map")}
        return found, {**rest, "model_type": kind, "architectures": [found.architecture]}


def is_routed(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is a routed model's."""
    return config.get("model_type") == MODEL_TYPE


def is_switched(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is a model's that must be told the task."""
    for key in ("plait", "router"):
        inner = config.get(key)
        if not isinstance(inner, Mapping) or (key == "plait" and not is_routed(config)):
            return False
        config = inner
    return config.get("kind") == "task"


def dumped(config: Mapping[str, Any]) -> bytes:
    """config.json as bytes."""
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
