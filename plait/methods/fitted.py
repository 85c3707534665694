"""Methods that run the experts on a few unlabeled inputs, and then merge in closed form; and one that mends features.

    fisher        Σ_k a_k F_k θ_k / Σ_k a_k F_k, F_k the diagonal Fisher information
    regmean       Linear layers by least squares on the experts' own activations, the rest averaged
    regmean_pp    the same, layer by layer, on activations of the layers that are already merged
    surgery       task arithmetic, and for each task a small correction of the features

Learning itself is `plait.learn`'s. The first three store the task vector of the merged model, surgery its corrections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from plait.methods import combines, finishes
from plait.methods.block import Block, per_model
from plait.methods.contract import Fraction, Learned, PerModel, Range, merge_method
from plait.methods.learned import Count, Rate, plain
from plait.methods.stream import Stream

Positive = Annotated[float, Range(0, open_low=True)]


@dataclass(frozen=True, kw_only=True)
class FisherFit:
    """Keys under `fit:` of Fisher merging."""

    inputs: Count = 256
    """At most so many of every expert."""
    labels: Literal["sampled", "expected"] = "sampled"
    """Squared gradients of one label drawn from the expert's answer, or summed over all labels by their probability:
    that costs a backward pass for every label, and drawing costs one."""
    precision: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class RegressionFit:
    """Keys under `fit:` of RegMean and RegMean++."""

    inputs: Count = 256
    """At most so many of every expert."""
    batch: Count = 32
    off_diagonal: Fraction = 0.95
    """Multiplies the Gram matrices off their diagonals. Causal language models need less: 0.6."""
    precision: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class SurgeryFit:
    """Keys under `fit:` of representation surgery. `protocol: paper` adapts on the suite's test inputs."""

    PAPER: ClassVar[dict[str, Any]] = {"guard": False}

    protocol: Literal["honest", "paper"] = "honest"
    rank: Count = 16
    steps: Count = 1000
    lr: Rate = 1e-3
    batch: Count = 16
    guard: bool = True
    """Keep the step that is nearest to the expert on inputs that are only watched."""
    precision: Literal["float32", "bfloat16"] = "float32"


def shared(block: Block, *, weight: PerModel[Positive] = 1.0) -> Stream:
    """The task vectors as they are: their weights are part of what is learned, so a state is for these alone."""
    return block.deltas


def scaled(block: Block, *, weight: PerModel[float] = 0.3) -> Stream:
    """The task vectors times their weights: they add up to the merge."""
    weights = per_model(weight, len(block.tasks))
    return block.deltas.map(lambda values: values * combines.column(weights, values))


def learned_or_mean(block: Block, weight: PerModel[float] = 1.0) -> Stream:
    """θ0 + the learned task vector; the weighted mean of the experts where none was learned."""
    delta = block.learned.delta(block)
    if delta is None:
        delta = combines.sum_(block, block.deltas, weight=weight, normalize=True)
    return finishes.add_base(block, delta)


@merge_method("fisher", paper="arXiv:2111.09832", learned=Learned("fisher", FisherFit, shared))
def fisher(block: Block, *, weight: PerModel[Positive] = 1.0) -> Stream:
    """Average the experts entry by entry, each as far as its own predictions depend on the entry.

    Σ_k a_k F_k θ_k / Σ_k a_k F_k with a_k = weight; F_k is the mean over inputs of the squared gradients of log p under
    the expert's own answers, + 1e-6.
    """
    return learned_or_mean(block, weight)


@merge_method("regmean", paper="arXiv:2212.09849", learned=Learned("regmean", RegressionFit, plain))
def regmean(block: Block) -> Stream:
    """Make every Linear layer answer as each expert's does on that expert's own activations; average all else.

    G_k = X_kᵀX_k/n with off-diagonals times a, Wᵀ = (Σ_k G_k)⁻¹ Σ_k G_k W_kᵀ. a is 0.95, and for causal language models
    0.6 is better (`off_diagonal` under fit:).
    """
    return learned_or_mean(block)


@merge_method("regmean_pp", paper="arXiv:2508.03121", learned=Learned("regmean_pp", RegressionFit, plain))
def regmean_pp(block: Block) -> Stream:
    """RegMean++: RegMean layer by layer, on activations that come out of the layers already merged."""
    return learned_or_mean(block)


@merge_method("surgery", paper="arXiv:2402.02705", learned=Learned("surgery", SurgeryFit, scaled))
def surgery(block: Block, *, weight: PerModel[float] = 0.3) -> Stream:
    """Task arithmetic whose features are corrected for each task, before its head: z − W_up ReLU(W_down z).

    The corrections bring the features near the expert's own, and are written into the heads: the task is told.
    """
    return finishes.add_base(block, combines.sum_(block, block.deltas, weight=weight))
