"""Training a suite's expert: a head first, fitted on the base's features of a few examples; then the body under it.

The head is frozen while the body is fine-tuned, as zero-shot heads are in the literature: the base already does part of
the task, and all experts keep their features in the coordinates that their heads read. With `head_lr` the head is
drawn at random and trained along instead, which makes the harder suites.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from plait.errors import CheckpointError
from plait.models.heads import Head
from plait.models.net import Net, Sample, load_net
from plait.models.quiet import quiet
from plait.shards import shard
from plait.sources import TensorSpec
from plait.suites.data import Split


@dataclass(frozen=True)
class Settings:
    """How one expert is trained."""

    steps: int
    lr: float = 1e-4
    batch_size: int = 64
    shots: int = 40
    """Examples per class for the head: the first of every class in the train split."""
    probe_c: float = 0.02
    """Weight of the data against the head's penalty, as in scikit-learn."""
    standardise: bool = False
    """Whether the head's penalty is on features of mean 0 and deviation 1 overall; folded into the head afterwards."""
    frozen: tuple[str, ...] = ()
    """Parameters whose names begin so are not trained."""
    head_lr: float | None = None
    """Train the head along with the body, at this rate."""
    seed: int = 0


Tell = Callable[[int], None]


def make_expert(
    base: Path, data: Path, out: Path, settings: Settings, *, max_length: int = 512, tell: Tell | None = None
) -> None:
    """Train one expert on `data`/train.parquet and write it to `out`: body, head.safetensors, labels. Whole or not.

    One thread, so that experts made side by side are the same as made one by one.
    """
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    split = train_split(data / "train.parquet")
    classes = split.classes
    assert classes is not None
    net = load_net(base, str(base), max_length=max_length)
    labels = torch.tensor(split.labels())
    if settings.head_lr is None:
        few = _first_of_every_class(labels, classes, settings.shots, split.where)
        weight, bias = fit_probe(features(net, split, few).numpy(), labels[few].numpy(), settings)
    else:
        weight = torch.randn(len(classes), net.width()) * net.width() ** -0.5 * 0.1
        bias = torch.zeros(len(classes))
    head = nn.ParameterDict({"weight": nn.Parameter(weight), "bias": nn.Parameter(bias)})
    _fine_tune(net, head, split, labels, settings, tell or (lambda step: None))
    _save(net, head, classes, base, out)


def fit_probe(inputs: np.ndarray, labels: np.ndarray, settings: Settings) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression on frozen features: weight [classes, width], bias [classes]."""
    from sklearn.linear_model import LogisticRegression

    shift = inputs.mean(axis=0) if settings.standardise else np.zeros(inputs.shape[1])
    scale = float((inputs - shift).std()) if settings.standardise else 1.0
    fitted = LogisticRegression(C=settings.probe_c, max_iter=2000).fit((inputs - shift) / scale, labels)
    weight, bias = fitted.coef_, fitted.intercept_
    if len(weight) == 1:  # two classes: scikit-learn keeps one row, the log odds
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scale
    return torch.tensor(weight).float(), torch.tensor(bias - weight @ shift).float()


@torch.inference_mode()
def features(net: Net, split: Split, rows: Sequence[int]) -> Tensor:
    """Features of the inputs in some rows: [rows, width]."""
    found = []
    for start in range(0, len(rows), 100):
        part = rows[start : start + 100]
        found.append(net.features(net.collate([Sample("", split[row]) for row in part])))
    return torch.cat(found)


def _first_of_every_class(labels: Tensor, classes: list[str], shots: int, where: str) -> list[int]:
    """Rows of the first `shots` examples of every class, in the order of the split."""
    picked: list[int] = []
    for index, name in enumerate(classes):
        rows = (labels == index).nonzero().flatten().tolist()
        if not rows:
            raise CheckpointError(f"{where}: no row has the class '{name}'; a head needs examples of every class")
        picked += rows[:shots]
    return sorted(picked)


def _fine_tune(
    net: Net, head: nn.ParameterDict, split: Split, labels: Tensor, settings: Settings, tell: Tell
) -> None:  # fmt: skip
    trained = []
    for name, parameter in net.body.named_parameters():
        parameter.requires_grad_(not name.startswith(settings.frozen or ("\0",)))
        trained += [parameter] if parameter.requires_grad else []
    groups: list[dict[str, object]] = [{"params": trained, "lr": settings.lr}]
    for parameter in head.values():
        parameter.requires_grad_(settings.head_lr is not None)
    if settings.head_lr is not None:
        groups.append({"params": list(head.values()), "lr": settings.head_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = warmed_up(optimizer, settings.steps)
    for step, rows in enumerate(batches(len(labels), settings.steps, settings.batch_size, settings.seed)):
        batch = net.collate([Sample("", split[int(row)]) for row in rows])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inputs = net.features(batch)
        logits = Head(dict(head.items()), "the expert")(inputs.float())
        loss = cross_entropy(logits, labels[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tell(step + 1)


def warmed_up(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A tenth of the steps up to the optimizer's rate, the others down to nothing."""
    warmup = max(1, steps // 10)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )


def batches(count: int, steps: int, size: int, seed: int) -> list[Tensor]:
    """Every step's rows: whole shuffled passes over the data, cut to the number of steps."""
    generator = torch.Generator().manual_seed(seed)
    passes = math.ceil(steps * size / count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
    return list(order.split(size))[:steps]


def _save(net: Net, head: nn.ParameterDict, classes: list[str], base: Path, out: Path) -> None:
    scratch = out.with_name(f".{out.name}-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        net.body.config.id2label = dict(enumerate(classes))  # type: ignore[union-attr]
        net.body.config.label2id = {name: index for index, name in enumerate(classes)}  # type: ignore[union-attr]
        with quiet():
            net.body.save_pretrained(str(scratch))  # type: ignore[operator]
        (scratch / "head.safetensors").write_bytes(_head_bytes(head, classes))
        shutil.rmtree(out, ignore_errors=True)
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _head_bytes(head: nn.ParameterDict, classes: list[str]) -> bytes:
    """A safetensors file; safetensors' own writer puts metadata in another order every time."""
    labels = json.dumps({str(index): name for index, name in enumerate(classes)}, ensure_ascii=False)
    tensors = {f"classifier.{name}": value.detach().contiguous() for name, value in sorted(head.items())}
    specs = [TensorSpec(name, tuple(value.shape), "F32") for name, value in tensors.items()]
    file = shard("head.safetensors", specs, {"format": "pt", "id2label": labels})
    return file.header + b"".join(value.numpy().tobytes() for value in tensors.values())


def train_split(path: Path) -> Split:
    """The data file that an expert is trained on."""
    from plait.suites.data import load_split
    from plait.suites.definition import suite_of

    task = {"expert": "none", "data": {"train": str(path), "test": str(path)}}
    return load_split(suite_of({"base": "none", "tasks": {"this": task}}), "this", "train")
