"""Methods whose experts stay apart: what is asked of a routed model under `route:`. `plait.routing` makes it.

    wemoe       MLPs are θ0 + Σ_k w_k(h) τ_k, a router at every block; the rest is merged
    e_wemoe     the same with one router for all blocks and pruned task vectors
    twin        a merged model + Σ_k w_k(x) · compressed(θ_k − merged), routed by the merged model's features
    emr         θ0 + s_k M_k τ_u: one vector, a mask and a scale for every task
    tall_mask   θ0 + M_k Σ τ
    smile       every Linear is θ0 + Σ_k p_k(x) · low rank τ_k, gated by the experts' own directions

What is not routed is merged by `shared:`, any static method of the recipe's choice, with `parameters:`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from plait.methods.contract import Dynamic, Fraction, Learned, MergeMethod, Range, add_method, get_method
from plait.methods.fitted import shared as vectors
from plait.methods.learned import Count, Fit, Rate

Storage = Literal["float32", "bfloat16", "float16", "int8", "int4"]
Depth = Annotated[int, Range(0, 2)]
Whole = Annotated[int, Range(0)]


@dataclass(frozen=True, kw_only=True)
class RouterFit(Fit):
    """Keys under `fit:` of WEMoE's routers."""

    PAPER: ClassVar[dict[str, Any]] = {"objective": "entropy", "guard": False, "steps": 1000, "lr": 1e-4}

    lr: Rate = 3e-3
    """At the first step; it falls to zero along half a cosine."""


@dataclass(frozen=True, kw_only=True)
class IdentityFit:
    """Keys under `fit:` of a router that learns which task an input is of."""

    PAPER: ClassVar[dict[str, Any]] = {}

    protocol: Literal["honest", "paper"] = "honest"
    epochs: Count = 50
    lr: Rate = 5e-4
    batch: Count = 64
    """Inputs of all tasks in a step."""
    inputs: Count = 5500
    """At most so many of every task."""
    precision: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class MlpRoute:
    """Keys under `route:` of WEMoE."""

    depth: Depth = 2
    """Layers of a router; 0 is one bias for all inputs."""
    init: float = 0.3
    """What a router gives before it has learned: as task arithmetic."""
    first_layer: Whole = 0
    """Blocks before this one are merged."""
    shared_router: bool = False
    density: Fraction = 1.0
    """Share of a task vector's entries that is kept, the largest, per tensor."""
    precision: Storage = "float32"


@dataclass(frozen=True, kw_only=True)
class EfficientRoute(MlpRoute):
    """Keys under `route:` of E-WEMoE."""

    shared_router: bool = True
    density: Fraction = 0.1


@dataclass(frozen=True, kw_only=True)
class TwinRoute:
    """Keys under `route:` of Twin-Merging."""

    keep: Literal["svd", "magnitude", "bernoulli"] = "svd"
    """How exclusive knowledge is compressed; 1-D tensors are kept whole."""
    ratio: Fraction = 0.1
    """svd: rank as a share of a matrix's shorter side; else the share of entries that is kept."""
    rank: Count | None = None
    """svd: one rank for all matrices."""
    energy: Annotated[float, Range(0, 1, open_low=True)] | None = None
    """svd: the least rank whose squared singular values add up to this share, for every matrix and expert."""
    top: Whole = 0
    """Experts that are mixed in, the likeliest; 0 is all."""
    precision: Storage = "float32"


@dataclass(frozen=True, kw_only=True)
class SwitchRoute:
    """Keys under `route:` of models that are switched by task."""

    router: bool = False
    """Learn which task an input is of, so that nobody needs to say it."""
    precision: Storage = "float32"


@dataclass(frozen=True, kw_only=True)
class EmrRoute(SwitchRoute):
    """Keys under `route:` of EMR-Merging."""

    rescale: Literal["model", "tensor_mean"] = "model"
    """s_k from sums over the model (the paper), or over the tensors' means (the authors' vision code)."""


