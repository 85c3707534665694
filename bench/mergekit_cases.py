"""The recipes that both tools are given, their references, and the small checkpoints they run on."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import pico  # noqa: E402  # pyright: ignore[reportMissingImports]
import reference as ref  # noqa: E402  # pyright: ignore[reportMissingImports]

Reference = Callable[[np.ndarray, list[np.ndarray]], np.ndarray]


@dataclass
class Case:
    """One recipe. Model names (base, e0, e1, e2) become folders of the architecture's checkpoints."""

    name: str
    recipe: dict[str, Any]
    arch: str = "llama"
    reference: Reference | None = None
    intended: str | None = None  # why Plait differs on purpose; a difference then never fails
    mergekit_fails: bool = False  # mergekit is known to stop on this case
    options: list[str] = field(default_factory=list)


def listed(models: Sequence[str], **per_model: Any) -> list[dict[str, Any]]:
    """A ``models:`` list. A per-model parameter is one value for all, or a tuple with one value per model."""
    out: list[dict[str, Any]] = []
    for i, model in enumerate(models):
        values = {k: v[i] if isinstance(v, tuple) else v for k, v in per_model.items()}
        out.append({"model": model, "parameters": values} if values else {"model": model})
    return out


THREE = ("e0", "e1", "e2")
W3 = (0.5, 0.3, 0.4)


def _delta(
    method: str, arch: str = "llama", parameters: dict[str, Any] | None = None, **per_model: Any
) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "merge_method": method,
        "base_model": "base",
        "models": listed(THREE, **per_model),
        "dtype": "float32",
    }
    if parameters:
        recipe["parameters"] = parameters
    return recipe


def _slices(method: str, slices: list[dict[str, Any]], base: str | None = None, **parameters: Any) -> dict[str, Any]:
    recipe: dict[str, Any] = {"merge_method": method, "slices": slices, "dtype": "float32"}
    if base:
        recipe["base_model"] = base
    if parameters:
        recipe["parameters"] = parameters
    return recipe


def _source(model: str, start: int, end: int, **parameters: Any) -> dict[str, Any]:
    out: dict[str, Any] = {"model": model, "layer_range": [start, end]}
    if parameters:
        out["parameters"] = parameters
    return out


SLERP_T = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]


