"""Run the same recipes through mergekit and through Plait, and compare numbers, time and memory.

    python bench/against_mergekit.py                      every case, Plait against mergekit
    python bench/against_mergekit.py --only ties slerp    cases whose name contains one of the words
    python bench/against_mergekit.py --against reference  tests/reference.py against mergekit (Plait is not run)
    python bench/against_mergekit.py --speed 0.5B         time and memory on a large random Llama

mergekit runs in its own environment: name its interpreter with ``--mergekit-python``, or the script makes a venv in
``--cache`` and installs mergekit there. Both tools run as they are documented (``mergekit-yaml``,
``python -m plait merge``), on the CPU, one process for each merge.

The exit status is 1 when a deterministic case differs by more than 1e-5 (largest over the tensors of
max|a-b| / max|b|; one unit in the last place for bfloat16 files), or differs in tensor names, shapes or dtypes, and is
not among the intended differences. A merge that fails counts too, unless mergekit is known to fail there.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import pico  # noqa: E402  # pyright: ignore[reportMissingImports]
import reference as ref  # noqa: E402  # pyright: ignore[reportMissingImports]

MERGEKIT_VERSION = "0.1.5"
LIMIT = 1e-5
LIMIT_BF16 = 2.0**-7  # one unit in the last place: sums of bf16 numbers often lie halfway between two of them
Reference = Callable[[np.ndarray, list[np.ndarray]], np.ndarray]


# ---------------------------------------------------------------------------------------------------------------------
# the cases
# ---------------------------------------------------------------------------------------------------------------------


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


def _listed(models: Sequence[str], **per_model: Any) -> list[dict[str, Any]]:
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
        "models": _listed(THREE, **per_model),
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
            {"merge_method": "linear", "models": _listed(THREE, weight=W3), "dtype": "float32"},
            reference=lambda b, m: ref.linear(b, m, weight=W3),
        ),
        Case(
            "linear_sum",
            {
                "merge_method": "linear",
                "models": _listed(THREE, weight=W3),
                "parameters": {"normalize": False},
                "dtype": "float32",
            },
            reference=lambda b, m: ref.linear(b, m, weight=W3, normalize=False),
        ),
        Case(
            "linear_base_listed",
            {"merge_method": "linear", "models": _listed(("base", "e0"), weight=(3, 1)), "dtype": "float32"},
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
            {**pair, "models": _listed(("base", "e0")), "parameters": {"t": 0.3}},
            reference=lambda b, m: ref.slerp(b, m[:1], 0.3),
        ),
        Case(
            "slerp_far",
            {**pair, "models": _listed(("far0", "base")), "parameters": {"t": 0.3}},
            arch="far",
            reference=lambda b, m: ref.slerp(b, m[:1], 0.3),
        ),
        Case(
            "nuslerp_flat",
            {**nuslerp, "models": _listed(far, weight=(1, 2))},
            arch="far",
            reference=lambda b, m: ref.nuslerp(None, m, weight=[1, 2]),
        ),
        Case(
            "nuslerp_base",
            {**nuslerp, "base_model": "base", "models": _listed(far, weight=(1, 2))},
            arch="far",
            reference=lambda b, m: ref.nuslerp(b, m, weight=[1, 2]),
        ),
        Case(
            "nuslerp_last_axis",
            {**nuslerp, "models": _listed(far, weight=(3, 1)), "parameters": {"nuslerp_flatten": False}},
            arch="far",
            reference=lambda b, m: ref.nuslerp(None, m, weight=[3, 1], flatten=False),
        ),
        Case(
            "nuslerp_first_axis",
            {
                **nuslerp,
                "models": _listed(far, weight=(3, 1)),
                "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
            },
            arch="far",
            reference=lambda b, m: ref.nuslerp(None, m, weight=[3, 1], flatten=False, row_wise=True),
        ),
        Case(
            "multislerp",
            {"merge_method": "multislerp", "models": _listed(THREE, weight=W3), "dtype": "float32"},
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
            {"merge_method": "karcher", "models": _listed(THREE), "dtype": "float32"},
            reference=lambda b, m: ref.karcher(None, m),
        ),
        Case(
            "karcher_far",
            {
                "merge_method": "karcher",
                "models": _listed(("base", *far)),
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
                "models": _listed(("base", "e0")),
                "parameters": {"t": 0.0003},
                "dtype": "float32",
            },
            reference=lambda b, m: ref.nearswap(b, m[:1], 0.0003),
        ),
        Case(
            "passthrough",
            {"merge_method": "passthrough", "models": _listed(("e0",)), "dtype": "float32"},
            reference=lambda b, m: ref.passthrough(None, m[:1]),
        ),
        Case(
            "passthrough_scale",
            {"merge_method": "passthrough", "models": _listed(("e0",), scale=0.5), "dtype": "float32"},
            reference=lambda b, m: ref.passthrough(None, m[:1], scale=0.5),
        ),
        # the recipe language
        Case("gradient", _delta("task_arithmetic", weight=([0, 1], [1, 0, 0.5], 0.3))),
        Case("gradient_density", _delta("ties", weight=W3, density=([0.2, 0.9], 0.5, [1, 0.1, 0.5, 0.3]))),
        Case("gradient_lambda", _delta("task_arithmetic", parameters={"lambda": [0.2, 1.0]}, weight=W3)),
        Case("filters", {**pair, "models": _listed(("base", "e0")), "parameters": {"t": SLERP_T}}),
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
                "models": _listed(THREE),
                "parameters": {"weight": 1},
                "dtype": "float32",
            },
            intended="mergekit adds a base that is not listed as one more model of the average",
        ),
        Case(
            "karcher_base_not_listed",
            {"merge_method": "karcher", "base_model": "base", "models": _listed(THREE), "dtype": "float32"},
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
                {"merge_method": "linear", "models": _listed(THREE, weight=W3)},
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
        out.append(
            Case(f"slerp_{arch}", {**pair, "models": _listed(("base", "e0")), "parameters": {"t": [0, 1]}}, arch)
        )
    return out


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# running and comparing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What one process did."""

    ok: bool
    seconds: float
    cpu: float = 0.0
    anonymous: int = 0  # peak of RssAnon over the process and its children, bytes
    resident: int = 0  # VmHWM, bytes (mapped files count)
    output: str = ""


