"""`make hostile`: every case of the corpus is given to the command line, its time and memory measured.

    python tests/hostile/attack.py [--only PART]

Prints how many were refused, the slowest, the most memory. Exit code 1 when a case was not refused as it must be.
Every case has a process of its own, forked from one that has imported everything and done nothing else, and its peak of
memory is compared with that of the same verb on good files. Another process makes the cases (`--build`). Seconds are of
the processor, so that a busy machine tells the same; a case that hangs is killed after `HANG` seconds.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SECONDS, HANG = 5.0, 120
MEGABYTES = 500
"""Beside the peak of the same verb on good files."""
GOOD = {
    "merge": "merge --quiet --method task_arithmetic --base {base} --expert {expert} {out}",
    "check": "check {world}/good.yaml", "plan": "plan {world}/good.yaml",
    "inspect": "inspect --quiet --base {base} {expert}",
    "eval": "eval {suite_base} --suite {suite} --task tone --no-cache --quiet",
    "suite": "suite show {suite}", "report": "report {world}/good.json --out {out}",
}  # fmt: skip
"""What a verb does on files that are fine."""


def words(text: str, place: Path, world: Path) -> list[str]:
    """The command line of a case in its folder."""
    suite = world / "suite"
    names = {"here": place / "here", "out": place / "out", "base": world / "base", "expert": world / "expert0",
             "suite": suite / "suite.yaml", "suite_base": suite / "base", "world": world}  # fmt: skip
    return [part.format(**names) for part in text.split()]


def listing(place: Path) -> set[str]:
    """All paths below a folder but what caches write."""
    found = {str(path.relative_to(place)) for path in place.rglob("*")}
    return {path for path in found if not path.startswith("cache")}


def problems(case: Mapping[str, Any], code: int, said: str, place: Path, before: set[str]) -> list[str]:
    """What is wrong with how a case ended; empty when it is as it must be."""
    found = []
    refused = case["outcome"] == "refused"
    if code not in ((2, 3) if refused else (0,)):
        found.append(f"exit {code}")
    if "Traceback" in said or "panicked" in said:
        found.append("a traceback")
    if refused and case["fault"] not in said.replace("\n", " "):
        found.append(f"does not name {case['fault']!r}")
    if any((ord(mark) < 32 and mark != "\n") or mark in "\u202e\x7f" for mark in said):
        found.append("control characters on the terminal")
    new = listing(place) - before
    new -= set() if refused else {path for path in new if path == "out" or path.startswith("out/")}
    if new:
        found.append(f"wrote {sorted(new)[0]}")
    for path in place.rglob("*"):
        if path.name == "code-was-executed" or "escaped" in path.name:
            found.append(f"made {path}")
    for path in [place / "out"] if (place / "out").is_file() else (place / "out").rglob("*"):
        if path.is_file() and any(
            mark in path.read_bytes() for mark in (b"code-was-executed", b"auto_map", b"<script>alert")
        ):
            found.append(f"{path.name} passes the attack on")
    return found


def ready() -> None:
    """Import what the verbs import, once."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    sys.path[:0] = [str(HERE.parents[1])]
    for name in ("torch", "datasets", "transformers", "PIL.Image", "plotly.graph_objects", "plait.run", "plait.report",
                 "plait.show_state", "plait.evaluate.show", "plait.evaluate.robust", "plait.cli"):  # fmt: skip
        importlib.import_module(name)
    for name in (
        "AutoModel",
        "BertModel",
        "ViTModel",
        "AutoTokenizer",
        "AutoImageProcessor",
        "PreTrainedTokenizerFast",
    ):
        getattr(sys.modules["transformers"], name)


