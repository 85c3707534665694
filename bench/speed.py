"""Plait against the floor and against mergekit: time, processor time and memory, in one group of processes.

    python bench/speed.py                                    478 M parameters in bfloat16, a base and four experts
    python bench/speed.py --size 1.5B --methods linear ties  other sizes, some methods
    python bench/speed.py --mergekit linear ties             run mergekit too, for these methods (minutes each)
    python bench/speed.py --cold                             the files from the disk, floor and merge alike

`linear` is also run beside the least code that does it at speed (bench/prototype.py).

Every run of Plait follows a run of the floor (bench/floor.py: each input byte read once, the output written once), and
its time is given as a multiple of that one; the page cache is warm, unless --cold. Medians over --rounds, and all runs
to bench/results/speed-SIZE.csv. mergekit gets one run a method, in an environment of its own.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from large import build_large, cool, parse_count, warm
from processes import ROOT, Run, mergekit_python, run, run_mergekit, run_plait, short

from plait.evaluate.compare import machine

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear"},
    "task_arithmetic": {"merge_method": "task_arithmetic", "parameters": {"weight": 0.3}},
    "ties": {"merge_method": "ties", "parameters": {"weight": 1.0, "density": 0.2}},
    "ties_model": {"merge_method": "ties", "parameters": {"weight": 1.0, "density": 0.2, "trim": "model"}},
    "dare_ties": {"merge_method": "dare_ties", "parameters": {"weight": 1.0, "density": 0.3}},
    "breadcrumbs": {"merge_method": "breadcrumbs", "parameters": {"weight": 0.3, "density": 0.9, "gamma": 0.01}},
    "sce": {"merge_method": "sce", "parameters": {"select_topk": 0.5}},
    "della": {"merge_method": "della", "parameters": {"weight": 1.0, "density": 0.5, "epsilon": 0.15}},
}
ONLY_OURS = {"ties_model"}


def recipe(name: str, models: dict[str, Path]) -> dict[str, Any]:
    """The recipe of one method, in the words of both tools. `linear` merges the base as well: both read every file."""
    given = METHODS[name]
    parameters = dict(given.get("parameters", {}))
    each = {key: parameters.pop(key) for key in ("weight", "density", "gamma", "epsilon") if key in parameters}
    listed = [str(path) for key, path in models.items() if key != "base" or name == "linear"]
    entries: list[dict[str, Any]] = [
        {"model": path, "parameters": each or {"weight": 1.0}} if name != "sce" else {"model": path} for path in listed
    ]
    result: dict[str, Any] = {"merge_method": given["merge_method"], "models": entries, "dtype": "bfloat16"}
    if name != "linear":
        result["base_model"] = str(models["base"])
    if parameters:
        result["parameters"] = parameters
    return result


def floor(files: list[str], size: int, out: Path, before: Callable[[], None]) -> tuple[float, float]:
    """The second of two runs of the floor, each in a process of its own.

    The first leaves free pages that the second, and the merge after it, need not ask a virtual machine's host for.
    """
    command = [sys.executable, str(ROOT / "bench" / "floor.py"), str(out), str(size), *files]
    text = ""
    for _ in range(2):
        before()
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        out.unlink()
    wall, cpu = map(float, text.split())
    return wall, cpu


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="478M")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mergekit", nargs="*", choices=sorted(set(METHODS) - ONLY_OURS), default=[])
    parser.add_argument("--mergekit-python", help="interpreter of an environment that has mergekit")
    parser.add_argument("--cache", help="where to make that environment when none is named (default: ~/.cache/plait)")
    parser.add_argument("--pip-option", action="append", default=[])
    parser.add_argument("--cold", action="store_true", help="the page cache forgets the files before every run")
    parser.add_argument("--plait-option", action="append", default=[])
    parser.add_argument("--work", type=Path, help="folder for checkpoints and outputs, kept (default: a temporary one)")
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="plait-speed-"))
    models = build_large(work, parse_count(given.size))
    files = [str(file) for path in models.values() for file in sorted(path.glob("*.safetensors"))]
    size = sum(file.stat().st_size for file in models["base"].glob("*.safetensors"))
    lines: list[dict[str, Any]] = []

    def note(tool: str, method: str, run: Run, below: float | None) -> None:
        times = {"wall": round(run.seconds, 3), "cpu": round(run.cpu, 3)}
        ratio = {"floor": below and round(below, 3), "times_floor": below and round(run.seconds / below, 2)}
        lines.append({"tool": tool, "method": method, **times, **ratio, "anonymous_mb": run.anonymous // 10**6})
        print(lines[-1], file=sys.stderr, flush=True)

    for method in given.methods:
        (work / f"{method}.yaml").write_text(yaml.safe_dump(recipe(method, models), sort_keys=False))
    warm(models)

    def before() -> None:
        if given.cold:
            cool(models)

    out = work / "out"
    options, peaks = ["--quiet", *given.plait_option], {}
    for turn in range(-2, given.rounds):
        for method in given.methods:
            shutil.rmtree(out, ignore_errors=True)  # no part of a merge, as it is none of the floor
            below, cpu = floor(files, size, work / "floor.bin", before)
            before()
            # The first round warms the caches and compiles the loops; memory is watched in the second, which takes time
            # from a merge that uses all processors, and times are of the others.
            done = run_plait(work / f"{method}.yaml", out, options, sample=turn == -1)
            if not done.ok:
                print(f"{method}: {short(done.output)}")
                return 1
            if turn == -1:
                peaks[method] = done.anonymous
            elif turn >= 0:
                note("floor", method, Run(True, below, cpu), None)
                note("plait", method, replace(done, anonymous=peaks[method]), below)
            if method == "linear":
                shutil.rmtree(out, ignore_errors=True)
                before()
                least = run(
                    [sys.executable, str(ROOT / "bench" / "prototype.py"), str(out), *map(str, models.values())]
                )
                if turn >= 0:
                    note("prototype", method, least, below)
    for method in given.mergekit:
        shutil.rmtree(out, ignore_errors=True)
        before()
        done = run_mergekit(mergekit_python(given), work / f"{method}.yaml", out, sample=True)
        if done.ok:
            note("mergekit", method, done, None)
        else:
            print(f"mergekit {method}: {short(done.output)}", file=sys.stderr)
    shutil.rmtree(out, ignore_errors=True)
    table(lines, given.methods)
    path = ROOT / "bench" / "results" / f"speed-{given.size}{'-cold' * given.cold}.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(f"# {machine()}; {datetime.date.today()}\n")
        writer = csv.DictWriter(file, fieldnames=list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    if given.work is None:
        shutil.rmtree(work)
    return 0


def table(lines: list[dict[str, Any]], methods: list[str]) -> None:
    """Medians, as Markdown."""

    def middle(tool: str, method: str, key: str) -> float | None:
        values = [line[key] for line in lines if line["tool"] == tool and line["method"] == method]
        return statistics.median(values) if values else None

    least, total = (middle("prototype", "linear", key) for key in ("wall", "cpu"))
    if least is not None:
        print(f"prototype of linear: {least:.2f} s, {total:.2f} CPU s\n")
    print("| method | floor s | wall s | × floor | CPU s | RssAnon MB | mergekit wall s | CPU s | × wall | × CPU |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for method in methods:
        ours = {key: middle("plait", method, key) or 0.0 for key in ("wall", "cpu", "times_floor", "anonymous_mb")}
        theirs = {key: middle("mergekit", method, key) for key in ("wall", "cpu")}
        peer = "| – | – | – | – |"
        if theirs["wall"] is not None and theirs["cpu"] is not None:
            ratios = f"{theirs['wall'] / ours['wall']:.1f} | {theirs['cpu'] / ours['cpu']:.1f}"
            peer = f"| {theirs['wall']:.1f} | {theirs['cpu']:.1f} | {ratios} |"
        print(
            f"| {method} | {middle('floor', method, 'wall') or 0:.2f} | {ours['wall']:.2f} | {ours['times_floor']:.2f} "
            f"| {ours['cpu']:.2f} | {ours['anonymous_mb']:.0f} {peer}"
        )


if __name__ == "__main__":
    sys.exit(main())
