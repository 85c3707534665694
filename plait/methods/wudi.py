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
Ridge = Annotated[float, Range(0, open_low=True)]
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
    block: Block,
    deltas: Stream,
    *,
    steps: Steps = 300,
    lr: Rate = 0.015,
    lr_absolute: Rate | None = None,
    ridge: Ridge | None = None,
) -> Stream:
    """Descend from Σ τ_k on Σ_k ‖(x − τ_k) τ_kᵀ‖² / ‖τ_k‖² (WUDI, arXiv:2503.08099).

    The loss is quadratic: with A = Σ τ_kᵀτ_k/‖τ_k‖² and B = Σ τ_kτ_kᵀτ_k/‖τ_k‖² its gradient is 2(xA − B), and a step
    costs the same for any number of experts. With `ridge` the minimum of the loss + c·‖x − Σ τ_k‖² is solved for
    instead, x = (B + c Σ τ_k)(A + cI)⁻¹ with c = ridge · tr A/n: it stays near the sum where the experts read little,
    as few steps do, and needs none. That is ours.
    """
    if not is_linear(block.name, block.shape):
        return mean(deltas, [1.0] * len(block.tasks))

    def merge(matrices: torch.Tensor) -> torch.Tensor:
        sizes = [float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) for matrix in matrices]
        if ridge is not None:
            return _ridge(matrices, sizes, ridge)
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


def _terms(matrices: torch.Tensor, sizes: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """[K, m, n] → R [K·m, n] with A = RᵀR, and B [m, n]."""
    # An expert that equals the base has no say.
    scaled = torch.stack([matrix / (size or 1.0) for matrix, size in zip(matrices, sizes, strict=True)])
    target = torch.zeros_like(matrices[0])
    for matrix, part in zip(matrices, scaled, strict=True):
        target += torch.linalg.multi_dot([matrix, part.T, part])
    return scaled.flatten(0, 1), target


def _gradient(matrices: torch.Tensor, sizes: Sequence[float], unit: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """[K, m, n] → x ↦ 2(xA − B/unit). A [n, n] stays in factors where they are smaller."""
    rows, target = _terms(matrices, sizes)
    target /= unit
    if len(rows) < rows.shape[1]:
        return lambda x: ((x @ rows.T) @ rows - target) * 2
    products = rows.T @ rows
    return lambda x: (x @ products - target) * 2


def _ridge(matrices: torch.Tensor, sizes: Sequence[float], ridge: float) -> torch.Tensor:
    """[K, m, n] → [m, n], by Cholesky in float64: A has far fewer large eigenvalues than n."""
    total = fold(matrices)
    rows, target = _terms(matrices.to(torch.float64), sizes)
    if not rows.any():
        return total
    products = rows.T @ rows
    size = ridge * float(products.diagonal().mean())
    products.diagonal().add_(size)
    target.add_(total, alpha=size)
    return torch.cholesky_solve(target.T, torch.linalg.cholesky(products)).T.to(matrices.dtype)


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
    ridge: Ridge | None = None,
    lambda_: float = 1.0,
) -> Stream:
    """Move the sum of the task vectors away from what disturbs each expert, by `steps` of Adam.

    Few steps are the regulariser: the exact minimum is worse. A step is `lr` times the root mean square of Σ τ_k, per
    tensor; `lr_absolute: 1e-5` is the paper's instead. `ridge: 0.1` solves in closed form, in a fraction of the time,
    and takes the steps' place (ours, see `least_interference`). Optimised are the 2-D weights inside layers; everything
    else (biases, norms, embeddings, heads, convolutions) is θ0 + λ·mean_k τ_k.
    """
    merged = least_interference(block, block.deltas, steps=steps, lr=lr, lr_absolute=lr_absolute, ridge=ridge)
    return finishes.add_base(block, finishes.scale(block, merged, lambda_=lambda_))