@dataclass(frozen=True, kw_only=True)
class TallRoute(SwitchRoute):
    """Keys under `route:` of TALL-masks."""

    threshold: Annotated[float, Range(0)] = 0.5
    """An entry is a task's own where |τ_k| is at least so many times |Σ τ − τ_k|. The authors choose among 0.2 … 0.6 by
    validation; of 0.4, 0.5 and 0.6 the middle one was best on our two vision suites (docs/LOG.md)."""


@dataclass(frozen=True, kw_only=True)
class SmileRoute:
    """Keys under `route:` of SMILE."""

    rank: Count = 32
    directions: Count = 16
    """Of an expert, that the gate looks at."""
    top: Count = 1
    precision: Storage = "float32"


_BY_TASK = Learned("task_router", IdentityFit, vectors, "unlabeled inputs")
_BY_BLOCK = Learned("layer_routers", RouterFit, vectors, "unlabeled inputs")


def _if_asked(options: Any) -> Learned | None:
    return _BY_TASK if options.router else None


def routed_method(
    name: str, paper: str, summary: str, options: Any, *, shared: str = "task_arithmetic",
    parameters: Mapping[str, Any] | None = None, router: Any = lambda options: None,
) -> MergeMethod:  # fmt: skip
    """Register a routed method. Its parameters are those of the method that merges what is not routed."""
    dynamic = Dynamic(options, shared, parameters or {}, router)
    return add_method(routed_over(get_method(shared), name, paper, summary, dynamic, options(), parameters or {}))


def routed_over(
    static: MergeMethod, name: str, paper: str, summary: str, dynamic: Dynamic, options: Any,
    defaults: Mapping[str, Any],
) -> MergeMethod:  # fmt: skip
    """A routed method over the static one that merges the rest."""
    known = {
        key: dataclasses.replace(parameter, default=defaults[key]) if key in defaults else parameter
        for key, parameter in static.parameters.items()
    }
    given = {known[key].keyword: value for key, value in defaults.items()}
    return dataclasses.replace(
        static, name=name, paper=paper, summary=summary, dynamic=dynamic, base="required", parameters=known,
        fn=functools.partial(static.fn, **given) if given else static.fn, learned=dynamic.router(options),
    )  # fmt: skip


_REST = {"weight": 0.3}

wemoe = routed_method(
    "wemoe", "arXiv:2402.00433",
    "Turn every MLP into a mixture of the experts' weights, mixed for every sample by a router on the MLP's input.",
    MlpRoute, parameters=_REST, router=lambda options: _BY_BLOCK,
)  # fmt: skip
e_wemoe = routed_method(
    "e_wemoe", "arXiv:2410.21804", "WEMoE with one router for all blocks and the largest tenth of every task vector.",
    EfficientRoute, parameters=_REST, router=lambda options: _BY_BLOCK,
)  # fmt: skip
twin = routed_method(
    "twin", "arXiv:2406.15479",
    "Keep what a merged model shares and, compressed, what each expert has beyond it; mix that in for every input.",
    TwinRoute, parameters=_REST, router=lambda options: _BY_TASK,
)  # fmt: skip
emr = routed_method(
    "emr", "arXiv:2405.17461",
    "Elect one task vector, and give every task a mask and a scale of it; the task is told, or routed.",
    EmrRoute, shared="average", router=_if_asked,
)  # fmt: skip
tall_mask = routed_method(
    "tall_mask", "arXiv:2405.07813",
    "Give every task a mask that lets through what of the summed task vectors is its own; the task is told, or routed.",
    TallRoute, shared="average", router=_if_asked,
)  # fmt: skip
smile = routed_method(
    "smile", "arXiv:2408.10174",
    "Add low-rank experts to every Linear, mixed for every token by how much of it they read. No data.",
    SmileRoute, shared="average",
)  # fmt: skip
