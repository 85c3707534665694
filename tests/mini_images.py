"""A tiny suite of images on disk: a ViT of width 32, three tasks about plain pictures, three experts.

    task    its images                          classes
    shade   one grey                            dark, middle, light
    half    a dark and a light half             left, right, top, bottom
    hue     one colour                          red, green, blue

Every expert is the base with noise, and its head is fitted on the expert's own features.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pico
import torch
import transformers
import yaml
from mini_suite import fit_head
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from plait.models.net import Sample, load_net
from plait.suites.definition import Suite, read_suite

CLASSES = {"shade": ["dark", "middle", "light"], "half": ["left", "right", "top", "bottom"],
           "hue": ["red", "green", "blue"]}  # fmt: skip
SIZE, TEST, TRAIN = 28, 36, 60


def make(root: Path) -> Suite:
    """The suite, made in a folder."""
    base = pico.make_vit(root / "base")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(base)
    (root / "data").mkdir()
    tasks: dict[str, Any] = {}
    for place, (task, names) in enumerate(CLASSES.items()):
        splits = {split: draw(task, split) for split in ("train", "adapt", "test")}
        for split, (images, labels) in splits.items():
            write(root / "data" / f"{task}-{split}.parquet", images, labels, names)
        out = root / "experts" / task
        out.parent.mkdir(exist_ok=True)
        pico.experts(root / "made", base, 1, scale=0.3, seed=place)[0].rename(out)
        net = load_net(out, task, processor_from=base)
        with torch.inference_mode():
            features = net.features(net.collate([Sample(task, image) for image in splits["train"][0]]))
        labels = json.dumps({str(index): name for index, name in enumerate(names)})
        head = fit_head(features, splits["train"][1])
        save_file(head, out / "head.safetensors", metadata={"format": "pt", "id2label": labels})
        data = {split: f"data/{task}-{split}.parquet" for split in splits}
        tasks[task] = {"expert": f"experts/{task}", "data": data}
    text = yaml.safe_dump({"name": "pictures", "base": "base", "tasks": tasks}, sort_keys=False)
    (root / "suite.yaml").write_text(text)
    return read_suite(root / "suite.yaml")


def draw(task: str, split: str) -> tuple[list[Image.Image], list[int]]:
    """Images with some noise; one label in ten is wrong, so that no score is perfect."""
    random = np.random.default_rng([list(CLASSES).index(task), ["train", "adapt", "test"].index(split)])
    count = TRAIN if split == "train" else TEST
    kinds = len(CLASSES[task])
    true = np.arange(count) % kinds
    images = [picture(task, int(kind), random) for kind in true]
    return images, np.where(random.random(count) < 0.1, (true + 1) % kinds, true).tolist()


def picture(task: str, kind: int, random: np.random.Generator) -> Image.Image:
    pixels: NDArray[np.float64] = np.full((SIZE, SIZE, 3), 110.0)
    if task == "shade":
        pixels[:] = 60 + 60 * kind
    elif task == "half":
        part = [np.s_[:, : SIZE // 2], np.s_[:, SIZE // 2 :], np.s_[: SIZE // 2], np.s_[SIZE // 2 :]][kind]
        pixels[part] = 180
    else:
        pixels[..., kind] = 180
    pixels += random.normal(0, 15, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def write(path: Path, images: list[Image.Image], labels: list[int], names: list[str]) -> None:
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    files = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        files.append({"bytes": file.getvalue(), "path": None})
    datasets.Dataset.from_dict({"image": files, "label": labels}, features=kinds).to_parquet(path)
