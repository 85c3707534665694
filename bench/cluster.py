"""Local threads against a Ray cluster of this machine, in turn: the same bytes, and the ratio of their times.

    PYTHONPATH=. python bench/cluster.py --parameters 478M --data /tmp/big

The cluster is up before the clock starts. Its first merge is told apart: there every worker imports torch and plans.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
from large import build_large, parse_count, warm

import plait
from plait.engine import keep_freed_memory


def timed(recipe: dict[str, Any], out: Path, **engine: Any) -> tuple[float, Any]:
    """Seconds of one merge, and the hashes of what it wrote; the output is removed."""
    start = time.perf_counter()
    merged = plait.merge(recipe, out, threads=2, **engine)
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds, merged.hashes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=parse_count, default="478M")
    parser.add_argument("--data", type=Path, required=True, help="where the models are, or are to be written")
    parser.add_argument("--method", default="ties")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    models = build_large(args.data, args.parameters)
    warm(models)
    keep_freed_memory()
    recipe = {
        "merge_method": args.method,
        "base_model": str(models["base"]),
        "models": [{"model": str(path)} for name, path in models.items() if name != "base"],
        "parameters": {"density": 0.2} if args.method == "ties" else {},
    }
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=1 << 27, log_to_driver=False)
    out = args.data / "cluster-output"
    first, wanted = timed(recipe, out, engine="ray")
    times: dict[str, list[float]] = {"local": [], "ray": []}
    for _ in range(args.runs):
        for engine, found in times.items():
            seconds, hashes = timed(recipe, out, engine=engine)
            assert hashes == wanted, f"{engine}: other bytes"
            found.append(seconds)
    medians = {engine: statistics.median(found) for engine, found in times.items()}
    print(f"{args.method}, {args.parameters / 1e6:.0f} M x {len(models) - 1}, load {os.getloadavg()[0]:.1f}")
    for engine, found in times.items():
        print(f"  {engine:5s} median {medians[engine]:6.2f} s of {', '.join(f'{t:.2f}' for t in found)}")
    print(
        f"  first merge of the cluster {first:.2f} s; local / ray {medians['local'] / medians['ray']:.2f}; same SHA-256"
    )


if __name__ == "__main__":
    main()
