"""`make fuzz`: every target for its share of FUZZ_SECONDS, guided by coverage where atheris is installed.

    python tests/fuzz/run.py [--seconds 600] [--target header] [--guided] [--seed 0] [--cases N]

Without atheris new cases grow from those that were refused at a new place in the code. A case that breaks is written
to tests/fuzz/crashes/TARGET-HASH, which `make test` runs from then on; exit code 1 when there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CRASHES = HERE / "crashes"
ROOM = 1 << 30
"""Bytes that a case may take beside what the process has."""
KEPT = 400
"""Cases of a target that others grow from."""


def main() -> None:
    """Divide the time among the targets; print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("FUZZ_SECONDS", "600")))
    parser.add_argument("--cases", type=int, help="stop a target after so many cases")
    parser.add_argument("--target", action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", action="store_true", help="by coverage: needs atheris")
    given = parser.parse_args()
    sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
    if given.guided and len(given.target or []) == 1:
        _guided(given.target[0], given.seconds, given.seed)  # does not come back
    from fuzz import targets

    chosen = given.target or list(targets.TARGETS)
    limit_memory()
    total, broken = 0, 0
    for name in chosen:
        share = given.seconds / len(chosen)
        if given.guided:
            cases, found = _child(name, share, given.seed)
            total, broken = total + cases, broken + found
            continue
        cases, found, kept = loop(name, share, given.seed, given.cases)
        total, broken = total + cases, broken + found
        print(f"{name:16} {cases:9} cases  {kept:4} grown from  {found:3} broke", flush=True)
    targets.clear()
    print(f"{'all':16} {total:9} cases  {broken} broke", flush=True)
    sys.exit(1 if broken else 0)


def loop(name: str, seconds: float, seed: int, most: int | None = None) -> tuple[int, int, int]:
    """Mutate and run until the time is over: cases, distinct crashes, cases kept to grow from."""
    from fuzz import targets
    from fuzz.mutate import mutate

    dice = random.Random(f"{seed} {name}")
    pool = targets.seeds(name)
    places: set[object] = set()
    crashes: set[str] = set()
    cases, end = 0, time.monotonic() + seconds
    while time.monotonic() < end and (most is None or cases < most):
        data = mutate(dice.choice(pool), dice, pool)
        began = time.monotonic()
        broke = targets.run(name, data)
        took = time.monotonic() - began
        cases += 1
        if took > targets.SLOW:
            broke = broke or f"took {took:.1f} s"
        if broke is not None:
            kind = _kind(broke)
            if kind not in crashes:
                crashes.add(kind)
                keep(name, data, broke)
        place = targets.last_place()
        if place not in places:
            places.add(place)
            if len(pool) < KEPT:
                pool.append(data)
    return cases, len(crashes), len(pool)


def _kind(broke: str) -> str:
    from fuzz import targets

    return f"{broke.split(':')[0]} {targets.last_place()}"


def keep(name: str, data: bytes, broke: str) -> None:
    """Write a case that broke, once for every content."""
    CRASHES.mkdir(exist_ok=True)
    path = CRASHES / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    print(f"BROKE {name}: {broke}\n      {path}", flush=True)


def limit_memory() -> None:
    """A case that asks for more than `ROOM` gets a MemoryError, which counts as broken."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _child(name: str, seconds: float, seed: int) -> tuple[int, int]:
    """One guided target: libFuzzer ends its process, so it has one of its own."""
    words = [sys.executable, str(HERE / "run.py"), "--guided", "--target", name, "--seconds", str(seconds)]
    done = subprocess.run([*words, "--seed", str(seed)], capture_output=True, text=True, check=False)
    found = re.findall(r"^BROKE .*\n.*", done.stdout, re.M)
    runs, covered = re.findall(r"Done (\d+) runs", done.stderr), re.findall(r"cov: (\d+)", done.stderr)
    if done.returncode or not runs:
        print(done.stderr[-2000:])
    cases, edges = int(runs[-1]) if runs else 0, covered[-1] if covered else 0
    line = f"{name:16} {cases:9} cases  {edges:>4} edges  {len(found):3} broke"
    print("\n".join([*found, line]), flush=True)
    return cases, len(found) + int(done.returncode != 0)


def _guided(name: str, seconds: float, seed: int) -> None:
    """Atheris (libFuzzer) over plait's modules, with our mutator beside its own."""
    if importlib.util.find_spec("atheris") is None:
        sys.exit("--guided needs atheris: pip install atheris")
    atheris: Any = importlib.import_module("atheris")

    with atheris.instrument_imports(  # pyright: ignore[reportAttributeAccessIssue]
        include=["plait"]
    ):
        from fuzz import targets
    from fuzz.mutate import mutate

    corpus = Path(tempfile.mkdtemp(prefix=f"corpus-{name}-"))
    pool = targets.seeds(name)
    for place, data in enumerate(pool):
        (corpus / str(place)).write_bytes(data)
    known: set[str] = set()

    def one(data: bytes) -> None:
        began = time.monotonic()
        broke = targets.run(name, data)
        if time.monotonic() - began > targets.SLOW:
            broke = broke or f"took {time.monotonic() - began:.1f} s"
        if broke is not None and _kind(broke) not in known:
            known.add(_kind(broke))
            keep(name, data, broke)

    def ours(data: bytes, most: int, seed: int) -> bytes:
        return mutate(data, random.Random(seed), pool)[:most] if seed % 2 else atheris.Mutate(data, most)

    options = [
        f"-max_total_time={int(seconds)}",
        f"-seed={seed + 1}",
        "-rss_limit_mb=3000",
        "-max_len=20000",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=ours)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
