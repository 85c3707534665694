"""The methods that are one line of transform → combine → finish, by the names the field knows them by.

    linear              Σ w θ / Σ w                     average             mean of θ
    task_arithmetic     sum                             ties                trim → elect
    dare_linear         drop → sum                      dare_ties           drop → elect
    breadcrumbs         outliers → sum                  breadcrumbs_ties    outliers → elect
    della_linear        magprune → sum                  della               magprune → elect
    sce                 spread → sce                    consensus           consensus → sum

Names, parameters and defaults of those that mergekit has are mergekit's. All end in: scale by lambda, add the base.
"""

from __future__ import annotations

from typing import Annotated, Literal

from plait.methods import combines, finishes, transforms
from plait.methods.block import Block
from plait.methods.contract import Fraction, PerModel, Range, merge_method
from plait.methods.stream import Stream
from plait.methods.survey import survey_trim

Kept = Annotated[float, Range(0, 1, open_low=True)]


def _finish(block: Block, delta: Stream, lambda_: float) -> Stream:
    return finishes.add_base(block, finishes.scale(block, delta, lambda_=lambda_))


@merge_method("linear", paper="arXiv:2203.05482", base="unused", cost=0.4)
def linear(block: Block, *, weight: PerModel[float] = 1.0, normalize: bool = True) -> Stream:
    """Weighted mean of the models: Σ w_k θ_k / Σ w_k, or without `normalize` Σ w_k θ_k."""
    return combines.sum_(block, block.models, weight=weight, normalize=normalize)


@merge_method("average", paper="arXiv:2203.05482", base="unused", cost=0.4)
def average(block: Block) -> Stream:
    """Plain mean of the models: Σ θ_k / K."""
    return combines.sum_(block, block.models, normalize=True)


@merge_method("task_arithmetic", paper="arXiv:2212.04089", cost=0.4)
def task_arithmetic(
    block: Block, *, weight: PerModel[float] = 1.0, normalize: bool = False, lambda_: float = 1.0
) -> Stream:
    """θ0 + λ Σ w_k τ_k. A negative weight forgets; λ = 0.3 is usual for eight experts."""
    return _finish(block, combines.sum_(block, block.deltas, weight=weight, normalize=normalize), lambda_)


@merge_method("ties", paper="arXiv:2306.01708", survey=survey_trim, cost=1.6)
def ties(
    block: Block,
    *,
    weight: PerModel[float] = 1.0,
    density: PerModel[Fraction] = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
    trim: Literal["tensor", "model"] = "tensor",
) -> Stream:
    """Trim small entries, elect a sign for each, add up the experts that agree with it.

    The paper trims to density 0.2, once over the whole model (`trim: model`), and takes the mean (`normalize: true`,
    λ = 1); vision tables use the sum (`normalize: false`) with λ = 0.3. The defaults here are mergekit's: density 1,
    per tensor.
    """
    deltas = transforms.trim(block, block.deltas, density=density, rescale=rescale, trim=trim)
    return _finish(block, combines.elect(block, deltas, weight=weight, normalize=normalize), lambda_)


@merge_method("dare_linear", paper="arXiv:2311.03099", cost=1.1)
def dare_linear(
    block: Block,
    *,
    weight: PerModel[float] = 1.0,
    density: PerModel[Kept] = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    rescale_by: Literal["density", "l1"] = "density",
    lambda_: float = 1.0,
) -> Stream:
    """Drop entries at random, rescale the rest by 1/density, then task arithmetic. Usual densities: 0.1 to 0.5."""
    deltas = transforms.drop(block, block.deltas, density=density, rescale=rescale, rescale_by=rescale_by)
    return _finish(block, combines.sum_(block, deltas, weight=weight, normalize=normalize), lambda_)


