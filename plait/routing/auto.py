"""After `import plait`, transformers' Auto classes load routed models: `AutoModel.from_pretrained(folder)`.

transformers is large, and Plait does without it for merging, so nothing is imported here before transformers itself is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_WATCHED = "transformers.models.auto.modeling_auto"
_AUTO = (
    "AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
)  # fmt: skip


def install() -> None:
    """Register with transformers now, if it is loaded, else in the moment that it loads its Auto classes."""
    module = sys.modules.get(_WATCHED)
    if module is not None:
        register(module)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def register(auto: ModuleType) -> None:
    """Make `plait_routed` known to the Auto classes of transformers."""
    from transformers import AutoConfig, PreTrainedConfig

    from plait.routing.layout import MODEL_TYPE

    class RoutedConfig(PreTrainedConfig):
        """The base architecture's config with the layout under `plait`."""

        model_type = MODEL_TYPE

    class RoutedModel:
        """What the Auto classes call: the model that comes is one of the base's own architecture."""

        config_class = RoutedConfig

        @classmethod
        def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
            """`plait.from_pretrained`, with the options that have a meaning there."""
            from plait.routing.files import from_pretrained

            given = {key: kwargs[key] for key in ("task", "dtype") if kwargs.get(key) is not None}
            if given.get("dtype") == "auto":
                del given["dtype"]
            place = kwargs.get("device_map")
            return from_pretrained(path, device=place if isinstance(place, str) and place != "auto" else "cpu", **given)

        @classmethod
        def _from_config(cls, config: Any, **kwargs: Any) -> Any:
            raise ValueError("a routed model has no form without its experts; load it with from_pretrained(folder)")

    AutoConfig.register(MODEL_TYPE, RoutedConfig, exist_ok=True)
    for name in _AUTO:
        getattr(auto, name).register(RoutedConfig, RoutedModel, exist_ok=True)


class _Watch:
    """Sees transformers' Auto classes being imported, and registers right after."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for the one watched module, whose loader calls `register` at its end."""
        if fullname != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = _Registering(spec.loader)  # no heir of importlib's Loader, whose import takes 10 ms
            spec.loader = loader
        return spec


class _Registering:
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        register(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
