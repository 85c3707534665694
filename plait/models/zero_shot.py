"""Zero-shot heads: a class is the mean of its prompts' embeddings by the text tower of the suite's base (a CLIP model).

A head is computed once for a base, its templates and its classes, and kept in the cache.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from plait import digests
from plait.errors import CheckpointError, RecipeError
from plait.models.heads import Head, read_head
from plait.models.net import import_transformers
from plait.models.quiet import quiet
from plait.sources import open_source
from plait.suites.definition import Suite
from plait.suites.places import cache_folder

_BATCH = 256
_NEEDED = ("text_model.embeddings.token_embedding.weight", "text_projection.weight", "visual_projection.weight",
           "logit_scale")  # fmt: skip
"""The towers have parts that other models have too; these tensors together are only a CLIPModel's."""
_TOKENIZERS = ({"tokenizer.json"}, {"vocab.json", "merges.txt"})


def zero_shot_head(suite: Suite, task: str, classes: Sequence[str] | None) -> Head:
    """The head of a task from its class names. Raises CheckpointError for a base that has no text tower."""
    if classes is None:
        raise RecipeError(
            f"{suite.where('tasks', task)}: head: zero_shot needs the names of the classes, and the data has none; add "
            "classes: in the order of the labels"
        )
    templates = suite.tasks[task].templates
    path = cache_folder() / "zero_shot" / f"{head_key(suite, task, classes)}.safetensors"
    if not path.is_file():
        _store(path, _compute(suite, templates, classes), classes)
    return Head(read_head(path).tensors, f"{suite.base}: zero-shot", list(classes))


def head_key(suite: Suite, task: str, classes: Sequence[str] | None) -> str:
    """Digest of everything that a zero-shot head depends on."""
    source = open_source(suite.place(suite.base))
    folder = source.folder
    source.close()
    return digests.digest([digests.folder_digest(folder), suite.tasks[task].templates, classes])


@torch.inference_mode()
def _compute(suite: Suite, templates: Sequence[str], classes: Sequence[str]) -> dict[str, Tensor]:
    folder, tensors = _projections(suite)
    project = tensors.pop("text_projection.weight")
    tower, tokenizer = _text_tower(folder, suite.base)
    limit = tower.config.max_position_embeddings
    texts = [template.replace("{}", name) for name in classes for template in templates]
    parts = []
    for at in range(0, len(texts), _BATCH):
        tokens = tokenizer(texts[at : at + _BATCH], padding=True, truncation=True, max_length=limit,
                           return_tensors="pt")  # fmt: skip
        pooled = tower(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        parts.append(linear(pooled, project))
    embeddings = normalize(torch.cat(parts), dim=-1).view(len(classes), len(templates), -1)
    return {**tensors, "text_embeddings": normalize(embeddings.mean(dim=1), dim=-1)}  # [classes, width]


def _projections(suite: Suite) -> tuple[Path, dict[str, Tensor]]:
    """The base's folder, and its projections and temperature.

    Read here and not through transformers: it takes the projections' size from the towers' own configs when it loads
    a tower alone, and only the whole model's config need be right.
    """
    source: Any = open_source(suite.place(suite.base))
    try:
        absent = next((name for name in _NEEDED if name not in source.specs), None)
        if absent is not None:
            raise CheckpointError(
                f"{suite.base}: has no '{absent}', and head: zero_shot needs a base with CLIP's text tower and "
                "projections; give the full CLIP model (a CLIPModel) as base:, or heads as files with head:"
            )
        specs = {name: source.specs[name] for name in _NEEDED[1:]}
        read = {name: source.read(name, 0, spec.numel).reshape(spec.shape) for name, spec in specs.items()}
        return source.folder, {name: value.to(torch.float32, copy=True) for name, value in read.items()}
    finally:
        source.close()


def _text_tower(folder: Path, label: str) -> tuple[Any, Any]:
    """The text tower and its tokenizer, loaded strictly."""
    transformers = import_transformers()
    present = {path.name for path in folder.iterdir()}
    if not any(files <= present for files in _TOKENIZERS):
        raise CheckpointError(
            f"{label}: has no tokenizer (tokenizer.json, or vocab.json and merges.txt), which head: zero_shot needs; "
            "add these files of the original model to its folder"
        )
    with quiet():
        try:
            tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder))
            tower, info = transformers.CLIPTextModel.from_pretrained(
                str(folder), dtype=torch.float32, output_loading_info=True, local_files_only=True
            )
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            raise CheckpointError(
                f"{label}: transformers cannot load its text tower: {type(error).__name__}: {reason}"
            ) from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"{label}: its text tower lacks '{missing[0]}'; the checkpoint is not whole")
    return tower.eval(), tokenizer


def _store(path: Path, tensors: dict[str, Tensor], classes: Sequence[str]) -> None:
    """Write a head's file; whole or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    labels = json.dumps({str(index): name for index, name in enumerate(classes)})
    save_file({name: value.contiguous() for name, value in tensors.items()}, scratch, metadata={"id2label": labels})
    os.replace(scratch, path)
