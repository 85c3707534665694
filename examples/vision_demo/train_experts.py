"""Train the demo's five experts: one small LoRA adapter per task, each under a frozen head.

The head comes first: a linear probe on the base's own features, fitted on a few images per class and never touched
again. So the base already does part of every task, and all experts keep their features in the coordinates that their
heads read, which is the setting in which merging is usually studied.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Dinov2Config, Dinov2ForImageClassification
from transformers.utils import logging

from plait.evaluate.measure import Bench, Options
from plait.models.net import Net, Sample, load_net
from plait.suites.bases import dinov2_small
from plait.suites.data import Split, load_split
from plait.suites.definition import Suite, suite_of
from plait.suites.places import load_suite
from plait.suites.train import Settings as Probe
from plait.suites.train import features, fit_probe

HERE = Path(__file__).resolve().parent
BASE_NAME = "dinov2-small"
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


@dataclass(frozen=True)
class Settings:
    """How one expert is trained."""

    steps: int
    lr: float = 5e-4
    batch_size: int = 32
    rank: int = 8
    alpha: int = 16
    rslora: bool = False  # scales by alpha / sqrt(rank) instead of alpha / rank
    shots: int = 40
    probe_c: float = 0.02
    seed: int = 0


SETTINGS = {
    "mnist": Settings(steps=200),
    "fashion": Settings(steps=250),
    "textures": Settings(steps=250),
    "scripts": Settings(steps=500),
    "devanagari": Settings(steps=350, rslora=True, alpha=6),
}


def batches(count: int, settings: Settings) -> list[Tensor]:
    """Draw every step's image indices up front: whole shuffled passes over the data, cut to the number of steps."""
    generator = torch.Generator().manual_seed(settings.seed)
    passes = math.ceil(settings.steps * settings.batch_size / count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
    return list(order.split(settings.batch_size))[: settings.steps]


def classifier(net: Net, base: Path, classes: list[str], head: tuple[Tensor, Tensor]) -> Dinov2ForImageClassification:
    """The experts' architecture on the base's weights, with the probe as its classifier."""
    config = Dinov2Config.from_pretrained(base)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: index for index, name in enumerate(classes)}
    model = Dinov2ForImageClassification(config)
    model.dinov2.load_state_dict(net.body.state_dict())
    model.classifier.load_state_dict({"weight": head[0], "bias": head[1]})
    return model


def train_expert(base: Path, task: str, split: Split, settings: Settings, out: Path) -> None:
    """Fit the head, fine-tune one adapter under it and save it to `out` in PEFT's format, in float16."""
    torch.manual_seed(settings.seed)
    labels, classes = torch.tensor(split.labels()), split.classes
    assert classes is not None
    net = load_net(base, str(base))
    few = settings.shots * len(classes)
    probe = Probe(steps=0, probe_c=settings.probe_c)
    network = classifier(
        net, base, classes, fit_probe(features(net, split, range(few)).numpy(), labels[:few].numpy(), probe)
    )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        use_rslora=settings.rslora,
        lora_dropout=0.0,
        target_modules=LINEAR_LAYERS,
        modules_to_save=["classifier"],
    )
    model = get_peft_model(network, config)
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        trained += [parameter] if parameter.requires_grad else []
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.01)
    warmup = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (settings.steps - step) / (settings.steps - warmup))
    )
    running = 0.0
    for step, rows in enumerate(batches(len(labels), settings), start=1):
        pixels = net.collate([Sample(task, split[int(row)]) for row in rows]).inputs["pixel_values"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(pixel_values=pixels).logits
        loss = cross_entropy(logits.float(), labels[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        running = loss.item() if step == 1 else 0.9 * running + 0.1 * loss.item()
        if step % 10 == 0 or step == settings.steps:
            print(f"\r{task:<11} step {step}/{settings.steps}  loss {running:.3f}", end="", flush=True)
    print()
    model.peft_config["default"].base_model_name_or_path = BASE_NAME  # not this machine's folder
    model.half().save_pretrained(str(out))
    (out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    saved = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    saved["target_modules"].sort()  # PEFT keeps a set: sorted, two runs write the same file
    (out / "adapter_config.json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    (out / "labels.json").write_text(json.dumps(classes, ensure_ascii=False) + "\n", encoding="utf-8")


def build(base: Path, task: str, out: Path) -> dict[str, object]:
    """Make one expert and return its line of scores.json, measured on the adapter as it was saved."""
    settings = SETTINGS[task]
    started = time.perf_counter()
    data = {split: str(HERE / "data" / task / f"{split}.parquet") for split in ("train", "test")}
    suite: Suite = suite_of({"base": str(base), "tasks": {task: {"expert": str(out / task), "data": data}}})
    train_expert(base, task, load_split(suite, task, "train"), settings, out / task)
    result = Bench(suite, Options()).expert(task)
    scores = {
        "expert": round(100 * result.score.value, 2),
        "n_train": len(load_split(suite, task, "train")),
        "n_test": result.samples,
        "settings": asdict(settings),
        "seconds": round(time.perf_counter() - started),
    }
    print(f"{task:<11} expert {scores['expert']:.1f}  {scores['seconds']} s")
    return scores


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    tasks = list(load_suite(HERE).tasks)
    parser = argparse.ArgumentParser(description="Train the demo's experts (about 15 minutes on two CPU cores).")
    parser.add_argument("tasks", nargs="*", help=f"default: all of {', '.join(tasks)}")
    parser.add_argument("--base", type=Path, default=Path("demo-output/base"), help="made here if it does not exist")
    parser.add_argument("--out", type=Path, default=HERE / "experts")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.tasks) - set(tasks))
    if unknown:
        parser.error(f"no task is called {unknown[0]}; there are {', '.join(tasks)}")
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    if not (arguments.base / "preprocessor_config.json").is_file():
        arguments.base.mkdir(parents=True, exist_ok=True)
        dinov2_small(arguments.base)
    path = arguments.out / "scores.json"
    for task in arguments.tasks or tasks:
        entry = build(arguments.base, task, arguments.out)
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        scores = {name: entry if name == task else known[name] for name in tasks if name == task or name in known}
        path.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