def _children(pid: int) -> Iterator[int]:
    yield pid
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _children(int(child))
    except OSError:
        return


def _status(pid: int) -> dict[str, int]:
    out = {}
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in ("RssAnon", "VmHWM"):
                out[key] = int(value.split()[0]) * 1024
    except OSError:
        pass
    return out


def run(command: Sequence[str], environment: dict[str, str] | None = None, sample: bool = False) -> Run:
    """Run a command; with ``sample`` read its memory from /proc every 20 ms."""
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        anonymous = resident = 0
        while True:
            pid, code, usage = os.wait4(process.pid, os.WNOHANG if sample else 0)
            if pid:
                break
            found = [_status(p) for p in _children(process.pid)]
            anonymous = max(anonymous, sum(s.get("RssAnon", 0) for s in found))
            resident = max(resident, sum(s.get("VmHWM", 0) for s in found))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(code)
        log.seek(0)
        text = log.read().decode(errors="replace")
    return Run(process.returncode == 0, seconds, usage.ru_utime + usage.ru_stime, anonymous, resident, text)


def plait_environment() -> dict[str, str]:
    """The environment with this checkout first on PYTHONPATH."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def run_mergekit(python: str, recipe: Path, out: Path, sample: bool = False) -> Run:
    """mergekit-yaml RECIPE OUT of the given environment, on the CPU."""
    command = [str(Path(python).parent / "mergekit-yaml"), str(recipe), str(out), "--device", "cpu", "--quiet"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return run(command, {**environment, "HF_HUB_OFFLINE": "1"}, sample)


def run_plait(recipe: Path, out: Path, options: Sequence[str] = (), sample: bool = False) -> Run:
    """python -m plait merge RECIPE OUT."""
    command = [sys.executable, "-m", "plait", "merge", str(recipe), str(out), *options]
    return run(command, plait_environment(), sample)


def layout(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor of a checkpoint."""
    return {name: (tuple(t.shape), str(t.dtype)) for name, t in pico.read(folder).items()}


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest max|a-b| / max|b| over the tensors both have, and the tensor's name."""
    worst, where = 0.0, "-"
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = ours[name].double(), theirs[name].double()
        if a.shape != b.shape:
            return math.inf, name
        if not a.numel():
            continue
        scale = float(b.abs().max())
        gap = float((a - b).abs().max())
        relative = gap / scale if scale > 0 else (0.0 if gap == 0 else math.inf)
        if math.isnan(relative):
            relative = math.inf
        if relative > worst:
            worst, where = relative, name
    return worst, where


