"""The cases: a builder that writes hostile files into a folder, and the words of the `plait` verb that gets them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mini_suite
import pico

from hostile.checkpoints import BUILDERS

REFUSED, HARMLESS = "refused", "harmless"
"""Refused: exit 2 or 3 and a sentence. Harmless: it may be merged, but nothing of the attack happens."""


@dataclass
class World:
    """What is good, made once: a base with an expert, and a suite that can be evaluated."""

    root: Path
    base: Path = field(init=False)
    expert: Path = field(init=False)
    suite: mini_suite.MiniSuite = field(init=False)

    def __post_init__(self) -> None:
        self.base = pico.make_llama(self.root / "base", layers=1)
        pico.add_tokenizer(self.base)
        (self.expert,) = pico.experts(self.root, self.base, 1)
        self.suite = mini_suite.make(self.root / "suite")

    def pictures(self, folder: Path) -> Path:
        """A copy of a suite of images; made when it is first asked for."""
        whole = self.root / "pictures"
        if not whole.exists():
            import mini_images

            whole.mkdir()
            mini_images.make(whole)
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        return folder / "suite.yaml"

    def bert(self, folder: Path, **config: Any) -> Path:
        """A copy of the suite's base in a folder, with changes to its config.json."""
        shutil.copytree(self.suite.base, folder, dirs_exist_ok=True)
        change_json(folder / "config.json", config)
        return folder


Build = Callable[[Path, World], str]


@dataclass(frozen=True)
class Case:
    """One attack. `build(folder, world)` writes it and returns what the sentence must name."""

    name: str
    kind: str
    words: str
    """Of the verb, with {here} for the folder, {out} for the output, {base}, {expert} and {suite} for what is good."""
    build: Build
    outcome: str = REFUSED


CASES: dict[str, Case] = {}


def case(kind: str, words: str, outcome: str = REFUSED) -> Callable[[Build], Build]:
    """Register a builder under its name."""

    def register(build: Build) -> Build:
        add(build.__name__, kind, words, build, outcome)
        return build

    return register


def add(name: str, kind: str, words: str, build: Build, outcome: str = REFUSED) -> None:
    """Register a case."""
    assert name not in CASES, name
    CASES[name] = Case(name, kind, words, build, outcome)


def change_json(path: Path, changes: dict[str, Any]) -> None:
    """Set keys of a JSON file; None removes one."""
    found = json.loads(path.read_text()) if path.exists() else {}
    found = {key: value for key, value in {**found, **changes}.items() if value is not None}
    path.write_text(json.dumps(found))


MERGE = "merge --quiet --method task_arithmetic --base {base} --expert bad={here} {out}"


def _from_builder(name: str) -> Build:
    return lambda folder, world: BUILDERS[name](folder)[1]


for _name in BUILDERS:
    add(_name, "adapter" if "adapter" in _name else "checkpoint", MERGE, _from_builder(_name))

from hostile import asked, images, models  # noqa: E402,F401  (they register theirs)