def cases() -> list[Case]:
    """Every deterministic method of mergekit that Plait names too, then the recipe language, then other models."""
    far = ("far0", "far1")  # unrelated models, so that the angles on the sphere are large
    pair = {"merge_method": "slerp", "base_model": "base", "dtype": "float32"}
    nuslerp = {"merge_method": "nuslerp", "dtype": "float32"}
    out = [
        Case(
            "linear",
            {"merge_method": "linear", "models": listed(THREE, weight=W3), "dtype": "float32"},
            reference=lambda b, m: ref.linear(b, m, weight=W3),
        ),
        Case(
            "linear_sum",
            {
                "merge_method": "linear",
                "models": listed(THREE, weight=W3),
                "parameters": {"normalize": False},
                "dtype": "float32",
            },
            reference=lambda b, m: ref.linear(b, m, weight=W3, normalize=False),
        ),
        Case(
            "linear_base_listed",
            {"merge_method": "linear", "models": listed(("base", "e0"), weight=(3, 1)), "dtype": "float32"},
            reference=lambda b, m: ref.linear(None, [b, m[0]], weight=[3, 1]),
        ),
        Case(
            "task_arithmetic",
            _delta("task_arithmetic", weight=(0.5, -0.3, 0.4)),
            reference=lambda b, m: ref.task_arithmetic(b, m, weight=[0.5, -0.3, 0.4]),
        ),
        Case(
            "task_arithmetic_normalize_lambda",
            _delta("task_arithmetic", parameters={"normalize": True, "lambda": 0.7}, weight=W3),
            reference=lambda b, m: ref.task_arithmetic(b, m, weight=W3, normalize=True, lambda_=0.7),
        ),
        Case(
            "ties",
            _delta("ties", weight=W3, density=0.4),
            reference=lambda b, m: ref.ties(b, m, weight=W3, density=0.4),
        ),
        Case(
            "ties_sum_rescale_lambda",
            _delta(
                "ties",
                parameters={"normalize": False, "rescale": True, "lambda": 0.6},
                weight=W3,
                density=(0.3, 0.5, 0.7),
            ),
            reference=lambda b, m: ref.ties(
                b, m, weight=W3, density=[0.3, 0.5, 0.7], normalize=False, rescale=True, lambda_=0.6
            ),
        ),
        Case(
            "ties_density_1",
            _delta("ties", weight=W3),
            reference=lambda b, m: ref.ties(b, m, weight=W3),
        ),
        Case(
            "breadcrumbs",
            _delta("breadcrumbs", weight=W3, density=0.4, gamma=0.05),
            reference=lambda b, m: ref.breadcrumbs(b, m, weight=W3, density=0.4, gamma=0.05),
        ),
        Case(
            "breadcrumbs_defaults",
            _delta("breadcrumbs", weight=W3, density=0.9),
            reference=lambda b, m: ref.breadcrumbs(b, m, weight=W3, density=0.9),
        ),
        Case(
            "breadcrumbs_sparse",
            _delta("breadcrumbs", weight=W3, density=0.01),
            reference=lambda b, m: ref.breadcrumbs(b, m, weight=W3, density=0.01),
            intended="int(density*n) = 0 in the 32-element tensors: mergekit keeps nothing, Plait one element",
        ),
        Case(
            "breadcrumbs_ties",
            _delta("breadcrumbs_ties", parameters={"rescale": True}, weight=W3, density=0.4, gamma=0.05),
            reference=lambda b, m: ref.breadcrumbs_ties(b, m, weight=W3, density=0.4, gamma=0.05, rescale=True),
        ),
        Case(
            "sce",
            _delta("sce", parameters={"select_topk": 0.3}),
            reference=lambda b, m: ref.sce(b, m, select_topk=0.3),
        ),
        Case("sce_all", _delta("sce"), reference=lambda b, m: ref.sce(b, m)),
        Case(
            "slerp",
            {**pair, "models": listed(("base", "e0")), "parameters": {"t": 0.3}},
            reference=lambda b, m: ref.slerp(b, m[:1], 0.3),
        ),
        Case(
            "slerp_far",
            {**pair, "models": listed(("far0", "base")), "parameters": {"t": 0.3}},
            arch="far",
            reference=lambda b, m: ref.slerp(b, m[:1], 0.3),
        ),
        Case(
            "nuslerp_flat",
            {**nuslerp, "models": listed(far, weight=(1, 2))},
            arch="far",
            reference=lambda b, m: ref.nuslerp(None, m, weight=[1, 2]),
        ),
        Case(
            "nuslerp_base",
            {**nuslerp, "base_model": "base", "models": listed(far, weight=(1, 2))},
            arch="far",
            reference=lambda b, m: ref.nuslerp(b, m, weight=[1, 2]),
        ),
        Case(
            "nuslerp_last_axis",
            {**nuslerp, "models": listed(far, weight=(3, 1)), "parameters": {"nuslerp_flatten": False}},
            arch="far",
            reference=lambda b, m: ref.nuslerp(None, m, weight=[3, 1], flatten=False),
        ),
        Case(
            "nuslerp_first_axis",
            {
                **nuslerp,
                "models": listed(far, weight=(3, 1)),
                "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
            },
            arch="far",
            reference=lambda b, m: ref.nuslerp(None, m, weight=[3, 1], flatten=False, row_wise=True),
        ),
        Case(
            "multislerp",
            {"merge_method": "multislerp", "models": listed(THREE, weight=W3), "dtype": "float32"},
            reference=lambda b, m: ref.multislerp(None, m, weight=W3),
        ),
        Case(
            "multislerp_base",
            _delta("multislerp", weight=W3),
            reference=lambda b, m: ref.multislerp(b, m, weight=W3),
        ),
        Case(
            "multislerp_raw_weights",
            _delta("multislerp", parameters={"normalize_weights": False}, weight=W3),
            reference=lambda b, m: ref.multislerp(b, m, weight=W3, normalize_weights=False),
        ),
        Case(
            "karcher",
            {"merge_method": "karcher", "models": listed(THREE), "dtype": "float32"},
            reference=lambda b, m: ref.karcher(None, m),
        ),
        Case(
            "karcher_far",
            {
                "merge_method": "karcher",
                "models": listed(("base", *far)),
                "parameters": {"max_iter": 20, "tol": 1e-6},
                "dtype": "float32",
            },
            arch="far",
            reference=lambda b, m: ref.karcher(None, [b, *m], max_iter=20, tol=1e-6),
        ),
        Case("model_stock", _delta("model_stock"), reference=lambda b, m: ref.model_stock(b, m)),
        Case(
            "model_stock_filter_wise",
            _delta("model_stock", parameters={"filter_wise": True}),
            reference=lambda b, m: ref.model_stock(b, m, filter_wise=True),
        ),
        Case(
            "nearswap",
            {
                "merge_method": "nearswap",
                "base_model": "base",
                "models": listed(("base", "e0")),
                "parameters": {"t": 0.0003},
                "dtype": "float32",
            },
            reference=lambda b, m: ref.nearswap(b, m[:1], 0.0003),
        ),
        Case(
            "passthrough",
            {"merge_method": "passthrough", "models": listed(("e0",)), "dtype": "float32"},
            reference=lambda b, m: ref.passthrough(None, m[:1]),
        ),
        Case(
            "passthrough_scale",
            {"merge_method": "passthrough", "models": listed(("e0",), scale=0.5), "dtype": "float32"},
            reference=lambda b, m: ref.passthrough(None, m[:1], scale=0.5),
        ),
        # the recipe language
        Case("gradient", _delta("task_arithmetic", weight=([0, 1], [1, 0, 0.5], 0.3))),
        Case("gradient_density", _delta("ties", weight=W3, density=([0.2, 0.9], 0.5, [1, 0.1, 0.5, 0.3]))),
        Case("gradient_lambda", _delta("task_arithmetic", parameters={"lambda": [0.2, 1.0]}, weight=W3)),
        Case("filters", {**pair, "models": listed(("base", "e0")), "parameters": {"t": SLERP_T}}),
        Case(
            "filters_first_wins",
            _delta(
                "task_arithmetic",
                weight=[
                    {"filter": "q_proj", "value": 0.1},
                    {"filter": "self_attn", "value": 0.2},
                    {"filter": "layers.1.", "value": 0.7},
                    {"filter": "*", "value": 0.4},
                ],
            ),
        ),
        Case(
            "filters_fall_through",
            _delta("task_arithmetic", parameters={"weight": 0.9}, weight=([{"filter": "mlp", "value": 0.1}], 0.3, 0.4)),
        ),
        Case(
            "slerp_slices",
            _slices(
                "slerp",
                [{"sources": [_source("base", 0, 3), _source("e0", 0, 3)]}],
                base="base",
                t=SLERP_T,
            ),
        ),
        Case(
            "slices_two_parts",
            _slices(
                "linear",
                [
                    {"sources": [_source("e0", 0, 2, weight=1), _source("e1", 0, 2, weight=[0, 3])]},
                    {"sources": [_source("e1", 1, 3, weight=2), _source("e2", 0, 2, weight=1)]},
                ],
            ),
        ),
        Case(
            "slices_precedence",
            _slices(
                "task_arithmetic",
                [
                    {
                        "sources": [_source("base", 0, 2), _source("e0", 0, 2, weight=0.1), _source("e1", 0, 2)],
                        "parameters": {"weight": 0.2},
                    },
                    {"sources": [_source("base", 2, 3), _source("e0", 2, 3), _source("e1", 2, 3)]},
                ],
                base="base",
                weight=0.5,
            ),
        ),
        Case(
            "stacking",
            _slices("passthrough", [{"sources": [_source("e0", 0, 2)]}, {"sources": [_source("e1", 1, 3)]}]),
        ),
        Case(
            "stacking_one_model_scaled",
            _slices(
                "passthrough",
                [
                    {"sources": [_source("e0", 0, 2)]},
                    {
                        "sources": [
                            _source(
                                "e0",
                                1,
                                3,
                                scale=[
                                    {"filter": "o_proj", "value": 0.0},
                                    {"filter": "down_proj", "value": 0.0},
                                    {"value": 1.0},
                                ],
                            )
                        ]
                    },
                ],
            ),
        ),
        Case(
            "out_dtype",
            {**_delta("task_arithmetic", weight=W3), "out_dtype": "bfloat16"},
        ),
        Case(
            "no_dtype",
            {k: v for k, v in _delta("task_arithmetic", weight=W3).items() if k != "dtype"},
        ),
        # documented differences
        Case(
            "sce_small_changes",
            _delta("sce"),
            arch="llama_small_changes",
            intended="mergekit weighs the models equally where their mean squares sum to less than 1e-6, Plait never",
        ),
        Case(
            "model_stock_small_changes",
            _delta("model_stock", parameters={"filter_wise": True}),
            arch="llama_small_changes",
            reference=lambda b, m: ref.model_stock(b, m, filter_wise=True),
            intended="mergekit clamps the product of two norms at 1e-6: small changes seem less alike than they are",
        ),
        Case(
            "linear_base_not_listed",
            {
                "merge_method": "linear",
                "base_model": "base",
                "models": listed(THREE),
                "parameters": {"weight": 1},
                "dtype": "float32",
            },
            intended="mergekit adds a base that is not listed as one more model of the average",
        ),
        Case(
            "karcher_base_not_listed",
            {"merge_method": "karcher", "base_model": "base", "models": listed(THREE), "dtype": "float32"},
            intended="mergekit adds a base that is not listed as one more model of the mean",
        ),
        Case(
            "ties_bfloat16",
            {**_delta("ties", weight=W3, density=0.4), "dtype": "bfloat16"},
            arch="llama_bf16",
            intended="mergekit computes in bfloat16, Plait in float32 with one rounding; bf16 magnitudes also tie",
        ),
        Case(
            "task_arithmetic_bfloat16",
            {**_delta("task_arithmetic", weight=W3), "dtype": "bfloat16"},
            arch="llama_bf16",
            intended="mergekit computes in bfloat16, Plait in float32 with one rounding",
        ),
    ]
    # other architectures and file layouts
    for arch in ("llama_tied", "llama_bf16", "llama_sharded", "bert", "bert_classifier", "t5", "vit", "clip"):
        precise = arch != "llama_bf16"
        lost = "mergekit with transformers 5 drops every tensor under vit.encoder" if arch == "vit" else None
        out.append(
            Case(
                f"linear_{arch}",
                {"merge_method": "linear", "models": listed(THREE, weight=W3)},
                arch=arch,
                reference=(lambda b, m: ref.linear(b, m, weight=W3)) if precise else None,
                intended=lost,
                mergekit_fails=arch == "bert",
            )
        )
        if precise and arch != "bert":  # mergekit fails on BertModel whatever the method (one case shows it)
            out.append(
                Case(
                    f"ties_{arch}",
                    _delta("ties", weight=W3, density=0.4),
                    arch=arch,
                    reference=lambda b, m: ref.ties(b, m, weight=W3, density=0.4),
                    intended=lost,
                )
            )
    for arch in ("llama_tied", "bert_classifier"):
        out.append(Case(f"slerp_{arch}", {**pair, "models": listed(("base", "e0")), "parameters": {"t": [0, 1]}}, arch))
    return out