def config_differences(ours: Path, theirs: Path) -> list[str]:
    """Keys of config.json that differ; who wrote the file does not count."""
    a, b = (json.loads((folder / "config.json").read_text()) for folder in (ours, theirs))
    skipped = {"transformers_version", "_name_or_path"}
    return sorted(k for k in (a.keys() | b.keys()) - skipped if a.get(k) != b.get(k))


def by_reference(case: Case, models: dict[str, Path]) -> dict[str, torch.Tensor]:
    """The case's result by tests/reference.py, tensor by tensor."""
    assert case.reference is not None
    base = pico.read(models["base"])
    others = [pico.read(path) for name, path in models.items() if name != "base"]
    out = {}
    for name, tensor in base.items():
        if tensor.is_floating_point():
            arrays = [other[name].double().numpy() for other in others]
            out[name] = torch.from_numpy(np.asarray(case.reference(tensor.double().numpy(), arrays)))
    return out


def _short(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else "no output")[:150]


def compare(arguments: argparse.Namespace) -> int:
    """Run the cases, print the table, return the exit status."""
    work = Path(arguments.work or tempfile.mkdtemp(prefix="against-mergekit-"))
    work.mkdir(parents=True, exist_ok=True)
    python = mergekit_python(arguments)
    chosen = [c for c in cases() if not arguments.only or any(word in c.name for word in arguments.only)]
    if arguments.against == "reference":
        chosen = [c for c in chosen if c.reference is not None]
    models = {arch: build(arch, work) for arch in sorted({c.arch for c in chosen})}
    who = "plait" if arguments.against == "plait" else "reference"
    print(f"| case | max rel. difference | worst tensor | names, shapes, dtypes | config | mergekit s | {who} s | |")
    print("|---|---|---|---|---|---|---|---|")
    failed = []
    for case in chosen:
        folder = work / "out" / case.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(with_paths(case.recipe, models[case.arch]), sort_keys=False))
        theirs = run_mergekit(python, recipe, folder / "mergekit")
        if not theirs.ok:
            print(f"| {case.name} | - | - | - | - | - | - | mergekit failed: {_short(theirs.output)} |", flush=True)
            if not case.mergekit_fails:
                failed.append(case.name)
            continue
        start = time.perf_counter()
        if arguments.against == "reference":
            mine = by_reference(case, models[case.arch])
            seconds, shape, config = time.perf_counter() - start, "-", "-"
            read = pico.read(folder / "mergekit")
            if mine.keys() != read.keys():
                shape = "other names: " + " ".join(sorted(mine.keys() ^ read.keys())[:3])
        else:
            ours = run_plait(recipe, folder / "plait", [*case.options, *arguments.plait_option])
            seconds = ours.seconds
            if not ours.ok:
                print(
                    f"| {case.name} | - | - | - | - | {theirs.seconds:.1f} | - | plait failed: {_short(ours.output)} |"
                )
                failed.append(case.name)
                continue
            mine, read = pico.read(folder / "plait"), pico.read(folder / "mergekit")
            here, there = layout(folder / "plait"), layout(folder / "mergekit")
            unequal = sorted(k for k in here.keys() | there.keys() if here.get(k) != there.get(k))
            shape = "equal" if not unequal else "not equal: " + " ".join(unequal[:3])
            keys = config_differences(folder / "plait", folder / "mergekit")
            config = "equal" if not keys else "not equal: " + " ".join(keys)
        worst, where = difference(mine, read)
        limit = LIMIT_BF16 if any(t.dtype == torch.bfloat16 for t in read.values()) else LIMIT
        wrong = worst > limit or (shape not in ("equal", "-") and arguments.against == "plait")
        note = ""
        if wrong and case.intended:
            note = "intended: " + case.intended
        elif wrong:
            note = "DIFFERENT"
            failed.append(case.name)
        numbers = f"{worst:.1e} | {where} | {shape} | {config} | {theirs.seconds:.1f} | {seconds:.1f}"
        print(f"| {case.name} | {numbers} | {note} |", flush=True)
    print()
    print(f"{len(chosen)} cases, {len(failed)} failed" + (": " + ", ".join(failed) if failed else ""))
    if arguments.work is None:
        shutil.rmtree(work)
    return 1 if failed else 0


# ---------------------------------------------------------------------------------------------------------------------
# the environment of mergekit
# ---------------------------------------------------------------------------------------------------------------------


