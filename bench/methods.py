"""Every method on a suite: score, time, memory and data seen, one line a method.

    python bench/methods.py vision                           # all methods that stand in METHODS
    python bench/methods.py text tsv_m ties:density=0.2      # some

Each is merged by `plait merge` in a process of its own (methods that learn are fitted there), then measured with one
`plait compare`. Writes bench/results/methods-SUITE.csv; merged models stay in --work.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from processes import ROOT, run_plait, short

import plait.methods  # noqa: F401
from plait.evaluate.compare import compare, machine, saw
from plait.evaluate.contenders import contender
from plait.evaluate.measure import Bench
from plait.evaluate.results import dump
from plait.evaluate.subjects import Options
from plait.report import write_report
from plait.state import load_state
from plait.suites.places import load_suite

METHODS = [
    "average", "task_arithmetic:weight=0.3", "ties:density=0.2,trim=model,normalize=false,lambda=0.3", "consensus",
    "awd:weight=0.3", "awd:weight=0.3,granularity=block", "iso_c", "iso_cts", "tsv_m", "wudi", "fisher", "regmean",
    "regmean_pp", "surgery", "adamerging", "adamerging:objective=entropy", "adamerging:granularity=task",
    "adamerging_pp", "awd_adamerging", "concrete_task_arithmetic", "concrete_adamerging",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", help="a suite's name, or the path of its YAML file")
    parser.add_argument("methods", nargs="*", default=METHODS, help="method[:parameter=value,…]")
    parser.add_argument("--work", type=Path, default=None, help="where merged models go")
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--dtype", default="float32", help="of the models while they are measured")
    given = parser.parse_args()
    suite = load_suite(given.suite)
    work = given.work or Path(f"methods-{suite.name}")
    work.mkdir(parents=True, exist_ok=True)
    costs, labels = {}, []
    for spec in given.methods:
        item = contender(spec, suite)
        assert item.recipe is not None, f"{spec} is no method"
        recipe, out = work / f"{item.slug}.yaml", work / item.slug
        recipe.write_text(yaml.safe_dump(item.recipe.model_dump(exclude_defaults=True), sort_keys=False))
        print(f"{item.label} …", file=sys.stderr, flush=True)
        cost = work / f"{item.slug}.json"
        if not (cost.is_file() and (out / "plait.json").is_file()):
            done = run_plait(recipe, out, ["--overwrite", "--quiet", "--memory", given.memory], sample=True)
            if not done.ok:
                print(f"{item.label}: {short(done.output)}", file=sys.stderr)
                continue
            facts = {"seconds": done.seconds, "cpu": done.cpu, "anonymous": done.anonymous, "resident": done.resident}
            cost.write_text(json.dumps(facts))
        costs[item.label] = json.loads(cost.read_text())
        labels.append((item.label, out))
    found = compare([f"{slug(label)}={out}" for label, out in labels], Bench(suite, Options(dtype=given.dtype)), work)
    (work / "comparison.json").write_text(dump(found))
    write_report([found], work / "report.html")
    rows = {row.label: row for row in found.rows}
    lines: list[dict[str, Any]] = []
    for label, out in [("experts", None), ("base + heads", None), *labels]:
        row = rows[slug(label) if out is not None else label]
        state = load_state(out / "state") if out is not None and (out / "state").is_dir() else None
        cost = costs.get(label, {})
        share = row.evaluation.normalised
        lines.append(
            {
                "method": label,
                **{task: f"{100 * result.score.value:.1f}" for task, result in row.evaluation.tasks.items()},
                "average": f"{100 * row.evaluation.average.value:.2f}",
                "normalised": "" if share is None else f"{100 * share.value:.2f}",
                "low": "" if share is None else f"{100 * share.low:.2f}",
                "high": "" if share is None else f"{100 * share.high:.2f}",
                "seconds": f"{cost['seconds']:.1f}" if cost else "",
                "cpu_seconds": f"{cost['cpu']:.1f}" if cost else "",
                "anonymous_mb": f"{cost['anonymous'] / 1e6:.0f}" if cost else "",
                "resident_mb": f"{cost['resident'] / 1e6:.0f}" if cost else "",
                "data": saw(state) if out is not None else "",
            }
        )
    target = ROOT / "bench" / "results" / f"methods-{suite.name}.csv"
    target.parent.mkdir(exist_ok=True)
    with target.open("w", newline="") as file:
        file.write(f"# {machine()}; {datetime.date.today()}\n")
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    print(target)


def slug(label: str) -> str:
    """A label that can stand before `=` on a command line."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label)


if __name__ == "__main__":
    main()
