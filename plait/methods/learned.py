"""Methods that learn a few numbers, or a mask, before they merge: what is asked of a fit, how it is applied.

    adamerging                  θ0 + Σ_k λ_k τ_k, λ learned
    adamerging_pp               the same on trimmed task vectors that agree in sign
    awd_adamerging              the same on disentangled task vectors
    tsv_adamerging              the same on the orthogonal parts that TSV-M adds up
    self_positioning            the same under a contrastive loss, for embedding models
    concrete_task_arithmetic    θ0 + λ Σ_k m/mean(m) · τ_k, mask m learned
    concrete_adamerging         θ0 + Σ_k λ_k m/mean(m) · τ_k, both learned

Learning itself is `plait.learn`'s; here nothing reads data. `block.learned` is what was learned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from plait.lazy import torch
from plait.methods import combines, finishes, transforms
from plait.methods.awd import diagnostics, subtract, survey_awd
from plait.methods.block import Block
from plait.methods.contract import Fraction, Learned, PerModel, Range, merge_method
from plait.methods.matrices import is_matrix
from plait.methods.spectral import singular_parts
from plait.methods.stream import Stream
from plait.methods.survey import survey_trim

Count = Annotated[int, Range(1)]
Rate = Annotated[float, Range(0, open_low=True)]
Granularity = Literal["task", "layer", "block", "tensor"]
Objective = Literal["entropy", "agreement", "contrastive"]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Keys under `fit:` of every method that learns by gradients. The defaults keep the honest protocol.

    `protocol: paper` takes the authors' settings for all that is not given (`PAPER`), adapts on the suite's test inputs
    as they did, and does not stop early.
    """

    PAPER: ClassVar[dict[str, Any]] = {"objective": "entropy", "guard": False}

    protocol: Literal["honest", "paper"] = "honest"
    objective: Objective = "agreement"
    steps: Count = 60
    lr: Rate = 0.05
    batch: Count = 16
    """Inputs of every task in a step."""
    temperature: Rate = 1.0
    """Divides the scores before the softmax of the objective."""
    guard: bool = True
    """Stop when a task collapses, and go back to the best state."""
    precision: Literal["float32", "bfloat16"] = "float32"
    forward: Count = 128
    """Inputs in one forward and backward: more tasks than fit are done one after another, and gradients add up."""


@dataclass(frozen=True, kw_only=True)
class CoefficientFit(Fit):
    """Keys under `fit:` of AdaMerging and its kin."""

    PAPER: ClassVar[dict[str, Any]] = {"objective": "entropy", "guard": False, "steps": 500, "lr": 1e-3, "clamp": True}

    granularity: Granularity = "tensor"
    """One coefficient per expert (task-wise), and per layer, block or tensor (the papers' layer-wise)."""
    init: float = 0.3
    clamp: bool = False
    """Keep the coefficients in [0, 1], as `protocol: paper` does. Here it costs up to four points (docs/LOG.md)."""
    stay: Annotated[float, Range(0)] = 0.0
    """Weight of the penalty on the mean squared move of the coefficients from `init`."""


@dataclass(frozen=True, kw_only=True)
class PartsFit(CoefficientFit):
    """Keys under `fit:` of AdaMerging on TSV-M's parts: it begins as TSV-M, at the upper end of a clamp."""

    PAPER: ClassVar[dict[str, Any]] = {**CoefficientFit.PAPER, "clamp": False}

    init: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PositionFit(CoefficientFit):
    """Keys under `fit:` of Self Positioning."""

    PAPER: ClassVar[dict[str, Any]] = {"guard": False}

    objective: Objective = "contrastive"
    granularity: Granularity = "task"
    temperature: Rate = 0.05
    clamp: bool = True
    stay: Annotated[float, Range(0)] = 0.1


@dataclass(frozen=True, kw_only=True)
class MaskFit(Fit):
    """Keys under `fit:` of Concrete task arithmetic."""

    PAPER: ClassVar[dict[str, Any]] = {"objective": "entropy", "guard": False, "steps": 2000, "lr": 1e-3}

    lr: Rate = 0.1
    concrete: Rate = 0.5
    """Temperature of the Concrete distribution."""
    init: float = 0.3
    """The one weight of all task vectors."""


