"""What one learning step of a merge costs: ours against autograd through the merge, for more and more experts.

    plait suite build vision
    python bench/learning_step.py                    # layer-wise AdaMerging
    python bench/learning_step.py --method mask      # the Concrete mask

All ways of bench/learning_ways.py run beside each other, each in its own process, and take their steps in turn, so that
what disturbs the machine disturbs all of them. They see the same images, base and experts. At least one expert is the
base plus seeded noise, as large as a real task vector, so that every tensor is learned even where the suite's own
experts have frozen layers; so are all experts that the suite lacks. Times are medians after a first step that does not
count: step_s by the clock, the others in processor seconds, which a busy machine blurs less (least with --threads 1).
Where autograd goes back through the merge, that is in model_cpu_s. Memory is the highest RssAnon during the steps; the
file that ours maps is beside it. Lines are added to bench/results/learning_step.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from learning_ways import METHODS, plan_of
from processes import ROOT, difference, plait_environment, status
from safetensors.torch import save_file

from plait.engine import Engine
from plait.evaluate.compare import machine
from plait.learn.vectors import TaskVectors
from plait.plan import Plan
from plait.stages import Silent
from plait.suites.places import load_suite
from plait.threads import usable_threads

WAYS = ("ours", "sum", "product", "one")
COLUMNS: tuple[str, ...] = (
    "date", "machine", "torch", "threads", "suite", "method", "experts", "images", "way", "step_s", "cpu_s",
    "merge_cpu_s", "model_cpu_s", "products_cpu_s", "of_one_model", "peak_anonymous_mb", "mapped_mb",
    "gradient_difference",
)  # fmt: skip


class Worker:
    """One way in a process of its own."""

    def __init__(self, way: str, options: list[str]) -> None:
        command = [sys.executable, str(ROOT / "bench" / "learning_ways.py"), "--way", way, *options]
        self.way, self.peak = way, 0
        self.steps: list[dict[str, float]] = []
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=plait_environment()
        )
        self._answer()
        self.peak = 0

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def ask(self, command: str) -> dict[str, float]:
        """What it answers; its memory is watched meanwhile."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        while not select.select([self._process.stdout], [], [], 0.01)[0]:
            self.peak = max(self.peak, status(self._process.pid).get("RssAnon", 0))
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.way} has ended early; what it said is above")
        return json.loads(line)

    def median(self, part: str) -> float:
        """Over the steps that count."""
        return statistics.median(step.get(part, 0.0) for step in self.steps)


def write_noise_experts(plan: Plan, work: Path, count: int) -> dict[str, str]:
    """Folders of base + noise: in every tensor as far from the base as one of the plan's experts."""
    assert plan.method.learned is not None
    assert plan.base is not None
    engine = Engine(threads=usable_threads(), memory=512_000_000, device="cpu", progress=Silent())
    vectors = TaskVectors(plan, engine, work / "vectors.bin", plan.method.learned.vectors)
    norms = {t.key: vectors.rows(t.key).norm(dim=1) for t in plan.merged}
    usual = sum(float(norm.square().mean()) for norm in norms.values()) / sum(t.spec.numel for t in plan.merged)
    made = {}
    for number in range(count):
        folder = work / f"noise{number:02d}"
        folder.mkdir()
        random = torch.Generator().manual_seed(number)
        tensors = {}
        for tensor in plan.merged:
            draw = torch.randn(tensor.spec.numel, generator=random)
            norm = float(norms[tensor.key][number % len(vectors.tasks)]) or (usual * len(draw)) ** 0.5
            moved = vectors.base(tensor.key) + draw * (norm / float(draw.norm()))
            tensors[tensor.name] = moved.view(tensor.shape)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        shutil.copy(plan.base.source.folder / "config.json", folder)
        made[folder.name] = str(folder)
    (work / "vectors.bin").unlink()
    return made


def measure(given: argparse.Namespace, base: str, experts: dict[str, str], work: Path) -> list[dict[str, object]]:
    """All ways with these experts."""
    options = [
        "--method", given.method, "--suite", given.suite, "--base", base, "--experts", json.dumps(experts),
        "--work", str(work), "--images", str(given.images), "--threads", str(given.threads),
    ]  # fmt: skip
    workers: list[Worker] = []
    try:
        workers += [Worker(way, options) for way in WAYS]
        for worker in workers:
            worker.ask("step")
            worker.ask(f"save {work / worker.way}.pt")
        for turn in range(given.steps):
            for worker in workers[turn % len(workers) :] + workers[: turn % len(workers)]:
                worker.steps.append(worker.ask("step"))
    finally:
        for worker in workers:
            worker.stop()
    found = {way: torch.load(work / f"{way}.pt") for way in WAYS}
    one = workers[-1].median("all")
    mapped = (work / "ours.bin").stat().st_size
    lines = []
    for worker in workers:
        step, cpu, merge, products = (worker.median(part) for part in ("step", "all", "merge", "products"))
        gap = difference(found["ours"], found[worker.way])[0] if worker.way in ("sum", "product") else None
        lines.append({
            "date": datetime.date.today().isoformat(), "machine": machine(), "torch": torch.__version__,
            "threads": given.threads, "suite": load_suite(given.suite).name, "method": given.method,
            "experts": len(experts), "images": given.images, "way": worker.way, "step_s": f"{step:.3f}",
            "cpu_s": f"{cpu:.3f}", "merge_cpu_s": f"{merge:.3f}", "model_cpu_s": f"{cpu - merge - products:.3f}",
            "products_cpu_s": f"{products:.3f}", "of_one_model": f"{cpu / one:.2f}",
            "peak_anonymous_mb": round(worker.peak / 1e6),
            "mapped_mb": round(mapped / 1e6) if worker.way == "ours" else 0,
            "gradient_difference": "" if gap is None else f"{gap:.1e}",
        })  # fmt: skip
    return lines


def main() -> int:
    """Measure, print a table, add lines to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="adamerging")
    parser.add_argument("--suite", default="vision", help="a suite of images that is built on this machine")
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--images", type=int, default=16, help="in a step, over all tasks of the suite")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=usable_threads())
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "learning_step.csv")
    given = parser.parse_args()
    suite = load_suite(given.suite)
    experts = {name: suite.place(task.expert) for name, task in sorted(suite.tasks.items())}
    shown = COLUMNS[6:7] + COLUMNS[8:]
    print("| " + " | ".join(shown) + " |")
    print("|---" * len(shown) + "|")
    with tempfile.TemporaryDirectory(prefix="learning-step-") as name:
        work = Path(name)
        plan = plan_of(given.method, suite.place(suite.base), experts, given.images)
        noise = write_noise_experts(plan, work, max(1, max(given.experts) - len(experts)))
        plan.library.close()
        for count in given.experts:
            own = list(experts.items())[: count - 1]
            picked = dict([*own, *list(noise.items())[: count - len(own)]])
            lines = measure(given, suite.place(suite.base), picked, work)
            for line in lines:
                print("| " + " | ".join(str(line[key]) for key in shown) + " |", flush=True)
            given.out.parent.mkdir(parents=True, exist_ok=True)
            new = not given.out.exists()
            with given.out.open("a", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerows(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
