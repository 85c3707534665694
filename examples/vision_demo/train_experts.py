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
import transformers
from base import BaseUnavailableError, restore_base
from evaluate import accuracy, classifier, expert_accuracy, features
from peft import LoraConfig, get_peft_model
from tasks import TASKS, Examples, load, pixel_values
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from transformers import Dinov2Model

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


def fit_probe(inputs: Tensor, labels: Tensor, classes: int, c: float) -> dict[str, Tensor]:
    """Fit multinomial logistic regression with an L2 penalty; `c` weighs the data as in scikit-learn."""
    inputs = inputs.clone()  # tensors made in inference mode cannot take part in autograd
    weight = torch.zeros(classes, inputs.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(linear(inputs, weight, bias), labels) + weight.square().sum() / (2 * c * len(labels))
        loss.backward()
        return loss

    optimizer.step(closure)
    return {"weight": weight.detach(), "bias": bias.detach()}


def batches(examples: Examples, settings: Settings) -> list[Tensor]:
    """Draw every step's image indices up front: whole shuffled passes over the data, cut to the number of steps."""
    generator = torch.Generator().manual_seed(settings.seed)
    count = len(examples.labels)
    passes = math.ceil(settings.steps * settings.batch_size / count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
    return list(order.split(settings.batch_size))[: settings.steps]


def train_expert(base_dir: Path, task: str, settings: Settings, head: dict[str, Tensor], out: Path) -> None:
    """Fine-tune one adapter under `head` and save it to `out` in PEFT's format, in float16."""
    torch.manual_seed(settings.seed)
    examples = load(task, "train")
    network = classifier(base_dir, examples.classes)
    network.classifier.load_state_dict(head)
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
    for step, rows in enumerate(batches(examples, settings), start=1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(pixel_values=pixel_values(examples.images[rows])).logits
        loss = cross_entropy(logits.float(), examples.labels[rows])
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
    (out / "labels.json").write_text(json.dumps(examples.classes, ensure_ascii=False) + "\n", encoding="utf-8")


def build(base_dir: Path, task: str, out: Path) -> dict[str, object]:
    """Make one expert and return its line of scores.json, measured on the adapter as it was saved."""
    settings = SETTINGS[task]
    started = time.perf_counter()
    examples = load(task, "train")
    few = settings.shots * len(examples.classes)
    encoder = Dinov2Model.from_pretrained(base_dir).eval()
    head = fit_probe(
        features(encoder, examples.images[:few]), examples.labels[:few], len(examples.classes), settings.probe_c
    )
    train_expert(base_dir, task, settings, head, out / task)
    scores = {
        "base": round(accuracy(encoder, task, head), 2),
        "expert": round(expert_accuracy(base_dir, out / task, task), 2),
        "n_train": len(examples.labels),
        "n_test": len(load(task, "test").labels),
        "settings": asdict(settings),
        "seconds": round(time.perf_counter() - started),
    }
    print(f"{task:<11} base {scores['base']:.1f}  expert {scores['expert']:.1f}  {scores['seconds']} s")
    return scores


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Train the demo's experts (about 15 minutes on two CPU cores).")
    parser.add_argument("tasks", nargs="*", default=list(TASKS), choices=TASKS, help="default: all")
    parser.add_argument("--base", type=Path, default=Path("demo-output/base"), help="made here if it does not exist")
    parser.add_argument("--out", type=Path, default=HERE / "experts")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    try:
        restore_base(arguments.base)
    except BaseUnavailableError as error:
        print(error, file=sys.stderr)
        return 1
    path = arguments.out / "scores.json"
    for task in arguments.tasks:
        entry = build(arguments.base, task, arguments.out)
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        scores = {name: entry if name == task else known[name] for name in TASKS if name == task or name in known}
        path.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
