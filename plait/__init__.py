"""Plait: several fine-tuned experts of one base model, merged into one.

import plait
plait.merge("recipe.yaml", "merged/")                        # streams checkpoints of any size

from plait.methods import ties
ties([a, b], base=base, density=0.2)                         # tensors or state dicts in memory
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from plait.errors import CheckpointError, MachineError, PlaitError, RecipeError
from plait.routing.auto import install as _install

# Nothing is told to anybody: huggingface_hub reads this when something here imports it.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from plait.plan import Plan, make_plan
    from plait.recipe import Recipe, load_recipe
    from plait.routing.files import from_pretrained
    from plait.run import Merged, fit, merge
    from plait.state import State

__all__ = [
    "CheckpointError",
    "MachineError",
    "Merged",
    "PlaitError",
    "Plan",
    "Recipe",
    "RecipeError",
    "State",
    "fit",
    "from_pretrained",
    "load_recipe",
    "make_plan",
    "merge",
]  # fmt: skip

_HOMES = {
    "Merged": "run",
    "merge": "run",
    "fit": "run",
    "State": "state",
    "Plan": "plan",
    "make_plan": "plan",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "from_pretrained": "routing.files",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command line can print its help without torch."""
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"plait.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'plait' has no attribute '{name}'")


_install()
