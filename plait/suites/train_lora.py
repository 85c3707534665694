"""Training a language model's expert: a LoRA adapter that answers one kind of question.

The loss is on the tokens of the answer alone. Answers that are written (rather than chosen among classes) are taught to
end as well. The adapter is saved as peft saves it, so an expert here is what users have: a small folder beside a base.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from plait.errors import MachineError
from plait.models.answers import AnswerNet
from plait.models.net import load_net
from plait.models.quiet import quiet
from plait.suites.data import Split
from plait.suites.train import Tell, batches, train_split, warmed_up

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All linear layers of a Llama block."""


@dataclass(frozen=True)
class LoraSettings:
    """What an expert is asked, and how it is trained to answer."""

    prompt: str
    """The question, with {text} in it."""
    classes: tuple[str, ...] | None = None
    """Possible answers; without them the answer is written, and compared with the label as a text."""
    steps: int = 80
    lr: float = 1e-3
    batch_size: int = 16
    rank: int = 16
    alpha: int = 32
    first_layer: int = 15
    """Layers before this one stay the base's."""
    seed: int = 0


def make_adapter(
    base: Path, data: Path, out: Path, settings: LoraSettings, *, max_length: int = 512, tell: Tell | None = None
) -> None:
    """Train one adapter of `base` on `data`/train.jsonl and write it to `out`. Whole or not.

    One thread, so that adapters made side by side are the same as made one by one.
    """
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    net = load_net(base, str(base), max_length=max_length)
    asking = AnswerNet(net.body, net.family, net.processor, net.pooling, net.max_length)
    prompts, targets = _examples(asking, train_split(data / "train.jsonl"), settings)
    model = _with_adapter(net.body, settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
    schedule = warmed_up(optimizer, settings.steps)
    for step, rows in enumerate(batches(len(prompts), settings.steps, settings.batch_size, settings.seed)):
        picked = rows.tolist()
        packed = asking.pack([prompts[row] for row in picked], [targets[row] for row in picked])
        answer_loss(model, packed).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if tell is not None:
            tell(step + 1)
    _save(model, out)


def answer_loss(model: Any, packed: dict[str, Tensor]) -> Tensor:
    """Mean of -log p over the tokens of all answers.

    Only the places that foretell one of them go through the output layer, which is a fifth of a small model.
    """
    real = packed["targets"] >= 0
    rows = packed["reading"].unsqueeze(1).expand_as(real)[real]
    body = model.get_base_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = body.get_decoder()(
            input_ids=packed["input_ids"], attention_mask=packed["attention_mask"], use_cache=False
        ).last_hidden_state
        logits = body.get_output_embeddings()(hidden[rows, packed["places"][real]])  # [answer tokens, vocabulary]
    return cross_entropy(logits.float(), packed["targets"][real])


def _examples(net: AnswerNet, split: Split, settings: LoraSettings) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of every row's question, and of its answer."""
    pairs = [
        net.tokens(settings.prompt.format(text=split[row]), answer)
        for row, answer in enumerate(split.labels(as_text=True))
    ]
    end = [net.processor.eos_token_id] if settings.classes is None else []
    return [prompt for prompt, _ in pairs], [target + end for _, target in pairs]


def _with_adapter(body: Any, settings: LoraSettings) -> Any:
    try:
        import peft
    except ImportError:
        raise MachineError('training adapters needs the package peft: pip install "plait[suites]"') from None
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=list(LINEAR), task_type="CAUSAL_LM",
        layers_to_transform=list(range(settings.first_layer, body.config.num_hidden_layers)),
    )  # fmt: skip
    with quiet():
        model = peft.get_peft_model(body, config)
    model.peft_config["default"].base_model_name_or_path = "../../base"  # as the suite's folder lies, wherever it is
    return model


def _save(model: Any, out: Path) -> None:
    scratch = out.with_name(f".{out.name}-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        with quiet():
            model.save_pretrained(str(scratch), save_embedding_layers=False)
        (scratch / "README.md").unlink(missing_ok=True)  # a form for peft's users to fill in, all blank
        shutil.rmtree(out, ignore_errors=True)
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