@dataclass(frozen=True, kw_only=True)
class BilevelFit(CoefficientFit):
    """Keys under `fit:` of Concrete AdaMerging: `steps` and `lr` are the mask's, `finetune_…` follow it."""

    PAPER: ClassVar[dict[str, Any]] = {
        "objective": "entropy", "guard": False, "steps": 1000, "lr": 1e-3, "inner_lr": 1.0, "finetune_steps": 1000,
        "finetune_lr": 1e-3,
    }  # fmt: skip

    steps: Count = 40
    lr: Rate = 0.1
    concrete: Rate = 0.5
    inner_lr: Rate = 0.1
    inner: Literal["adam", "sgd"] = "adam"
    clamp: bool = True
    finetune_steps: Annotated[int, Range(0)] = 40
    finetune_lr: Rate = 0.05


def options_of(learned: Learned, given: dict[str, Any]) -> Any:
    """The options of a fit from checked keys: those given, else the paper's where asked for, else the defaults."""
    kind: Any = learned.options
    paper = kind.PAPER if given.get("protocol") == "paper" else {}
    return kind(**{**paper, **given})


def plain(block: Block, **_: Any) -> Stream:
    """The task vectors as they are."""
    return block.deltas


def elected(block: Block, *, density: Any = 0.2, trim: Any = "tensor") -> Stream:
    """Trimmed task vectors, without what disagrees with the elected sign."""
    return transforms.agree(block, transforms.trim(block, block.deltas, density=density, trim=trim))


def parts(block: Block, **_: Any) -> Stream:
    """What each expert gives to TSV-M."""
    return singular_parts(block, block.deltas)


def disentangled(
    block: Block, *, optimizer: Any = "gd", alpha: Any = 0.1, beta: Any = 0.01, scale: Any = "relative"
) -> Stream:
    """Task vectors without what they redundantly share."""
    return subtract(block, block.deltas, optimizer=optimizer, alpha=alpha, beta=beta, scale=scale)


def weighted(block: Block, vectors: Stream) -> Stream:
    """Σ λ_k v_k with the learned coefficients of this tensor."""
    return combines.sum_(block, vectors, weight=block.learned.coefficients(block.name))


_POINTS = 32
"""Quantiles of the noise over which the mean of a mask is taken: exact to 1e-3."""
EvalMask = Literal["mean", "sample", "binary"]


def masked(block: Block, vectors: Stream, eval_mask: EvalMask) -> Stream:
    """m/mean(m) · v_k with the learned mask, its mean taken over the tensor; as they are where there is none.

    mean: the expectation of a draw, which σ(x/T) is not. sample: one draw, as the authors evaluate. binary: x ≥ 0.
    """
    mask = mask_of(block, eval_mask)
    if mask is None:
        return vectors
    total = float(mask.total(lambda values: values.sum(dtype=torch.float64)))
    if total <= 0:
        return vectors.map(torch.zeros_like)
    scale = block.grid.numel / total
    return vectors.map(lambda values, share: values * (share * scale), mask)


def mask_of(block: Block, eval_mask: EvalMask) -> Stream | None:
    """The mask of this tensor, [n] in [0, 1]; None for a tensor that has none."""
    logits, temperature = block.learned.mask(block), float(block.learned.option("concrete"))
    if logits is None:
        return None
    if eval_mask == "binary":
        return logits.map(lambda x: (x >= 0).to(x.dtype))
    if eval_mask == "sample":
        return logits.map_pieces(
            lambda x, piece: concrete(x, block.draw("mask", piece).to(x.device, x.dtype), temperature)
        )
    return logits.map(lambda x: expected(x, temperature))


def concrete(x: torch.Tensor, u: torch.Tensor, temperature: float) -> torch.Tensor:
    """σ((log u − log(1 − u) + x)/T): a draw of the Concrete distribution from uniform numbers."""
    return torch.sigmoid((torch.logit(u, eps=2.0**-24) + x) / temperature)


def weighted_by_mask(block: Block, vectors: Stream, *, eval_mask: EvalMask = "mean") -> Stream:
    """λ Σ_k m/mean(m) · v_k with the learned mask and the one weight that the fit began with."""
    weight = float(block.learned.option("init"))
    return combines.sum_(block, masked(block, vectors, eval_mask), weight=weight)


def weighted_and_masked(block: Block, vectors: Stream, *, eval_mask: EvalMask = "mean") -> Stream:
    """Σ_k λ_k m/mean(m) · v_k with the learned mask and coefficients."""
    return weighted(block, masked(block, vectors, eval_mask))


COMBINES = {
    "adamerging": weighted,
    "concrete_task_arithmetic": weighted_by_mask,
    "concrete_adamerging": weighted_and_masked,
}
"""Combines that learn, by the name of the method whose fit they have."""


