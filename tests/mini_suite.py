"""A tiny real suite on disk: a BERT of width 32, three tasks about words, three experts, all kinds of heads and files.

    task   data     labels                       expert                           its head
    tone   parquet  names, as a ClassLabel       a plain encoder                  head.safetensors in its folder
    count  csv      numbers                      BertForSequenceClassification    its own classifier
    pair   jsonl    names, two columns of text   a plain encoder                  a file of its own, by head:

A text's class is told by its keyword, and one label in ten is wrong, so that no score is perfect. Every expert is the
base with noise, and its head is fitted on the expert's own features: under that head the base is worse.
"""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from plait.suites.definition import Suite, read_suite

WORDS = [f"w{index}" for index in range(pico.VOCAB - 4)]
CLASSES = {"tone": ["calm", "loud", "odd"], "count": ["few", "many"], "pair": ["same", "other", "part", "none"]}
TEST, TRAIN = 60, 90
NOISE = 0.5


@dataclass(frozen=True)
class Rows:
    """Inputs and class indices of one split."""

    inputs: list[Any]
    labels: list[int]


@dataclass(frozen=True)
class MiniSuite:
    """The suite, and what is in its files."""

    root: Path
    suite: Suite
    rows: dict[str, dict[str, Rows]]

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def cache(self) -> Path:
        """One cache for all tests that do not ask what is cached."""
        return self.root / "cache"

    def expert(self, task: str) -> Path:
        return self.root / "experts" / task

    def copy(self, out: Path) -> Path:
        """The suite once more, to be changed; returns its suite.yaml."""
        shutil.copytree(self.root, out, ignore=shutil.ignore_patterns("cache"), dirs_exist_ok=True)
        return out / "suite.yaml"

    def head(self, task: str) -> dict[str, Tensor]:
        """weight and bias as they are on disk."""
        files = {"tone": "experts/tone/head.safetensors", "pair": "heads/pair.safetensors"}
        stored = load_file(self.root / files.get(task, "experts/count/model.safetensors"))
        return {name[11:]: value for name, value in stored.items() if name.startswith("classifier.")}


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> MiniSuite:
    """The suite of this module, made once."""
    return make(tmp_path_factory.mktemp("mini"))


def make(root: Path) -> MiniSuite:
    base = pico.make_bert(root / "base", layers=2)
    add_tokenizer(base)
    rows = {task: {split: draw(task, split) for split in ("train", "adapt", "test")} for task in CLASSES}
    for place, task in enumerate(CLASSES):
        make_expert(root, task, rows[task]["train"], seed=place)
    data = {task: {split: write(root, task, split, found) for split, found in rows[task].items()} for task in CLASSES}
    text = yaml.safe_dump(definition(data), sort_keys=False)
    (root / "suite.yaml").write_text(text)
    return MiniSuite(root, read_suite(root / "suite.yaml"), rows)


def definition(data: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "mini", "base": "base", "pooling": "mean", "max_length": 16,
        "tasks": {
            "tone": {"expert": "experts/tone", "data": data["tone"]},
            "count": {"expert": "experts/count", "classes": CLASSES["count"], "data": data["count"]},
            "pair": {"expert": "experts/pair", "head": "heads/pair.safetensors", "classes": CLASSES["pair"],
                     "data": data["pair"]},
        },
    }  # fmt: skip


def draw(task: str, split: str) -> Rows:
    """Texts of a few words, one of them the keyword of the class; all splits are disjoint."""
    random = np.random.default_rng([list(CLASSES).index(task), ["train", "adapt", "test"].index(split)])
    count = TRAIN if split == "train" else TEST
    kinds = len(CLASSES[task])
    true = np.arange(count) % kinds
    offset = 10 * list(CLASSES).index(task)
    inputs = []
    for label in true:
        words = random.choice(WORDS[40:], random.integers(3, 7)).tolist()
        words.insert(int(random.integers(0, len(words))), WORDS[offset + label])
        text = " ".join(words)
        inputs.append((text, " ".join(random.choice(WORDS[40:], 3))) if task == "pair" else text)
    wrong = random.random(count) < 0.1
    labels = np.where(wrong, (true + 1) % kinds, true)
    return Rows(inputs, labels.tolist())


def make_expert(root: Path, task: str, train: Rows, seed: int) -> None:
    out = root / "experts" / task
    base = root / "base"
    out.parent.mkdir(exist_ok=True)
    if task == "count":
        pico.make_bert_classifier(out, seed, labels=len(CLASSES[task]), base_folder=base, scale=NOISE)
    else:
        pico.experts(root / "made", base, 1, scale=NOISE, seed=seed)[0].rename(out)
    add_tokenizer(out)
    head = fit_head(features(out, train.inputs), train.labels)
    names = json.dumps({str(index): name for index, name in enumerate(CLASSES[task])})
    if task == "count":
        stored = load_file(out / "model.safetensors")
        save_file({**stored, **head}, out / "model.safetensors", metadata={"format": "pt"})
    elif task == "tone":
        save_file(head, out / "head.safetensors", metadata={"format": "pt", "id2label": names})
    else:
        (root / "heads").mkdir()
        save_file(head, root / "heads" / "pair.safetensors", metadata={"format": "pt", "id2label": names})


def fit_head(inputs: Tensor, labels: list[int]) -> dict[str, Tensor]:
    """Ridge regression to one-hot labels."""
    plus = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1).double()
    target = torch.nn.functional.one_hot(torch.tensor(labels)).double()
    found = torch.linalg.solve(plus.T @ plus + 0.01 * torch.eye(plus.shape[1]), plus.T @ target).float().T
    return {"classifier.weight": found[:, :-1].contiguous(), "classifier.bias": found[:, -1].contiguous()}


@torch.inference_mode()
def features(folder: Path, inputs: list[Any]) -> Tensor:
    """Mean over tokens of the last layer, by transformers alone, one input at a time: [n, width]."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    body = transformers.AutoModel.from_pretrained(folder).eval()
    found = []
    for value in inputs:
        texts = value if isinstance(value, tuple) else (value,)
        encoded = tokenizer(*texts, truncation=True, max_length=16, return_tensors="pt")
        found.append(body(**encoded).last_hidden_state[0].mean(dim=0))
    return torch.stack(found)


def write(root: Path, task: str, split: str, rows: Rows) -> Any:
    """A data file, and its entry in suite.yaml."""
    (root / "data").mkdir(exist_ok=True)
    names = CLASSES[task]
    if task == "tone":
        import datasets

        path = f"data/tone-{split}.parquet"
        kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        table = datasets.Dataset.from_dict({"text": rows.inputs, "label": rows.labels}, features=kinds)
        table.to_parquet(root / path)
        return path
    if task == "count":
        path = f"data/count-{split}.csv"
        with open(root / path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([("sentence", "label"), *zip(rows.inputs, rows.labels, strict=True)])
        return path
    path = f"data/pair-{split}.jsonl"
    lines = [
        json.dumps({"first": one, "second": two, "answer": names[label]})
        for (one, two), label in zip(rows.inputs, rows.labels, strict=True)
    ]
    (root / path).write_text("\n".join(lines) + "\n")
    return {"path": path, "input": ["first", "second"], "label": "answer"}


def add_tokenizer(folder: Path, pad: bool = True) -> None:
    """Words, with <s> and </s> round them; without padding the tokenizer of a decoder, which has <s> only."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {word: at for at, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    end = " </s>" if pad else ""
    core.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"<s> $A{end}", pair=f"<s> $A{end} $B:1{end and ' </s>:1'}", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if pad else [])]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_input_names=inputs,
        **({"pad_token": "<pad>"} if pad else {}),
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
