"""The five tasks' images, and the one way in which every step of the demo turns them into model inputs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

TASKS = ("mnist", "fashion", "textures", "scripts", "devanagari")
DATA = Path(__file__).resolve().parent / "data"
TILE = 32  # the stored images' side
INPUT_SIZE = 56  # four patches of 14 pixels: small enough for a CPU
_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)  # ImageNet's, as in DINOv2's pre-training
_STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Examples:
    """Grey images (n, 32, 32, uint8), their labels (n, int64) and the class names."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]


def load(task: str, split: Split) -> Examples:
    """Cut one split's sheet into its images.

    A sheet has one column of tiles per class. Reading it row by row gives every class once before any class twice, so
    that the first k rows are a balanced few-shot set.
    """
    classes = tuple(json.loads((DATA / "classes.json").read_text(encoding="utf-8"))[task])
    with Image.open(DATA / f"{task}_{split}.png") as sheet:
        pixels = torch.from_numpy(np.array(sheet.convert("L"), dtype=np.uint8))
    rows, columns = pixels.shape[0] // TILE, len(classes)
    if tuple(pixels.shape) != (rows * TILE, columns * TILE):
        raise ValueError(f"{task}_{split}.png is {tuple(pixels.shape)}: not whole tiles of {columns} classes.")
    tiles = pixels.view(rows, TILE, columns, TILE).permute(0, 2, 1, 3).reshape(-1, TILE, TILE)
    return Examples(tiles.contiguous(), torch.arange(columns).repeat(rows), classes)


def pixel_values(images: Tensor) -> Tensor:
    """Turn grey uint8 tiles (n, 32, 32) into the encoder's float input (n, 3, 56, 56)."""
    scaled = images.float().div(255).unsqueeze(1)
    resized = torch.nn.functional.interpolate(scaled, size=INPUT_SIZE, mode="bicubic", align_corners=False)
    return (resized.clamp(0, 1) - _MEAN) / _STD
