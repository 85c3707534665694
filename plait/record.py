"""plait.json: where a merged model comes from."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from plait.plan import Plan
from plait.state import NUMBERS, State

FORMAT = 1
"""Version of plait.json."""


def inputs_of(plan: Plan) -> dict[str, Any]:
    """What went in: of every model the hashes of its headers, and of samples of its data."""
    return {
        model.label: {"fingerprint": model.source.fingerprint(), "headers": model.source.header_hashes()}
        for model in plan.opened()
    }


def provenance(
    plan: Plan,
    inputs: Mapping[str, Any],
    hashes: Mapping[str, str],
    learned: State | None = None,
    told: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """plait.json: what was asked, what went in, what came out. The same for the same recipe and inputs, always."""
    return {
        "format": FORMAT,
        "plait": version("plait"),
        "torch": version("torch"),
        "python": platform.python_version(),
        "method": plan.method.name,
        "paper": plan.method.paper,
        "recipe": plan.recipe.canonical(),
        "seed": plan.recipe.seed,
        "inputs": inputs,
        "outputs": dict(hashes),
        **({"learned": _learned(learned)} if learned is not None else {}),
        **({"survey": told} if told else {}),
        "tensors": {
            "merged": len(plan.merged),
            "copied": {t.name: t.reason for t in plan.tensors if t.action == "copy"},
            "per_task": {task: [item.stored for item in items] for task, items in sorted(plan.heads.items())},
        },
        "notes": sorted(plan.notes),
    }


def _learned(state: State) -> dict[str, Any]:
    """A state in provenance: what it is, from what, and how its fit ended."""
    facts = state.facts
    content = hashlib.sha256((state.folder / NUMBERS).read_bytes()).hexdigest()
    return {"numbers": content, **{key: facts[key] for key in ("fit", "objective", "split", "data", "summary")}}
