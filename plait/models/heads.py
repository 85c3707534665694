"""A task's head: the few tensors that turn features into class scores. Its kind is read off the tensors' names."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize, relu

from plait.errors import CheckpointError
from plait.sources import SafetensorsSource

_KNOWN = "classifier, score, head, fc, classifier.dense + classifier.out_proj, or text_embeddings"
DOWN, UP = "surgery.down", "surgery.up"
"""A head may bring a correction of the features that it reads (representation surgery, arXiv:2402.02705)."""


@dataclass(frozen=True)
class Head:
    """Tensors by their plain names (float32 unless moved), and the class names that go with the outputs."""

    tensors: Mapping[str, Tensor]
    origin: str
    """File or model, for messages."""
    names: list[str] | None = None
    order: list[int] | None = field(default=None)
    """Output index of every class of the task, where the head counts them in another order."""

    @property
    def width(self) -> int:
        """Features that it reads."""
        return self._last("visual_projection.weight", "dense.weight", "weight").shape[1]

    @property
    def outputs(self) -> int:
        """Class scores that it gives."""
        return self._last("text_embeddings", "out_proj.weight", "weight").shape[0]

    def __call__(self, features: Tensor) -> Tensor:
        """[n, width] → [n, classes], differentiable in the features."""
        t = self.tensors
        if DOWN in t:
            features = corrected(features, t[DOWN], t[UP])
        if "text_embeddings" in t:  # zero-shot: cosine with every class's text, times the learned temperature
            image = normalize(linear(features, t["visual_projection.weight"]), dim=-1)
            scores = t["logit_scale"].exp() * image @ t["text_embeddings"].T
        elif "out_proj.weight" in t:  # RobertaClassificationHead
            inner = torch.tanh(linear(features, t["dense.weight"], t.get("dense.bias")))
            scores = linear(inner, t["out_proj.weight"], t.get("out_proj.bias"))
        else:
            scores = linear(features, t["weight"], t.get("bias"))
        return scores if self.order is None else scores[:, self.order]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Head:
        """The same head elsewhere."""
        moved = {name: value.to(device=device, dtype=dtype) for name, value in self.tensors.items()}
        return Head(moved, self.origin, self.names, self.order)

    def fit(self, width: int, classes: list[str] | None, task: str) -> Head:
        """The head for a task's classes on features of this width. Raises CheckpointError where it does not fit."""
        if self.width != width:
            raise CheckpointError(
                f"{self.origin}: the head of {task} reads {self.width} features, but the model gives {width}; "
                "it belongs to another base, or to another pooling"
            )
        if classes is not None and self.outputs != len(classes) and self.outputs != 1:
            raise CheckpointError(
                f"{self.origin}: the head of {task} has {self.outputs} outputs, but the task has {len(classes)} "
                "classes; check head: and classes: of the suite"
            )
        if classes is None or self.names is None or self.names == classes or set(self.names) != set(classes):
            return self
        return Head(self.tensors, self.origin, classes, [self.names.index(name) for name in classes])

    def _last(self, *names: str) -> Tensor:
        return next(self.tensors[name] for name in names if name in self.tensors)


def corrected(features: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """z − W_up ReLU(W_down z): features [n, width], down [rank, width], up [width, rank]."""
    return features - linear(relu(linear(features, down)), up)


def corrects(path: Path) -> bool:
    """Whether a head's file holds a correction: one for each task, so the model is told the task."""
    source = SafetensorsSource(path, str(path))
    try:
        return DOWN in source.specs
    finally:
        source.close()


def head_of(tensors: Mapping[str, Tensor], origin: str, names: list[str] | None = None) -> Head:
    """A head from tensors as checkpoints name them (`classifier.weight`, `score.weight`, …)."""
    plain: dict[str, Tensor] = {}
    for name, value in tensors.items():
        short = name
        for prefix in ("base_model.model.", "classifier.", "score.", "head.", "fc.", "lm_head."):
            short = short.removeprefix(prefix)
        plain[short] = value.detach().to(torch.float32)
    kinds = ({"weight"}, {"dense.weight", "out_proj.weight"},
             {"visual_projection.weight", "text_embeddings", "logit_scale"})  # fmt: skip
    if not any(kind <= set(plain) for kind in kinds):
        raise CheckpointError(f"{origin}: its tensors ({', '.join(sorted(tensors))}) are no head: needs {_KNOWN}")
    found = Head(plain, origin, names)
    _check_shapes(found)
    return found


def _check_shapes(head: Head) -> None:
    """Refuse a head whose tensors do not fit each other, or are no numbers. Raises CheckpointError."""
    t, origin = head.tensors, head.origin
    for name, value in t.items():
        if not value.isfinite().all():
            raise CheckpointError(f"{origin}: the head's '{name}' holds NaN or an infinity; get it again")
        if value.ndim != (0 if name == "logit_scale" else 1 if name.endswith("bias") else 2):
            raise CheckpointError(f"{origin}: the head's '{name}' is {list(value.shape)}, which no head has")
    if (DOWN in t) != (UP in t) or (DOWN in t and t[DOWN].shape != t[UP].shape[::-1]):
        raise CheckpointError(f"{origin}: the head's '{DOWN}' and '{UP}' must be [rank, width] and [width, rank]")
    chain = [
        name for name in ("visual_projection.weight", "text_embeddings", "dense.weight", "out_proj.weight") if name in t
    ]
    for first, second in itertools.pairwise(chain):
        if t[first].shape[0] != t[second].shape[1]:
            raise CheckpointError(f"{origin}: the head's '{second}' does not read what its '{first}' gives")
    for name in ("bias", "dense.bias", "out_proj.bias"):
        weight = f"{name.removesuffix('bias')}weight"
        if name in t and weight in t and len(t[name]) != len(t[weight]):
            raise CheckpointError(
                f"{origin}: the head's '{name}' has {len(t[name])} entries for {len(t[weight])} outputs"
            )


def read_head(path: Path) -> Head:
    """A head from a safetensors file; class names from `id2label` in its metadata."""
    source = SafetensorsSource(path, str(path))
    try:
        tensors = {s.name: source.read(s.name, 0, s.numel).reshape(s.shape).clone() for s in source.specs.values()}
        return head_of(tensors, str(path), id2label_names(source.metadata.get("id2label")))
    finally:
        source.close()


def id2label_names(labels: str | Mapping[str, str] | None) -> list[str] | None:
    """Class names in order, unless they are the meaningless LABEL_0, LABEL_1, …"""
    if labels is None:
        return None
    try:
        found = json.loads(labels) if isinstance(labels, str) else labels
        names = [str(found[str(index)]) for index in range(len(found))]
    except (ValueError, KeyError, TypeError):
        return None
    return None if all(name == f"LABEL_{index}" for index, name in enumerate(names)) else names