def mergekit_python(arguments: argparse.Namespace) -> str:
    """The interpreter of an environment with mergekit; made in the cache folder when none was named."""
    if arguments.mergekit_python:
        return arguments.mergekit_python
    cache = Path(arguments.cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "plait")
    venv = cache / f"mergekit-{MERGEKIT_VERSION}"
    python = venv / "bin" / "python"
    if not (venv / "bin" / "mergekit-yaml").exists():
        print(f"installing mergekit {MERGEKIT_VERSION} into {venv}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        command = [str(python), "-m", "pip", "install", "-q", f"mergekit=={MERGEKIT_VERSION}", *arguments.pip_option]
        subprocess.run(command, check=True)
    return str(python)


# ---------------------------------------------------------------------------------------------------------------------
# speed
# ---------------------------------------------------------------------------------------------------------------------


def parse_count(text: str) -> int:
    """478M, 0.5B, 20000000."""
    unit = {"K": 1e3, "M": 1e6, "B": 1e9}.get(text[-1].upper())
    return int(float(text[:-1]) * unit) if unit else int(text)


def llama_shapes(parameters: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Config and tensor shapes of an untied Llama with about this many parameters (0.5B: width 1024, 26 layers)."""
    width, vocab = (1024, 32000) if parameters >= 150_000_000 else (256, 8000)
    inner = 4 * width
    per_layer = 4 * width * width + 3 * width * inner + 2 * width
    layers = max(2, round((parameters - 2 * vocab * width) / per_layer))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "head_dim": 64,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for i in range(layers):
        at = f"model.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{at}self_attn.{name}.weight"] = (width, width)
        shapes[f"{at}mlp.gate_proj.weight"] = shapes[f"{at}mlp.up_proj.weight"] = (inner, width)
        shapes[f"{at}mlp.down_proj.weight"] = (width, inner)
        shapes[f"{at}input_layernorm.weight"] = shapes[f"{at}post_attention_layernorm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    shapes["lm_head.weight"] = (vocab, width)
    return config, shapes


def write_streamed(
    folder: Path, shapes: dict[str, tuple[int, ...]], make: Callable[[int, tuple[int, ...]], torch.Tensor]
) -> None:
    """Write bf16 tensors as safetensors shards of about 300 MB, one tensor in memory at a time."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size > 300_000_000:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * math.prod(shape)
    index: dict[str, str] = {}
    numbers = {name: i for i, name in enumerate(shapes)}
    for s, names in enumerate(shards):
        file_name = f"model-{s + 1:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in names:
            end = at + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [at, end]}
            index[name] = file_name
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file_name, "wb") as file:
            file.write(struct.pack("<Q", len(text)))
            file.write(text)
            for name in names:
                file.write(make(numbers[name], shapes[name]).view(torch.int16).numpy().tobytes())
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def build_large(folder: Path, parameters: int, count: int = 4) -> dict[str, Path]:
    """A random bf16 Llama and ``count`` experts (base + noise). A folder that is complete already is used again."""
    config, shapes = llama_shapes(parameters)

    def base_tensor(number: int, shape: tuple[int, ...]) -> torch.Tensor:
        draw = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        return (0.02 * draw + (1.0 if len(shape) == 1 else 0.0)).bfloat16()

    def expert_tensor(k: int) -> Callable[[int, tuple[int, ...]], torch.Tensor]:
        def make(number: int, shape: tuple[int, ...]) -> torch.Tensor:
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(1_000_000 * (k + 1) + number))
            return (base_tensor(number, shape).float() + 0.002 * noise).bfloat16()

        return make

    out = {}
    makers = {"base": base_tensor, **{f"e{k}": expert_tensor(k) for k in range(count)}}
    for name, make in makers.items():
        target = folder / f"llama-{parameters}" / name
        done = target / "config.json"  # written last
        if not done.exists():
            print(f"writing {target}", file=sys.stderr)
            target.mkdir(parents=True, exist_ok=True)
            write_streamed(target, shapes, make)
            done.write_text(json.dumps(config, indent=2))
        out[name] = target
    return out


def warm(models: dict[str, Path]) -> None:
    """Read every file once, so that both tools find it in the page cache."""
    for path in models.values():
        for file in path.glob("*.safetensors"):
            with open(file, "rb") as handle:
                while handle.read(1 << 24):
                    pass


def large_difference(ours: Path, theirs: Path) -> float:
    """Largest max|a-b| / max|b|, one tensor at a time."""
    where = (
        json.loads((theirs / "model.safetensors.index.json").read_text())["weight_map"]
        if (theirs / "model.safetensors.index.json").exists()
        else dict.fromkeys(layout(theirs), "model.safetensors")
    )
    index = ours / "model.safetensors.index.json"
    mine = json.loads(index.read_text())["weight_map"] if index.exists() else dict.fromkeys(where, "model.safetensors")
    worst = 0.0
    for name, file_name in where.items():
        with safe_open(ours / mine[name], "pt") as a, safe_open(theirs / file_name, "pt") as b:
            worst = max(worst, difference({name: a.get_tensor(name)}, {name: b.get_tensor(name)})[0])
    return worst


