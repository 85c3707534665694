"""Measure encoders and adapters on the demo's test sets, through plain transformers and plain PEFT.

Nothing here knows the merging code: a merged folder has to stand on its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from tasks import load, pixel_values
from torch import Tensor
from transformers import Dinov2ForImageClassification, Dinov2Model

Head = Mapping[str, Tensor]  # "weight" (classes, 2 x hidden) and "bias" (classes)


def load_heads(experts_dir: Path, tasks: tuple[str, ...]) -> dict[str, Head]:
    """Read each expert's classifier out of its adapter file."""
    heads: dict[str, Head] = {}
    for task in tasks:
        tensors = load_file(Path(experts_dir) / task / "adapter_model.safetensors")
        heads[task] = {part: tensors[f"base_model.model.classifier.{part}"].float() for part in ("weight", "bias")}
    return heads


@torch.inference_mode()
def features(encoder: torch.nn.Module, images: Tensor, batch_size: int = 100) -> Tensor:
    """Return what `Dinov2ForImageClassification` feeds its classifier: the class token beside the mean patch."""
    rows = []
    for batch in images.split(batch_size):
        tokens = encoder(pixel_values=pixel_values(batch)).last_hidden_state
        rows.append(torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1))
    return torch.cat(rows)


def accuracy(encoder: torch.nn.Module, task: str, head: Head) -> float:
    """Return the percentage of `task`'s test images that `encoder` under `head` gets right."""
    test = load(task, "test")
    logits = torch.nn.functional.linear(features(encoder, test.images), head["weight"].float(), head["bias"].float())
    return 100 * (logits.argmax(dim=1) == test.labels).double().mean().item()


def evaluate(model_dir: Path, heads: Mapping[str, Head]) -> dict[str, float]:
    """Return the test accuracy (percent) of the checkpoint folder `model_dir` on every task that has a head."""
    encoder = Dinov2Model.from_pretrained(model_dir, dtype=torch.float32).eval()
    return {task: accuracy(encoder, task, head) for task, head in heads.items()}


def classifier(base_dir: Path, classes: tuple[str, ...]) -> Dinov2ForImageClassification:
    """Build the experts' architecture on the base's weights, with a classifier still to be filled."""
    encoder = Dinov2Model.from_pretrained(base_dir, dtype=torch.float32)
    config = encoder.config
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: index for index, name in enumerate(classes)}
    model = Dinov2ForImageClassification(config)
    model.dinov2.load_state_dict(encoder.state_dict())
    return model


@torch.inference_mode()
def expert_accuracy(base_dir: Path, adapter_dir: Path, task: str) -> float:
    """Return the test accuracy (percent) of a saved adapter, put back on the base by PEFT itself."""
    test = load(task, "test")
    model = PeftModel.from_pretrained(classifier(base_dir, test.classes), str(adapter_dir)).eval()
    hits = 0
    for images, labels in zip(test.images.split(100), test.labels.split(100), strict=True):
        logits = model(pixel_values=pixel_values(images)).logits
        hits += int((logits.argmax(dim=1) == labels).sum())
    return 100 * hits / len(test.labels)