def run(command: list[str], place: Path) -> tuple[int, str, float, float]:
    """Exit code, output, processor seconds and peak memory in MB of one command."""
    place.mkdir(exist_ok=True)
    log = place.parent / f"{place.name}.log"
    child = os.fork()
    if child == 0:
        _be_plait(command, place, log)
    _, status, usage = os.wait4(child, 0)
    said = log.read_text(encoding="utf-8", errors="replace")
    return os.waitstatus_to_exitcode(status), said, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def _be_plait(command: list[str], place: Path, log: Path) -> None:
    """In the child: the command line's own `main`, with what it says in a file."""
    from plait import cli

    signal.alarm(HANG)
    os.environ["PLAIT_CACHE"] = str(place / "cache")
    os.chdir(place)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(target, 1)
    os.dup2(target, 2)
    sys.argv = ["plait", *command]
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def build(root: Path) -> None:
    """Make the world and all cases, in this process; their facts go into cases.json."""
    sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
    from hostile.asked import EVALUATION
    from hostile.corpus import CASES, World

    (root / "world").mkdir(parents=True)
    world = World(root / "world")
    good = {"merge_method": "task_arithmetic", "base_model": str(world.base), "models": [{"model": str(world.expert)}]}
    (world.root / "good.yaml").write_text(json.dumps(good))
    (world.root / "good.json").write_text(json.dumps({**EVALUATION, "routing": None}))
    facts = []
    for name, case in CASES.items():
        here = root / "cases" / name / "here"
        here.mkdir(parents=True)
        fault = case.build(here, world)
        facts.append({"name": name, "kind": case.kind, "words": case.words, "fault": fault, "outcome": case.outcome})
    (root / "cases.json").write_text(json.dumps(facts))


def main() -> None:
    """Build, attack, and print the table."""
    if sys.argv[1:2] == ["--build"]:
        build(Path(sys.argv[2]))
        return
    only = sys.argv[2] if sys.argv[1:2] == ["--only"] else ""
    root = Path(tempfile.mkdtemp(prefix="plait-hostile-"))
    try:
        subprocess.run([sys.executable, __file__, "--build", str(root)], check=True)
        failed = attack(root, [case for case in json.loads((root / "cases.json").read_text()) if only in case["name"]])
    finally:
        shutil.rmtree(root, ignore_errors=True)
    sys.exit(1 if failed else 0)


def attack(root: Path, cases: list[dict[str, Any]]) -> int:
    """Run all cases; returns how many went wrong."""
    ready()
    usual = {}
    for verb, text in GOOD.items():
        place = root / f"good-{verb}"
        code, said, took, peak = run(words(text, place, root / "world"), place)
        assert code == 0, f"{verb} fails on good files: {said}"
        usual[verb] = took, peak
    rows, failed = [], 0
    for case in cases:
        place = root / "cases" / case["name"]
        before = listing(place)
        command = words(case["words"], place, root / "world")
        code, said, took, peak = run(command, place)
        grown = peak - usual[command[0]][1]
        wrong = problems(case, code, said, place, before)
        wrong += [f"{took:.1f} s"] if took > SECONDS else []
        wrong += [f"{grown:.0f} MB"] if grown > MEGABYTES else []
        failed += bool(wrong)
        if wrong:
            told = f"{' '.join(command)}\n  {said.strip()[-300:]}"
            print(f"FAILED {case['name']}: {'; '.join(wrong)}\n  {told}", flush=True)
        rows.append((case["kind"], case["outcome"], case["name"], took, grown))
    table(rows, usual, failed)
    return failed


def table(rows: list[tuple[str, str, str, float, float]], usual: Mapping[str, Any], failed: int) -> None:
    """A line for every kind of file."""
    print(f"\n{'kind':12} {'files':>5} {'refused':>8} {'harmless':>9} {'slowest':>9} {'most memory':>12}")
    for kind in sorted({row[0] for row in rows}):
        some = [row for row in rows if row[0] == kind]
        counts = [sum(row[1] == outcome for row in some) for outcome in ("refused", "harmless")]
        slow, large = max(row[3] for row in some), max(row[4] for row in some)
        print(f"{kind:12} {len(some):5} {counts[0]:8} {counts[1]:9} {slow:7.2f} s {large:+9.0f} MB")
    slow, large = max(rows, key=lambda row: row[3]), max(rows, key=lambda row: row[4])
    print(f"\n{len(rows)} files, {len(rows) - failed} as they must be, {failed} not")
    print(f"slowest: {slow[2]}, {slow[3]:.2f} s; most memory beside good files: {large[2]}, {large[4]:+.0f} MB")
    print("good files: " + ", ".join(f"{verb} {took:.2f} s {peak:.0f} MB" for verb, (took, peak) in usual.items()))


if __name__ == "__main__":
    main()