def expected(x: torch.Tensor, temperature: float) -> torch.Tensor:
    """E_u[σ((logit u + x)/T)], by the midpoint rule: what draws are on average, and what a fit has seen.

    σ(x/T) is the median draw. At T = 0.5 it is far more extreme, and merges much worse (docs/LOG.md).
    """
    total = torch.zeros_like(x)
    for j in range(_POINTS):
        total += torch.sigmoid((x + math.log((j + 0.5) / (_POINTS - j - 0.5))) / temperature)
    return total.div_(_POINTS)


def _finish(block: Block, delta: Stream) -> Stream:
    return finishes.add_base(block, delta)


@merge_method("adamerging", paper="arXiv:2310.02575", learned=Learned("coefficients", CoefficientFit, plain))
def adamerging(block: Block) -> Stream:
    """Learn the weight of every task vector, per expert and tensor, from unlabeled inputs: θ0 + Σ_k λ_k τ_k.

    The authors minimise the entropy of the predictions on the test inputs themselves, 500 to 1000 steps at 1e-3
    (`protocol: paper`).
    """
    return _finish(block, weighted(block, plain(block)))


@merge_method(
    "adamerging_pp",
    paper="arXiv:2310.02575",
    survey=survey_trim,
    learned=Learned("coefficients", CoefficientFit, elected),
)
def adamerging_pp(
    block: Block, *, density: PerModel[Fraction] = 0.2, trim: Literal["tensor", "model"] = "tensor"
) -> Stream:
    """AdaMerging++: learned weights on task vectors that were trimmed and that agree with the elected sign."""
    return _finish(block, weighted(block, elected(block, density=density, trim=trim)))


@merge_method(
    "awd_adamerging",
    paper="arXiv:2411.18729",
    survey=survey_awd,
    explain=diagnostics,
    learned=Learned("coefficients", CoefficientFit, disentangled),
)
def awd_adamerging(
    block: Block,
    *,
    optimizer: Literal["gd", "adam"] = "gd",
    alpha: Annotated[float, Range(0)] = 0.1,
    beta: Rate = 0.01,
    scale: Literal["relative", "paper"] = "relative",
) -> Stream:
    """AdaMerging on task vectors without the one vector that they redundantly share (AWD over the whole model).

    AWD's other settings: spell it out, with `transforms: [{awd: {…}}]` and `combine: adamerging`.
    """
    vectors = disentangled(block, optimizer=optimizer, alpha=alpha, beta=beta, scale=scale)
    return _finish(block, weighted(block, vectors))


@merge_method(
    "tsv_adamerging",
    paper="arXiv:2412.00081",
    whole_if=is_matrix,
    cost=87,
    learned=Learned("coefficients", PartsFit, parts),
)
def tsv_adamerging(block: Block) -> Stream:
    """Begin as TSV-M, and learn how much of each expert's orthogonal part every tensor takes.

    Ours: AdaMerging (arXiv:2310.02575) on the parts that TSV-M adds up, instead of on task vectors that interfere.
    """
    return _finish(block, weighted(block, parts(block)))


@merge_method(
    "self_positioning", paper="arXiv:2410.15035", learned=Learned("coefficients", PositionFit, plain, "unlabeled pairs")
)
def self_positioning(block: Block) -> Stream:
    """Learn the weights of embedding models' task vectors under a contrastive loss on pairs, kept near the start."""
    return _finish(block, weighted(block, plain(block)))


@merge_method("concrete_task_arithmetic", paper="arXiv:2312.06173", learned=Learned("mask", MaskFit, plain))
def concrete_task_arithmetic(block: Block, *, eval_mask: EvalMask = "mean") -> Stream:
    """Learn one soft mask for all experts' task vectors from unlabeled inputs: θ0 + λ Σ_k m/mean(m) · τ_k."""
    return _finish(block, weighted_by_mask(block, plain(block), eval_mask=eval_mask))


@merge_method("concrete_adamerging", paper="arXiv:2312.06173", learned=Learned("bilevel", BilevelFit, plain))
def concrete_adamerging(block: Block, *, eval_mask: EvalMask = "mean") -> Stream:
    """Learn a shared mask and the weights of the masked task vectors in turn: θ0 + Σ_k λ_k m/mean(m) · τ_k."""
    return _finish(block, weighted_and_masked(block, plain(block), eval_mask=eval_mask))
