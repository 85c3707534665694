"""Where things are cached on this machine, and which suite a name or path means."""

from __future__ import annotations

import os
from pathlib import Path

from plait.errors import RecipeError, nearest
from plait.places import cache_folder
from plait.suites.definition import Suite, read_suite

BUILT = ("vision", "vision-hard", "text", "text-hard", "language")
"""Suites that `plait suite build` can make."""
PACKAGED = {
    "clip8": "CLIP ViT-B/32 on the eight tasks of the field",
    "clip8-b16": "the same, ViT-B/16",
    "clip8-l14": "the same, ViT-L/14",
}
"""Suites whose models and data are on the hub: their YAML files lie beside this one, and nothing need be built."""


def suite_folder(name: str) -> Path:
    """Where a suite of ours is built."""
    return cache_folder() / "suites" / name


def load_suite(spec: str | os.PathLike[str] | Suite) -> Suite:
    """A suite by the name of ours, by its YAML file, or by the folder that holds suite.yaml."""
    if isinstance(spec, Suite):
        return spec
    if str(spec) in PACKAGED:
        return read_suite(Path(__file__).with_name(f"{spec}.yaml"))
    if str(spec) in BUILT:
        path = suite_folder(str(spec)) / "suite.yaml"
        if not path.is_file():
            raise RecipeError(f"the suite '{spec}' is not built on this machine; run: plait suite build {spec}")
        return read_suite(path)
    path = Path(spec)
    if path.is_dir():
        path = path / "suite.yaml"
    if not path.is_file():
        known = nearest(str(spec), [*BUILT, *PACKAGED])
        raise RecipeError(f"{spec}: no such suite{known}; or give the path of a suite's YAML file")
    return read_suite(path)
