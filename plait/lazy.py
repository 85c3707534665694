"""numpy and torch, imported when first used: `from plait.lazy import np, torch` instead of importing them.

torch takes a second of CPU, and what reads headers and schemas alone does without it. So every module on the way from
the recipe to the plan takes both from here, and uses them inside functions only: an annotation costs nothing, but a
constant or an alias such as `tuple[torch.Tensor]` would import torch (quote the name there). A test watches.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    __all__ = ["np", "torch"]
else:

    class _Lazy(ModuleType):
        """Stands for a module that is imported at the first look at one of its names."""

        def __getattr__(self, name: str) -> Any:
            module = importlib.import_module(self.__name__)
            self.__dict__.update(vars(module))  # from now on a look-up costs what the module's own does
            return getattr(module, name)

        def __reduce__(self) -> Any:
            return importlib.import_module, (self.__name__,)  # by name, as modules are, in closures that are sent

    np, torch = _Lazy("numpy"), _Lazy("torch")