def build(arch: str, folder: Path) -> dict[str, Path]:
    """Write the checkpoints of one architecture and return their folders by name (base, e0, e1, e2, far0, far1)."""
    base = folder / arch / "base"
    if arch == "far":
        return {
            name: pico.make_llama(folder / arch / name, seed, layers=3)
            for seed, name in enumerate(("base", "far0", "far1"))
        }
    if arch in ("llama", "llama_small_changes"):
        pico.make_llama(base, 0, layers=3)
    elif arch == "llama_tied":
        pico.make_llama(base, 0, layers=3, tied=True)
    elif arch == "llama_bf16":
        pico.make_llama(base, 0, layers=3, dtype=torch.bfloat16)
    elif arch == "llama_sharded":
        pico.make_llama(base, 0, layers=3, shard_size="40KB")
    elif arch == "bert":
        pico.make_bert(base)
    elif arch == "bert_classifier":
        pico.make_bert_classifier(base, labels=3)
    elif arch == "t5":
        pico.make_t5(base)
    elif arch == "vit":
        pico.make_vit(base, labels=3)
    elif arch == "clip":
        pico.make_clip_vision(base)
    else:
        raise ValueError(arch)
    if arch == "llama_small_changes":  # of sizes that differ, so that equal weights show
        written = [pico.experts(folder / arch / str(k), base, 1, 0.002 * (k + 1), seed=k)[0] for k in range(3)]
    else:
        written = pico.experts(folder / arch, base, 3, scale=0.1)
    return {"base": base, **{f"e{k}": path for k, path in enumerate(written)}}


def with_paths(recipe: Any, models: dict[str, Path]) -> Any:
    """The recipe with model names replaced by folders."""
    if isinstance(recipe, dict):
        return {
            k: str(models[v]) if k in ("model", "base_model") and isinstance(v, str) else with_paths(v, models)
            for k, v in recipe.items()
        }
    if isinstance(recipe, list):
        return [with_paths(v, models) for v in recipe]
    return copy.deepcopy(recipe)
