"""What is measured: a model folder, an adapter, a suite's base or a task's expert, made ready to answer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from plait import digests
from plait.evaluate.results import ModelFacts
from plait.models.families import family_of
from plait.models.heads import Head, corrects, read_head
from plait.models.net import Net, load_net, read_config
from plait.models.outfit import base_folder, head_file, outfit, pooling_of, source_folder, suite_head
from plait.routing.layout import is_switched
from plait.routing.model import stored_experts
from plait.sources import LowRankSource, open_source
from plait.suites.definition import Suite
from plait.suites.places import cache_folder

Origin = Literal["model", "suite", "expert", "none"]


@dataclass(frozen=True)
class Options:
    """How to measure."""

    batch_size: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    use_cache: bool = True
    progress: Any = None
    mixed: bool = True
    """Batches mix all tasks. False is the papers' way: one task a batch, for which a routed model mixes once."""


@dataclass
class Subject:
    """One model under one label."""

    suite: Suite
    label: str
    path: str | None
    is_expert: bool = False
    _folder: Path | None = field(default=None, repr=False)

    @classmethod
    def model(cls, suite: Suite, spec: str, label: str | None = None) -> Subject:
        """A folder or hub id."""
        return cls(suite, label or Path(spec).name or spec, spec)

    @classmethod
    def base(cls, suite: Suite) -> Subject:
        """The suite's base, with the tasks' heads."""
        return cls(suite, "base + heads", suite.place(suite.base))

    @classmethod
    def expert(cls, suite: Suite, task: str) -> Subject:
        """A task's expert."""
        return cls(suite, f"expert {task}", suite.place(suite.tasks[task].expert), is_expert=True)

    @property
    def folder(self) -> Path:
        """A folder that transformers can load. An adapter is first put on the suite's base, in the cache."""
        if self._folder is None:
            assert self.path is not None
            source = open_source(self.path)
            adapter, folder = isinstance(source, LowRankSource), source.folder
            source.close()
            self._folder = self._whole(folder) if adapter else folder
        return self._folder

    def fingerprint(self, tasks: list[str]) -> str:
        """Over the content of the model, and of the heads that it does not bring along."""
        heads = {task: self._head_digest(task) for task in tasks}
        return digests.digest([digests.folder_digest(self.folder), self._processor_digest(), heads])

    def task_id(self, tasks: list[str]) -> Literal["head", "model"]:
        """What a sample's task chooses: its head alone, or part of the model too."""
        files = [self.folder / "heads" / f"{task}.safetensors" for task in tasks]
        if is_switched(read_config(self.folder, self.label)):
            return "model"
        return "model" if self.is_expert or any(corrects(path) for path in files if path.is_file()) else "head"

    def load(
        self, tasks: list[str], classes: Mapping[str, list[str] | None], options: Options
    ) -> tuple[Net, dict[str, Origin]]:
        """The net with all heads it needs, and where each head came from."""
        import torch

        suite = self.suite
        net = load_net(
            self.folder, self.label, processor_from=base_folder(suite), pooling=pooling_of(suite),
            max_length=suite.max_length, dtype=getattr(torch, options.dtype), device=options.device,
        )  # fmt: skip
        found = {task: self._head(task, classes[task]) for task in tasks} if net.family.answers == "head" else {}
        net = outfit(net, suite, {task: classes[task] for task in tasks}, lambda task: found[task][0])
        return net, {task: found[task][1] if found else "none" for task in tasks}

    def facts(self, net: Net) -> ModelFacts:
        """The model in a result."""
        return ModelFacts(
            label=self.label, path=self.path, fingerprint=digests.folder_digest(self.folder),
            parameters=sum(value.numel() for value in [*net.body.parameters(), *stored_experts(net.body)]),
            bytes=digests.weight_bytes(self.folder),
        )  # fmt: skip

    def _head(self, task: str, classes: list[str] | None) -> tuple[Head, Origin]:
        own = self.folder / "heads" / f"{task}.safetensors"
        if own.is_file():
            return read_head(own), "expert" if self.is_expert else "model"
        return suite_head(self.suite, task, classes), "expert" if self.is_expert else "suite"

    def _head_digest(self, task: str) -> str:
        own = self.folder / "heads" / f"{task}.safetensors"
        entry = self.suite.tasks[task]
        if own.is_file():
            return "its own"
        if entry.head is not None and entry.head != "zero_shot":
            return digests.digest(head_file(self.suite, task).read_bytes().hex())
        if entry.head == "zero_shot":
            from plait.models.zero_shot import head_key

            return head_key(self.suite, task, entry.classes)
        return digests.folder_digest(source_folder(self.suite.place(entry.expert)))

    def _processor_digest(self) -> str:
        kinds = (".json", ".txt", ".model")
        files = sorted(
            path for path in base_folder(self.suite).iterdir() if path.suffix in kinds and path.name != "plait.json"
        )
        return digests.digest({path.name: path.read_bytes().hex() for path in files})

    def _whole(self, adapter: Path) -> Path:
        """The adapter on the suite's base: the merge of one expert, which is the expert."""
        from plait.run import merge

        base = base_folder(self.suite)
        key = digests.digest([digests.folder_digest(adapter), digests.folder_digest(base)])
        out = cache_folder() / "experts" / key
        if not (out / "plait.json").is_file():
            name = next((t for t in self.suite.tasks if self._is_expert_of(t)), "expert")
            shutil.rmtree(out, ignore_errors=True)
            merge(
                {"merge_method": "task_arithmetic", "base_model": str(base), "parameters": {"weight": 1.0},
                 "models": [{"model": str(adapter), "name": name}], "dtype": "float32"},
                out,
            )  # fmt: skip
        return out

    def _is_expert_of(self, task: str) -> bool:
        return self.suite.place(self.suite.tasks[task].expert) == self.suite.place(self.path or "")


def family_name(suite: Suite) -> str:
    """The family of a suite's base."""
    folder = base_folder(suite)
    return family_of(read_config(folder, suite.base), suite.base).name
