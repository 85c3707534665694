"""Time and memory of the methods that decompose or descend on whole matrices.

    python bench/matrix_methods.py vit-b          12 layers of width 768, eight experts
    python bench/matrix_methods.py llama-1b       1 of 16 layers of width 2048, four experts

Random weights, bfloat16; experts are the base, a change of rank 16 and noise of full rank. One process a method, on one
thread. `cpu_of_all_layers` is what all layers and all steps would take: the CPU time beyond an empty merge's, in
proportion. wudi is timed at 10 and at 40 of its 300 steps, which all cost the same. regmean is its least squares alone,
without the model's forward passes, on one layer and Gram matrices of random inputs. Writes
bench/results/matrix-NAME.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from processes import ROOT, Run, run_plait, short
from safetensors.torch import save_file

from plait.evaluate.compare import machine
from plait.learn.regmean import least_squares

MODELS: dict[str, dict[str, Any]] = {
    "vit-b": {
        "experts": 8, "layers": 12, "measured": 12,
        "shapes": [(768, 768)] * 4 + [(3072, 768), (768, 3072)],
    },
    "llama-1b": {
        "experts": 4, "layers": 16, "measured": 1,
        "shapes": [(2048, 2048)] * 2 + [(512, 2048)] * 2 + [(8192, 2048)] * 2 + [(2048, 8192)],
    },
}  # fmt: skip
METHODS = ["tsv_m", "iso_c", "iso_cts", "knots", "wudi", "regmean"]
FEW, SOME, ALL = 10, 40, 300
"""Steps of wudi: two that are timed, and its default."""


def build(folder: Path, name: str) -> list[Path]:
    """The base and its experts."""
    given = MODELS[name]
    noise = torch.Generator().manual_seed(0)
    shapes = {
        f"layers.{i}.{j}.weight": shape for i in range(given["measured"]) for j, shape in enumerate(given["shapes"])
    }
    base = {key: torch.randn(shape, generator=noise) * 0.02 for key, shape in shapes.items()}
    made = []
    for k in range(given["experts"] + 1):
        tensors = {}
        for key, value in base.items():
            rows, columns = value.shape
            low = torch.randn(rows, 16, generator=noise) @ torch.randn(16, columns, generator=noise)
            change = 0.0005 * low + 0.0005 * torch.randn(rows, columns, generator=noise)
            tensors[key] = (value if k == 0 else value + change).bfloat16()
        path = folder / ("base" if k == 0 else f"expert{k}")
        path.mkdir()
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({"model_type": "none"}))
        made.append(path)
    return made


def merge(work: Path, recipe: dict[str, Any]) -> Run:
    """One merge in a process of its own, on one thread."""
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = ["--overwrite", "--quiet", "--memory", "4GB", "--threads", "1"]
    done = run_plait(work / "recipe.yaml", work / "out", options, sample=True)
    if not done.ok:
        raise SystemExit(f"{recipe['merge_method']}: {short(done.output)}")
    return done


def whole(name: str, work: Path, recipe: dict[str, Any], empty: float) -> tuple[Run, float]:
    """A merge, and the CPU seconds that all layers and steps would take; `empty` is what a merge takes beside them."""
    factor = MODELS[name]["layers"] / MODELS[name]["measured"]
    if recipe["merge_method"] != "wudi":
        done = merge(work, recipe)
        return done, empty + (done.cpu - empty) * factor
    few, some = (merge(work, {**recipe, "parameters": {"steps": steps}}) for steps in (FEW, SOME))
    step = (some.cpu - few.cpu) / (SOME - FEW)
    return some, empty + (some.cpu - empty + step * (ALL - SOME)) * factor


def solving(name: str) -> tuple[Run, float]:
    """regmean's sums and least squares of one layer, in this process."""
    given = MODELS[name]
    noise = torch.Generator().manual_seed(0)
    torch.set_num_threads(1)
    wall = cpu = 0.0
    for out, width in given["shapes"]:
        x = torch.randn(2 * width, width, generator=noise, dtype=torch.float64)
        gram, taus = x.T @ x / len(x), torch.randn(given["experts"], out, width, generator=noise).double()
        clocks = time.perf_counter(), time.process_time()
        total, pull = torch.zeros_like(gram), torch.zeros(width, out, dtype=torch.float64)
        for tau in taus:
            total.add_(gram)
            pull.addmm_(gram, tau.T)
        least_squares(total, pull, taus.mean(0))
        wall, cpu = wall + time.perf_counter() - clocks[0], cpu + time.process_time() - clocks[1]
    return Run(True, wall, cpu), cpu * given["layers"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    given = parser.parse_args()
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="plait-matrix-") as folder:
        work = Path(folder)
        base, *experts = build(work, given.model)
        models = [{"model": str(path)} for path in experts]
        recipe: dict[str, Any] = {"base_model": str(base), "models": models}
        merge(work, {**recipe, "merge_method": "task_arithmetic"})  # compiles the loops, where none are yet
        empty = merge(work, {**recipe, "merge_method": "passthrough", "models": models[:1]}).cpu
        for method in given.methods:
            if method == "regmean":
                done, total = solving(given.model)
            else:
                done, total = whole(given.model, work, {**recipe, "merge_method": method}, empty)
            lines.append(
                {
                    "method": method, "wall": round(done.seconds, 1), "cpu": round(done.cpu, 1),
                    "anonymous_mb": done.anonymous // 10**6, "cpu_of_all_layers": round(total, 1),
                }
            )  # fmt: skip
            print(lines[-1], flush=True)
    with open(ROOT / "bench" / "results" / f"matrix-{given.model}.csv", "w", encoding="utf-8", newline="") as file:
        file.write(f"# {machine()}; {datetime.date.today()}\n")
        writer = csv.DictWriter(file, fieldnames=list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
