"""Kill real merges at random moments, run them again, and compare every byte (`make faults`).

Half of the moments are spread over each command's measured length, half over the part in which it writes. After a kill
there is nothing under the final name, or the whole model, or the older output untouched; the same command then gives
the bytes of an uninterrupted run and leaves no temporary file. Prints a table; exit code 1 when anything is otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

from faults import process
from faults.process import often, tree
from faults.scenarios import QUICK, Scenario, scenarios

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@dataclass
class Row:
    """What happened to one command."""

    scenario: Scenario
    seconds: float = 0.0
    writing: float = 0.0
    """Seconds of it from the first file of the output to its final name."""
    digest: str = ""
    kills: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    same: int = 0
    """Kills after which the command went on to the same bytes."""
    faults: list[str] = field(default_factory=list)


class Harness:
    """One scratch folder, one seed."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.chance = root, random.Random(seed)
        self.place, self.told = root / "work", root / "told"

    def measure(self, scenario: Scenario) -> Row:
        """The command uninterrupted: its bytes and its length."""
        row = Row(scenario)
        out = self.fresh(scenario)
        begun = time.monotonic()
        number = process.start(self.words(scenario, out), self.told, often)
        self.until_written(number)
        seen = time.monotonic()
        ended = process.wait(number, self.told, begun)
        if ended.code != 0:
            raise SystemExit(f"{scenario.name}: fails without any fault: {ended.told}")
        row.seconds, row.writing, row.digest = ended.seconds, time.monotonic() - seen, tree(out)
        return row

    def attack(self, row: Row) -> None:
        """One to three kills in a row, then the same command to its end."""
        out = self.fresh(row.scenario)
        old = tree(out) if row.scenario.overwrite else None
        before = sum(row.kills.values())
        resume: list[str] = []
        for _ in range(self.chance.choice((1, 1, 1, 2, 3))):
            if not self.kill(row, out, old, resume):
                break
            resume = row.scenario.resume if self.chance.random() < 0.7 else []
            if row.scenario.overwrite and tree(out) == row.digest:
                old = row.digest
            if out.exists() and not row.scenario.overwrite:
                break
        done = out.exists() and not row.scenario.overwrite
        ended = process.call(self.words(row.scenario, out) + resume, self.told, often)
        whole = out.exists() and tree(out) == row.digest
        if done and ended.code == 2 and "exists already" in ended.told:  # it was whole before
            process.call(["clean", str(self.place), "--remove"], self.told)
        elif ended.code != 0:
            row.faults.append(f"the command run again ended with {ended.code}: {ended.told[-400:]}")
        if not whole:
            row.faults.append("other bytes than without a kill")
        left = [path.name for path in self.place.iterdir() if path != out]
        if left:
            row.faults.append(f"left behind: {left}")
        row.same += (sum(row.kills.values()) - before) * (whole and not left)

    def kill(self, row: Row, out: Path, old: str | None, resume: list[str]) -> bool:
        """Start the command, kill it, look at what is there. False where it was faster than the signal."""
        sent = self.chance.choice(SIGNALS)
        begun = time.monotonic()
        number = process.start(self.words(row.scenario, out) + resume, self.told, often)
        if self.chance.random() < 0.5:
            time.sleep(self.chance.uniform(0.0, 1.05) * row.seconds)
        else:
            self.until_written(number)
            time.sleep(self.chance.uniform(0.0, 1.05) * row.writing)
        phase = self.phase(out)
        os.kill(number, sent)
        ended = process.wait(number, self.told, begun)
        if ended.code == 0:
            return False
        row.kills[signal.Signals(sent).name] += 1
        row.phases[phase] += 1
        expected = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15), signal.SIGINT: (130,)}[sent]
        if ended.code not in expected:
            row.faults.append(f"{sent.name}: exit code {ended.code}: {ended.told[-400:]}")
        if "Traceback" in ended.told:
            row.faults.append(f"{sent.name}: a traceback: {ended.told[-400:]}")
        if ended.code in (130, 143) and "run the same command again" not in ended.told:
            row.faults.append(f"{sent.name}: no sentence: {ended.told[-400:]}")
        if out.exists() and tree(out) not in (old, row.digest):
            row.faults.append("under the final name is something that is neither the old output nor the whole new one")
        return True

    def until_written(self, number: int) -> None:
        """Wait until the output's hidden folder is there, or for a fit its work, or the process has ended."""
        kinds = (".out.partial-", ".out.fitting-")
        while not any(path.name.startswith(kinds) for path in self.place.iterdir()):
            if os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(0.001)

    def phase(self, out: Path) -> str:
        """How far the command had come, by what is on disk."""
        names = [path.name for path in self.place.iterdir() if path != out]
        for journal in self.place.glob(".out.partial-*/.journal"):
            with suppress(FileNotFoundError):
                return "writing" if len(journal.read_text().splitlines()) > 1 else "laid out"
        if any(".partial-" in name for name in names):
            return "opening or renaming"
        if any(".fitting-" in name for name in names):
            return "learning"
        return "fitted" if any(".state-" in name for name in names) else "before or after"

    def fresh(self, scenario: Scenario) -> Path:
        """An empty folder to work in; with the older output where there is to be one."""
        shutil.rmtree(self.place, ignore_errors=True)
        out = self.place / "out"
        self.place.mkdir()
        if scenario.overwrite:
            out.mkdir()
            (out / "model.safetensors").write_bytes(b"an older output")
            (out / "mine.txt").write_text("precious")
        return out

    @staticmethod
    def words(scenario: Scenario, out: Path) -> list[str]:
        return [str(out) if word == "OUT" else word for word in scenario.words]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one command of each kind")
    given = parser.parse_args()
    process.warm_up()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        harness = Harness(root, given.seed)
        rows = [harness.measure(item) for item in scenarios(root, QUICK if given.quick else None)]
        with suppress(KeyboardInterrupt):  # Ctrl-C ends it early, with the table so far
            for row in itertools.cycle(rows):
                harness.attack(row)
                done = sum(sum(each.kills.values()) for each in rows)
                print(f"{done} kills", file=sys.stderr)
                if done >= given.kills:
                    break
    show(rows)
    return 1 if any(row.faults for row in rows) else 0


def show(rows: list[Row]) -> None:
    """The table, and every fault in full."""
    names = [item.name for item in SIGNALS]
    phases = ["before or after", "learning", "fitted", "laid out", "writing", "opening or renaming"]
    head = ["kind", "command", "s", *names, *phases, "same bytes", "faults"]
    print(" | ".join(head))
    for row in rows:
        cells = [row.scenario.kind, row.scenario.name, f"{row.seconds:.1f}", *(row.kills[name] for name in names)]
        cells += [*(row.phases[name] for name in phases), f"{row.same}/{sum(row.kills.values())}", len(row.faults)]
        print(" | ".join(map(str, cells)))
    kills = sum(sum(row.kills.values()) for row in rows)
    print(f"{kills} kills, {sum(row.same for row in rows)} resumed to the same bytes")
    for row in rows:
        for fault in row.faults:
            print(f"{row.scenario.name}: {fault}")


if __name__ == "__main__":
    raise SystemExit(main())