@merge_method("dare_ties", paper="arXiv:2311.03099", cost=1.2)
def dare_ties(
    block: Block,
    *,
    weight: PerModel[float] = 1.0,
    density: PerModel[Kept] = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    rescale_by: Literal["density", "l1"] = "density",
    lambda_: float = 1.0,
) -> Stream:
    """Drop entries at random, rescale the rest by 1/density, then TIES' sign election."""
    deltas = transforms.drop(block, block.deltas, density=density, rescale=rescale, rescale_by=rescale_by)
    return _finish(block, combines.elect(block, deltas, weight=weight, normalize=normalize), lambda_)


@merge_method("breadcrumbs", paper="arXiv:2312.06795", cost=2.1)
def breadcrumbs(
    block: Block,
    *,
    weight: PerModel[float] = 1.0,
    density: PerModel[Fraction] = 1.0,
    gamma: PerModel[Fraction] = 0.01,
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
) -> Stream:
    """Drop the largest `gamma` share and the smallest entries, then task arithmetic. The paper keeps 0.85 to 0.95."""
    deltas = transforms.outliers(block, block.deltas, density=density, gamma=gamma, rescale=rescale)
    return _finish(block, combines.sum_(block, deltas, weight=weight, normalize=normalize), lambda_)


@merge_method("breadcrumbs_ties", paper="arXiv:2312.06795", cost=2.2)
def breadcrumbs_ties(
    block: Block,
    *,
    weight: PerModel[float] = 1.0,
    density: PerModel[Fraction] = 1.0,
    gamma: PerModel[Fraction] = 0.01,
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
) -> Stream:
    """Drop the largest `gamma` share and the smallest entries, then TIES' sign election."""
    deltas = transforms.outliers(block, block.deltas, density=density, gamma=gamma, rescale=rescale)
    return _finish(block, combines.elect(block, deltas, weight=weight, normalize=normalize), lambda_)


@merge_method("della", paper="arXiv:2406.11617", scope="row", cost=4.3)
def della(
    block: Block,
    *,
    weight: PerModel[float] = 1.0,
    density: PerModel[Fraction] = 1.0,
    epsilon: PerModel[Fraction] = 0.15,
    normalize: bool = True,
    rescale: bool = True,
    lambda_: float = 1.0,
) -> Stream:
    """Drop entries at random, the small ones of a row more often, then TIES' sign election."""
    deltas = transforms.magprune(block, block.deltas, density=density, epsilon=epsilon, rescale=rescale)
    return _finish(block, combines.elect(block, deltas, weight=weight, normalize=normalize), lambda_)


@merge_method("della_linear", paper="arXiv:2406.11617", scope="row", cost=4.1)
def della_linear(
    block: Block,
    *,
    weight: PerModel[float] = 1.0,
    density: PerModel[Fraction] = 1.0,
    epsilon: PerModel[Fraction] = 0.15,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
) -> Stream:
    """Drop entries at random, the small ones of a row more often, then task arithmetic."""
    deltas = transforms.magprune(block, block.deltas, density=density, epsilon=epsilon, rescale=rescale)
    return _finish(block, combines.sum_(block, deltas, weight=weight, normalize=normalize), lambda_)


@merge_method("sce", paper="arXiv:2408.07990", cost=2.8)
def sce(block: Block, *, select_topk: Fraction = 1.0, lambda_: float = 1.0) -> Stream:
    """Select the entries that vary most across experts, weight experts by energy, erase minority signs."""
    deltas = transforms.spread(block, block.deltas, select_topk=select_topk)
    return _finish(block, combines.sce(block, deltas), lambda_)


@merge_method("consensus", paper="arXiv:2405.07813", experts=(2, None), cost=0.8)
def consensus(
    block: Block,
    *,
    weight: PerModel[float] = 1.0,
    mu: Annotated[float, Range(0)] = 0.6,
    votes: Annotated[int, Range(1)] = 2,
    lambda_: float = 1.0,
) -> Stream:
    """Task arithmetic on the entries that at least `votes` experts need (Consensus TA). λ ≈ 1 or lower."""
    deltas = transforms.consensus(block, block.deltas, mu=mu, votes=votes)
    return _finish(block, combines.sum_(block, deltas, weight=weight), lambda_)
