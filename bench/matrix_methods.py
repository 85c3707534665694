"""Time and memory of the methods that decompose or descend on whole matrices.

    python bench/matrix_methods.py vit-b          12 layers of width 768, eight experts
    python bench/matrix_methods.py llama-1b       2 of 16 layers of width 2048 (four experts), and what 16 would take

Random weights, bfloat16; experts are the base and noise of rank 16. One process a method. Writes
bench/results/matrix-NAME.csv. regmean is left out: it spends its time on the model's forward passes.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from processes import ROOT, run_plait, short
from safetensors.torch import save_file

from plait.evaluate.compare import machine

MODELS: dict[str, dict[str, Any]] = {
    "vit-b": {
        "experts": 8, "layers": 12, "measured": 12,
        "shapes": [(768, 768)] * 4 + [(3072, 768), (768, 3072)],
    },
    "llama-1b": {
        "experts": 4, "layers": 16, "measured": 2,
        "shapes": [(2048, 2048)] * 2 + [(512, 2048)] * 2 + [(8192, 2048)] * 2 + [(2048, 8192)],
    },
}  # fmt: skip
METHODS = ["task_arithmetic", "tsv_m", "iso_c", "iso_cts", "wudi"]


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="plait-matrix-"))
    base, *experts = build(work, given.model)
    factor = MODELS[given.model]["layers"] / MODELS[given.model]["measured"]
    lines: list[dict[str, Any]] = []
    for method in given.methods:
        recipe: dict[str, Any] = {
            "merge_method": method, "base_model": str(base), "models": [{"model": str(path)} for path in experts],
        }  # fmt: skip
        (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        done = run_plait(work / "recipe.yaml", work / "out", ["--overwrite", "--quiet", "--memory", "4GB"], sample=True)
        if not done.ok:
            print(f"{method}: {short(done.output)}")
            return 1
        lines.append(
            {
                "method": method, "wall": round(done.seconds, 1), "cpu": round(done.cpu, 1),
                "anonymous_mb": done.anonymous // 10**6, "cpu_of_all_layers": round(done.cpu * factor, 1),
            }
        )  # fmt: skip
        print(lines[-1], flush=True)
    with open(ROOT / "bench" / "results" / f"matrix-{given.model}.csv", "w", encoding="utf-8", newline="") as file:
        file.write(f"# {machine()}; {datetime.date.today()}\n")
        writer = csv.DictWriter(file, fieldnames=list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
