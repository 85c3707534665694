"""The merges that are interrupted: real commands on small real models, slow enough to be hit in the middle."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mini_suite
import pico
import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Scenario:
    """One command. `OUT` among its words is the output folder."""

    kind: str
    name: str
    words: list[str]
    overwrite: bool = False
    """Whether an older output is there, which must stay as it is until it is replaced."""
    resume: list[str] = field(default_factory=list)
    """Words that are added to go on."""


QUICK = ("ties", "adamerging, fit inside", "emr")
"""One of each kind, for `make test`."""


def scenarios(root: Path, names: tuple[str, ...] | None = None) -> list[Scenario]:
    """Write the models below `root`, and give the commands that merge them."""
    made = [*static(root, 3 if names else 10), *learned_and_routed(root)]
    return [item for item in made if names is None or item.name in names]


def static(root: Path, layers: int) -> list[Scenario]:
    """Merges of 3 experts of plain tensors, by one thread, so that each lasts a second or more."""
    folders = {}
    for place, name in enumerate(("base", "a", "b", "c")):
        noise = torch.Generator().manual_seed(place)
        drift = 1.0 if name == "base" else 0.05
        shift = torch.Generator().manual_seed(99)
        tensors = {}
        for layer in range(layers):
            for kind, shape in (("weight", (600, 500)), ("bias", (600,))):
                start = torch.randn(shape, generator=shift)
                tensors[f"layers.{layer}.{kind}"] = start + (name != "base") * drift * torch.randn(
                    shape, generator=noise
                )
        folders[name] = root / name
        folders[name].mkdir()
        save_file(tensors, folders[name] / "model.safetensors")
        (folders[name] / "config.json").write_text('{"model_type": "plain"}')
    models = [{"model": str(folders[name]), "name": name} for name in "abc"]
    found = []
    for label, words, recipe in (
        ("ties", [], {"merge_method": "ties", "parameters": {"density": 0.3}}),
        ("ties, whole model", [], {"merge_method": "ties", "parameters": {"density": 0.3, "trim": "model"}}),
        ("task arithmetic, shards", ["--shard-size", "2MB"], {"merge_method": "task_arithmetic"}),
        ("della, over an output", [], {"merge_method": "della", "parameters": {"density": 0.5}}),
        ("tsv_m", ["--shard-size", "3MB"], {"merge_method": "tsv_m"}),
    ):
        path = write(root, label, {**recipe, "base_model": str(folders["base"]), "models": models})
        over = "over" in label
        words = ["merge", str(path), "OUT", "--threads", "1", *words, *(["--overwrite"] if over else [])]
        found.append(Scenario("static", label, words, overwrite=over))
    return found


def learned_and_routed(root: Path) -> list[Scenario]:
    """Fits on the mini suite, merges that fit first, and models whose experts stay apart."""
    suite = mini_suite.make(root / "suite")
    models = [{"model": str(suite.expert(task)), "name": task} for task in mini_suite.CLASSES]
    common = {"base_model": str(suite.base), "models": models}
    data = {"data": str(suite.root / "suite.yaml")}
    steps = {"steps": 6, "batch": 4}
    fits = {
        "adamerging": {"merge_method": "adamerging", **data, "fit": steps},
        "concrete": {"merge_method": "concrete_adamerging", **data, "fit": {**steps, "finetune_steps": 3}},
        "regmean": {"merge_method": "regmean", **data},
    }
    found = []
    for label, recipe in fits.items():
        path = write(root, label, {**recipe, **common})
        found.append(Scenario("learned", f"fit {label}", ["fit", str(path), "OUT"], resume=["--resume"]))
    inside = [("learned", "adamerging", fits["adamerging"])]
    inside += [
        ("routed", "wemoe", {"merge_method": "wemoe", **data, "fit": {"steps": 6, "batch": 4}}),
        ("routed", "twin", {"merge_method": "twin", **data, "fit": {"epochs": 3}}),
    ]
    for kind, label, recipe in inside:
        path = write(root, f"{label}-inside", {**recipe, **common})
        found.append(Scenario(kind, f"{label}, fit inside", ["merge", str(path), "OUT", "--threads", "1"]))
    base = pico.make_llama(root / "llama", layers=8)
    experts = [{"model": str(path), "name": f"e{k}"} for k, path in enumerate(pico.experts(root / "made", base, 4))]
    for label in ("emr", "smile"):
        path = write(root, label, {"merge_method": label, "base_model": str(base), "models": experts})
        found.append(Scenario("routed", label, ["merge", str(path), "OUT", "--threads", "1"]))
    return found


def write(root: Path, label: str, recipe: dict[str, Any]) -> Path:
    path = root / f"{label.replace(', ', '-').replace(' ', '-')}.json"
    path.write_text(json.dumps(recipe))
    return path