def speed(arguments: argparse.Namespace) -> int:
    """Time and memory of both tools for linear and ties, best wall time of ``--repeat`` runs."""
    work = Path(arguments.work or tempfile.mkdtemp(prefix="against-mergekit-"))
    work.mkdir(parents=True, exist_ok=True)
    parameters = parse_count(arguments.speed)
    models = build_large(work, parameters)
    python = mergekit_python(arguments)
    experts = sorted(set(models) - {"base"})
    recipes = {
        "linear": {"merge_method": "linear", "models": _listed(experts, weight=1), "dtype": "bfloat16"},
        "ties": {
            "merge_method": "ties",
            "base_model": "base",
            "models": _listed(experts, weight=1, density=0.2),
            "dtype": "bfloat16",
        },
    }
    total = sum(math.prod(s) for s in llama_shapes(parameters)[1].values())
    print(f"{total / 1e6:.0f} M parameters, bfloat16, {len(experts)} experts, {os.cpu_count()} CPUs; MB = 10^6 bytes\n")
    print("| method | tool | wall s | CPU s | peak anonymous MB | VmHWM MB |")
    print("|---|---|---|---|---|---|")
    status = 0
    for method, recipe in recipes.items():
        path = work / f"{method}.yaml"
        path.write_text(yaml.safe_dump(with_paths(recipe, models), sort_keys=False))
        best: dict[str, Run] = {}
        outputs: dict[str, Path] = {}
        for tool in arguments.tools:
            for _ in range(arguments.repeat):
                out = outputs[tool] = work / f"out-{method}-{tool}"
                shutil.rmtree(out, ignore_errors=True)
                warm(models)
                if tool == "mergekit":
                    result = run_mergekit(python, path, out, sample=True)
                else:
                    result = run_plait(path, out, arguments.plait_option, sample=True)
                if not result.ok:
                    print(f"| {method} | {tool} | failed: {_short(result.output)} | | | |", flush=True)
                    status = 1
                    break
                if tool not in best or result.seconds < best[tool].seconds:
                    best[tool] = result
            if tool in best:
                r = best[tool]
                memory = f"{r.anonymous / 1e6:.0f} | {r.resident / 1e6:.0f}"
                print(f"| {method} | {tool} | {r.seconds:.1f} | {r.cpu:.1f} | {memory} |", flush=True)
        if len(best) == 2:
            a, b = best["mergekit"], best["plait"]
            print(
                f"| {method} | mergekit / plait | {a.seconds / b.seconds:.2f} | {a.cpu / b.cpu:.2f} "
                f"| {a.anonymous / max(b.anonymous, 1):.2f} | {a.resident / max(b.resident, 1):.2f} |"
            )
            gap = large_difference(outputs["plait"], outputs["mergekit"])
            print(f"| {method} | max rel. difference | {gap:.1e} | | | |", flush=True)
        for out in outputs.values():
            shutil.rmtree(out, ignore_errors=True)
    if arguments.work is None:
        shutil.rmtree(work)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit-python", help="interpreter of an environment that has mergekit")
    parser.add_argument("--cache", help="where to make that environment when none is named (default: ~/.cache/plait)")
    parser.add_argument(
        "--pip-option", action="append", default=[], help="one more argument for pip install; repeatable"
    )
    parser.add_argument(
        "--plait-option", action="append", default=[], help="one more argument for plait merge; repeatable"
    )
    parser.add_argument("--work", help="folder for checkpoints and outputs, kept (default: a temporary folder)")
    parser.add_argument("--only", nargs="+", help="run the cases whose name contains one of these words")
    parser.add_argument("--against", choices=("plait", "reference"), default="plait")
    parser.add_argument("--list", action="store_true", help="print the cases' names and stop")
    parser.add_argument("--speed", metavar="PARAMS", help="measure time and memory at this size instead (0.5B)")
    parser.add_argument("--repeat", type=int, default=2, help="runs of each measurement; the fastest counts")
    parser.add_argument("--tools", nargs="+", choices=("mergekit", "plait"), default=["mergekit", "plait"])
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(c.name for c in cases()))
        return 0
    return speed(arguments) if arguments.speed else compare(arguments)


if __name__ == "__main__":
    sys.exit(main())
