"""What the measuring verbs print and write beside their tables."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from plait.errors import RecipeError
from plait.evaluate import tables
from plait.evaluate.measure import Options
from plait.evaluate.results import Comparison, Sweep, dump
from plait.evaluate.subjects import family_name
from plait.show import console, emit
from plait.suites.builtin import RECIPES
from plait.suites.data import check_disjoint, load_split
from plait.suites.definition import Suite
from plait.suites.places import PACKAGED, suite_folder

__all__ = ["console", "emit", "emit_text", "options", "parts", "sizes", "suite_data", "suite_text", "suites_data",
           "suites_text", "tables_text", "write_comparison", "write_sweep"]  # fmt: skip

_DTYPES = ("float32", "bfloat16", "float16")


def emit_text(json_text: str, as_json: bool, text: Callable[[], None]) -> None:
    """JSON that is text already, or the text for people."""
    if as_json:
        print(json_text, end="")
    else:
        text()


def options(
    batch_size: int, dtype: str, device: str, no_cache: bool, progress: Any, protocol: str = "honest"
) -> Options:
    """Evaluation options from the command line."""
    if protocol not in ("honest", "paper"):
        raise RecipeError(f"--protocol {protocol}: must be honest or paper")
    if dtype not in _DTYPES:
        raise RecipeError(f"--dtype {dtype}: must be one of {', '.join(_DTYPES)}")
    return Options(
        batch_size=batch_size, dtype=dtype, device=device, use_cache=not no_cache, progress=progress,
        mixed=protocol == "honest",
    )  # fmt: skip


def parts(text: str | None) -> list[str]:
    """`a,b,c` as names."""
    return [part.strip() for part in text.split(",")] if text is not None else []


def sizes(text: str | None) -> list[int]:
    """`2,4,6` as numbers."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise RecipeError(f"--experts {text}: must be whole numbers with commas, such as 2,4,6") from None


def suites_data() -> list[dict[str, Any]]:
    """The suites that come with Plait."""
    built = [
        {"name": name, "title": recipe.title, "tasks": list(recipe.tasks), "folder": str(suite_folder(name)),
         "built": (suite_folder(name) / "suite.yaml").is_file(), "from": "built here"}
        for name, recipe in RECIPES.items()
    ]  # fmt: skip
    hub = [
        {"name": name, "title": title, "tasks": [], "folder": "", "built": None, "from": "the Hugging Face hub"}
        for name, title in PACKAGED.items()
    ]
    return built + hub


def suites_text(data: list[dict[str, Any]]) -> None:
    """The suites as a table."""
    table = Table(box=None, header_style="bold")
    for name in ("suite", "what", "state"):
        table.add_column(name)
    for item in data:
        state = "read from the hub" if item["built"] is None else "built" if item["built"] else "not built"
        table.add_row(item["name"], item["title"], state)
    console().print(table)
    console().print("plait suite build NAME makes one; plait suite show NAME shows one.", style="dim")


def suite_data(suite: Suite) -> dict[str, Any]:
    """A suite with its splits read."""
    tasks = {}
    for task, entry in suite.tasks.items():
        splits = {name: load_split(suite, task, name) for name in entry.data}
        check_disjoint(task, splits)
        # Written answers are no classes, though the labels are texts.
        classes = None if "exact_match" in entry.metrics else splits["test"].classes
        tasks[task] = {
            "expert": entry.expert, "head": entry.head or "the expert's", "metrics": list(entry.metrics),
            "classes": classes, "splits": {name: len(split) for name, split in splits.items()},
            "data": {name: split.where for name, split in splits.items()},
        }  # fmt: skip
    return {"name": suite.name, "folder": str(suite.folder), "base": suite.base, "family": family_name(suite),
            "tasks": tasks}  # fmt: skip


def suite_text(data: dict[str, Any]) -> None:
    """A suite as a table."""
    table = Table(
        box=None, header_style="bold", title=f"{escape(data['name'])}: {escape(data['base'])} ({data['family']})"
    )
    names = ("task", "classes", "train", "adapt", "test", "metrics", "expert", "head")
    for place, name in enumerate(names):
        table.add_column(name, justify="right" if 1 <= place <= 4 else "left")
    for task, item in data["tasks"].items():
        counts = [str(item["splits"].get(split, "-")) for split in ("train", "adapt", "test")]
        classes = str(len(item["classes"])) if item["classes"] else "-"
        cells = [task, classes, *counts, ", ".join(item["metrics"]), item["expert"], item["head"]]
        table.add_row(*map(escape, cells))
    table.caption = "test shares no input with train or adapt"
    console().print(table)


def write_comparison(found: Comparison, folder: Path) -> list[Path]:
    """comparison.json, table.md, table.csv, report.html."""
    from plait.report import write_report

    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "comparison.json": dump(found),
        "table.md": tables.comparison_markdown(found),
        "table.csv": tables.comparison_csv(found),
    }
    written = [_write(folder / name, text) for name, text in texts.items()]
    return [*written, write_report([found], folder / "report.html")]


def write_sweep(found: Sweep, folder: Path) -> list[Path]:
    """sweep.json, report.html."""
    from plait.report import write_report

    return [_write(folder / "sweep.json", dump(found)), write_report([found], folder / "report.html")]


def tables_text(shown: list[Table], written: list[Path]) -> None:
    """Tables, and where their files are."""
    made = console()
    for table in shown:
        made.print(table)
        made.print()
    for path in written:
        made.print(f"  {path}", style="dim")


def _write(path: Path, text: str) -> Path:
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
    return path
