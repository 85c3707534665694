"""Expose nondeterminism: every method, merged in every way that must not matter, has one digest (`make determinism`).

The ways: threads, memory, the order of the models in the recipe, the hash seed of Python, going on after a kill, and
the device against itself. Learned methods are fitted once and merged with that state; the fit is then done again in the
same ways. Fits on other numbers of threads are known to differ in the last bits: they are shown, and do not count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import torch
import yaml
from faults import process
from faults.process import often, tree
from safetensors.torch import save_file

QUICK: tuple[str, ...] = ("della",)
HASH_SEEDS = ("0", "4242")
SHORT = {"steps": 4, "epochs": 2, "finetune_steps": 2, "batch": 4}
TASKS = ("tone", "count", "pair")


def make_models(root: Path, names: list[str]) -> None:
    """Experts of plain tensors for what is static, and the mini suite for what learns or routes."""
    from plait.methods import get_method

    sizes = {"embed.weight": (900, 500), "norm.weight": (500,), "empty.weight": (0, 4), "conv.weight": (24, 6, 3, 3)}
    sizes |= {f"layers.{k}.{name}": shape for k in range(3) for name, shape in (("w", (320, 256)), ("b", (320,)))}
    for place, name in enumerate(("base", *TASKS)):
        start, noise = torch.Generator().manual_seed(1), torch.Generator().manual_seed(10 + place)
        tensors = {}
        for key, shape in sizes.items():
            values = torch.randn(shape, generator=start)
            drift = 0.05 * torch.randn(shape, generator=noise) * (torch.rand(shape, generator=noise) > 0.3)
            values = values if name == "base" else values + drift
            tensors[key] = values.bfloat16() if ".1." in key else values
        (root / "plain" / name).mkdir(parents=True)
        save_file(tensors, root / "plain" / name / "model.safetensors")
    if any(get_method(name).learned or get_method(name).dynamic for name in names):
        import mini_suite

        suite = mini_suite.make(root / "suite")
        (root / "mini").mkdir()
        for name, folder in {"base": suite.base, **{task: suite.expert(task) for task in TASKS}}.items():
            (root / "mini" / name).symlink_to(folder)


def recipe(root: Path, name: str, backwards: bool) -> dict[str, Any]:
    """A recipe with the parameters of `plait init`."""
    from plait.methods import get_method
    from plait.templates import recipe_template

    method = get_method(name)
    place = root / ("mini" if method.learned or method.dynamic else "plain")
    most = method.experts[1] or len(TASKS)
    models = [{"model": str(place / task), "name": task} for task in TASKS[:most]]
    template = yaml.safe_load(recipe_template(name))
    made = {key: template[key] for key in ("merge_method", "parameters", "shared", "route") if template.get(key)}
    if "anchor" in made.get("parameters", {}):
        made["parameters"]["anchor"] = TASKS[0]
    made |= {"models": models[::-1] if backwards else models, "seed": 3}
    if method.base != "unused":
        made["base_model"] = str(place / "base")
    if method.learned:
        fit: dict[str, Any] = {key: value for key, value in SHORT.items() if key in method.learned.parameters}
        if "objective" in method.learned.parameters:
            fit["objective"] = "agreement"  # one wants pairs, which two of the three tasks do not have
        made |= {"data": str(root / "suite" / "suite.yaml"), "fit": fit}
    return made


class FailedError(Exception):
    """A command that fails without any fault."""


class Worker:
    """All runs of one interpreter: they share its hash seed."""

    def __init__(self, root: Path, place: Path) -> None:
        self.root, self.place, self.chance = root, place, random.Random(0)
        self.place.mkdir()
        self.told = place / "told"

    def runs(self, name: str, device: str, first: bool) -> Iterator[tuple[str, str]]:
        """(way, digest) of a method; the first interpreter tries every way, the others two."""
        from plait.methods import get_method

        learns = get_method(name).learned is not None
        where = ["--device", device]
        if learns:
            state = self.place / f"state-{name}-{device}"
            one = ["--threads", "1", *where]
            self.call(["fit", self.recipe(name, False), str(state), *one])
            yield "fit: hash seed", tree(state)
            if first:
                yield "fit: order, memory", self.fit(name, True, [*one, "--memory", "2GB"])
                yield "fit: killed", self.fit(name, False, one, killed=True)
                yield "fit: 2 threads", self.fit(name, False, ["--threads", "2", *where], numbers=True)
                yield "fit: 1 thread", self.fit(name, False, one, numbers=True)
            where += ["--state", str(state)]
        least = ["--memory", self.least(name)]
        ways = {
            "1 thread": (False, ["--threads", "1"]), "2 threads": (False, ["--threads", "2"]),
            "4 threads, least memory": (True, ["--threads", "4", *least]),
            "killed": (False, ["--threads", "2"]), "killed, least memory": (True, ["--threads", "1", *least]),
        }  # fmt: skip
        other = {
            "hash seed": (False, ["--threads", "2"]), "hash seed, other order": (True, ["--threads", "4", *least])
        }  # fmt: skip
        for way, (backwards, words) in (ways if first else other).items():
            yield way, self.merge(name, backwards, [*words, *where], killed="killed" in way)

    def recipe(self, name: str, backwards: bool) -> str:
        path = self.place / f"{name}{'-backwards' * backwards}.json"
        path.write_text(json.dumps(recipe(self.root, name, backwards)))
        return str(path)

    def merge(self, name: str, backwards: bool, words: list[str], *, killed: bool) -> str:
        return self.digest(["merge", self.recipe(name, backwards), "OUT", *words], [], killed)

    def fit(self, name: str, backwards: bool, words: list[str], *, killed: bool = False, numbers: bool = False) -> str:
        return self.digest(["fit", self.recipe(name, backwards), "OUT", *words], ["--resume"], killed, numbers)

    def digest(self, words: list[str], resume: list[str], killed: bool, numbers: bool = False) -> str:
        out = self.place / "out"
        words = [str(out) if word == "OUT" else word for word in words]
        if killed:
            number = process.start(words, self.told, often)
            while not list(self.place.glob(".out.*")) and not self.ended(number):
                time.sleep(0.001)
            time.sleep(self.chance.uniform(0.0, 0.3))
            os.kill(number, signal.SIGKILL)
            process.wait(number, self.told, 0.0)
            words += resume
        if not out.exists():
            self.call(words)
        found = tree(out) if not numbers else hashlib.sha256((out / "state.safetensors").read_bytes()).hexdigest()
        for path in (out, *self.place.glob(".out.*")):
            shutil.rmtree(path)
        return found

    @staticmethod
    def ended(number: int) -> bool:
        return os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def least(self, name: str) -> str:
        """The least budget that a merge runs with, as it says itself."""
        ended = process.call(
            ["merge", self.recipe(name, False), str(self.place / "never"), "--memory", "1KB"], self.told
        )
        found = re.search(r"at least --memory (\S+)", ended.told)
        if found is None:
            raise FailedError(f"{name}: does not say what memory it needs: {ended.told}")
        return found[1]

    def call(self, words: list[str]) -> None:
        ended = process.call(words, self.told, often)
        if ended.code != 0:
            raise FailedError(f"{' '.join(words)}: ended with {ended.code}: {ended.told}")


def work(root: Path, names: list[str], devices: list[str], seed: str) -> None:
    """Print a line of JSON for every run."""
    process.warm_up(names != list(QUICK))
    worker = Worker(root, root / f"work-{seed}")
    for name in names:
        for device in devices:
            try:
                for way, digest in worker.runs(name, device, seed == HASH_SEEDS[0]):
                    print(json.dumps([name, device, way, digest]), flush=True)
            except FailedError as error:
                print(json.dumps([name, device, f"failed: {error}", ""]), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one method")
    parser.add_argument("--method", action="append", help="only this one")
    parser.add_argument("--work", nargs=2, metavar=("ROOT", "SEED"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    from plait.methods import all_methods

    names: list[str] = given.method or (list(QUICK) if given.quick else sorted(all_methods()))
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if given.work:
        work(Path(given.work[0]), names, devices, given.work[1])
        return 0
    found: dict[tuple[str, str], dict[str, set[str]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        make_models(Path(scratch), names)
        runs = []
        for seed in HASH_SEEDS:  # side by side: nothing that one does may depend on the other
            words = [sys.executable, __file__, "--work", scratch, seed, *(["--quick"] if given.quick else [])]
            words += [word for name in given.method or [] for word in ("--method", name)]
            environment = {**os.environ, "PYTHONHASHSEED": seed}
            runs.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True))
        for run in runs:
            lines, _ = run.communicate()
            for line in lines.splitlines():
                name, device, way, digest = json.loads(line)
                found.setdefault((name, device), {}).setdefault(way, set()).add(digest)
            if run.returncode:
                return 1
    return show(found)


def show(found: dict[tuple[str, str], dict[str, set[str]]]) -> int:
    """The table; 1 where any method has more than one digest."""
    print("method | device | ways | merges differ | ways of the fit | fits differ | fit on 2 threads | digest")
    bad = runs = 0
    for (name, device), ways in sorted(found.items()):
        merges = {way: digests for way, digests in ways.items() if not way.startswith("fit")}
        threads = [ways.get("fit: 1 thread"), ways.get("fit: 2 threads")]
        fits = {way: digests for way, digests in ways.items() if way.startswith("fit") and "thread" not in way}
        digest, differ = odd(merges)
        _, fits_differ = odd(fits) if fits else ("", "")
        bad += bool(differ or fits_differ)
        runs += len(merges) + len(fits)
        same = "" if threads[0] is None else "same" if threads[0] == threads[1] else "other bits"
        cells = [name, device, len(merges), differ or "none", len(fits) or "", fits_differ or ("none" if fits else "")]
        print(" | ".join(map(str, [*cells, same, digest[:12]])))
    print(f"{len(found)} methods and devices, {runs} ways, {bad} with more than one digest")
    return 1 if bad else 0


def odd(ways: dict[str, set[str]]) -> tuple[str, str]:
    """The first way's digest, and the ways that have another, or none because they failed."""
    first = min(next(iter(ways.values()), {""}))
    return first, ", ".join(way for way, digests in ways.items() if digests != {first} or not first)


if __name__ == "__main__":
    raise SystemExit(main())
