"""WUDI (arXiv:2503.08099): the merged task vector that disturbs each expert least where the expert's own vector reads.

The rows of a Linear's task vector span, nearly, the inputs it was trained on: no data is needed to know them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated

from plait.lazy import torch
from plait.methods import finishes
from plait.methods.block import Block
from plait.methods.contract import Range, merge_method
from plait.methods.matrices import is_matrix, mean, on_matrix
from plait.methods.stream import Stream
from plait.methods.transforms import fold

Steps = Annotated[int, Range(0)]
Rate = Annotated[float, Range(0)]
FIRST_DECAY, SECOND_DECAY, TINY = 0.9, 0.999, 1e-8
"""Adam's usual constants (arXiv:1412.6980)."""
_NOISE = 1e-5
"""Share of the gradient at zero below which nothing interferes, and Adam would only follow rounding errors."""


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a Linear inside a layer: a 2-D matrix with a layer's number in its name.

    A name without dots stands for a tensor that was given alone, and counts.
    """
    inside = "." not in name or any(part.isdigit() for part in name.split("."))
    return inside and len(shape) == 2 and is_matrix(name, shape)


def least_interference(
    block: Block, deltas: Stream, *, steps: Steps = 300, lr: Rate = 0.015, lr_absolute: Rate | None = None
) -> Stream:
    """Descend from Σ τ_k on Σ_k ‖(x − τ_k) τ_kᵀ‖² / ‖τ_k‖² (WUDI, arXiv:2503.08099).

    The loss is quadratic: with A = Σ τ_kᵀτ_k/‖τ_k‖² and B = Σ τ_kτ_kᵀτ_k/‖τ_k‖² its gradient is 2(xA − B), and a step
    costs the same for any number of experts.
    """
    if not is_linear(block.name, block.shape):
        return mean(deltas, [1.0] * len(block.tasks))

    def merge(matrices: torch.Tensor) -> torch.Tensor:
        sizes = [float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) for matrix in matrices]
        # In units of the task vectors' entries, so that Adam's smallest denominator is far below any gradient.
        unit = math.hypot(*sizes) / math.sqrt(matrices.numel())
        x = fold(matrices) / unit
        rate = lr * _root_mean_square(x) if lr_absolute is None else lr_absolute / unit
        gradient = _gradient(matrices, sizes, unit)
        if _root_mean_square(gradient(x)) > _NOISE * _root_mean_square(gradient(torch.zeros_like(x))):
            x = _adam(x, gradient, rate, steps)
        return x * unit

    return on_matrix(block, merge, deltas)


def _root_mean_square(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) / math.sqrt(values.numel())


def _gradient(matrices: torch.Tensor, sizes: Sequence[float], unit: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """[K, m, n] → x ↦ 2(xA − B/unit). A [n, n] stays in factors where they are smaller."""
    # An expert that equals the base has no say.
    scaled = torch.stack([matrix / (size or 1.0) for matrix, size in zip(matrices, sizes, strict=True)])
    target = torch.zeros_like(matrices[0])
    for matrix, part in zip(matrices, scaled, strict=True):
        target += torch.linalg.multi_dot([matrix, part.T, part])
    target /= unit
    rows = scaled.flatten(0, 1)  # [K·m, n]
    if len(rows) < rows.shape[1]:
        return lambda x: ((x @ rows.T) @ rows - target) * 2
    products = rows.T @ rows
    return lambda x: (x @ products - target) * 2


def _adam(x: torch.Tensor, gradient: Callable[[torch.Tensor], torch.Tensor], rate: float, steps: int) -> torch.Tensor:
    """Steps of Adam from x, in place."""
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, steps + 1):
        slope = gradient(x)
        first.lerp_(slope, 1 - FIRST_DECAY)
        second.mul_(SECOND_DECAY).addcmul_(slope, slope, value=1 - SECOND_DECAY)
        size = (second / (1 - SECOND_DECAY**step)).sqrt_().add_(TINY)
        x.addcdiv_(first, size, value=-rate / (1 - FIRST_DECAY**step))
    return x


@merge_method("wudi", paper="arXiv:2503.08099", whole_if=is_linear, cost=1800)
def wudi(
    block: Block,
    *,
    steps: Steps = 300,
    lr: Rate = 0.015,
    lr_absolute: Rate | None = None,
    lambda_: float = 1.0,
) -> Stream:
    """Move the sum of the task vectors away from what disturbs each expert, by `steps` of Adam.

    Few steps are the regulariser: the exact minimum is worse. A step is `lr` times the root mean square of Σ τ_k, per
    tensor; `lr_absolute: 1e-5` is the paper's instead. Optimised are the 2-D weights inside layers; everything else
    (biases, norms, embeddings, heads, convolutions) is θ0 + λ·mean_k τ_k.
    """
    merged = least_interference(block, block.deltas, steps=steps, lr=lr, lr_absolute=lr_absolute)
    return finishes.add_base(block, finishes.scale(block, merged, lambda_=lambda_))
