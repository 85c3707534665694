"""Run the same recipes through mergekit and through Plait, and compare numbers, time and memory.

    python bench/against_mergekit.py                      every case, Plait against mergekit
    python bench/against_mergekit.py --only ties slerp    cases whose name contains one of the words
    python bench/against_mergekit.py --against reference  tests/reference.py against mergekit (Plait is not run)

Time and memory: `bench/speed.py`.

mergekit runs in its own environment: name its interpreter with ``--mergekit-python``, or the script makes a venv in
``--cache`` and installs mergekit there. Both tools run as they are documented (``mergekit-yaml``,
``python -m plait merge``), on the CPU, one process for each merge.

The exit status is 1 when a deterministic case differs by more than 1e-5 (largest over the tensors of
max|a-b| / max|b|; one unit in the last place for bfloat16 files), or differs in tensor names, shapes or dtypes, and is
not among the intended differences. A merge that fails counts too, unless mergekit is known to fail there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from mergekit_cases import Case, build, cases, with_paths
from processes import difference, layout, mergekit_python, run_mergekit, run_plait, short

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import pico  # pyright: ignore[reportMissingImports]

LIMIT = 1e-5
LIMIT_BF16 = 2.0**-7  # one unit in the last place: sums of bf16 numbers often lie halfway between two of them


def config_differences(ours: Path, theirs: Path) -> list[str]:
    """Keys of config.json that differ; who wrote the file does not count."""
    a, b = (json.loads((folder / "config.json").read_text()) for folder in (ours, theirs))
    skipped = {"transformers_version", "_name_or_path"}
    return sorted(k for k in (a.keys() | b.keys()) - skipped if a.get(k) != b.get(k))


def by_reference(case: Case, models: dict[str, Path]) -> dict[str, torch.Tensor]:
    """The case's result by tests/reference.py, tensor by tensor."""
    assert case.reference is not None
    base = pico.read(models["base"])
    others = [pico.read(path) for name, path in models.items() if name != "base"]
    out = {}
    for name, tensor in base.items():
        if tensor.is_floating_point():
            arrays = [other[name].double().numpy() for other in others]
            out[name] = torch.from_numpy(np.asarray(case.reference(tensor.double().numpy(), arrays)))
    return out


def compare(arguments: argparse.Namespace) -> int:
    """Run the cases, print the table, return the exit status."""
    work = Path(arguments.work or tempfile.mkdtemp(prefix="against-mergekit-"))
    work.mkdir(parents=True, exist_ok=True)
    python = mergekit_python(arguments)
    chosen = [c for c in cases() if not arguments.only or any(word in c.name for word in arguments.only)]
    if arguments.against == "reference":
        chosen = [c for c in chosen if c.reference is not None]
    models = {arch: build(arch, work) for arch in sorted({c.arch for c in chosen})}
    who = "plait" if arguments.against == "plait" else "reference"
    print(f"| case | max rel. difference | worst tensor | names, shapes, dtypes | config | mergekit s | {who} s | |")
    print("|---|---|---|---|---|---|---|---|")
    failed = []
    for case in chosen:
        folder = work / "out" / case.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(with_paths(case.recipe, models[case.arch]), sort_keys=False))
        theirs = run_mergekit(python, recipe, folder / "mergekit")
        if not theirs.ok:
            print(f"| {case.name} | - | - | - | - | - | - | mergekit failed: {short(theirs.output)} |", flush=True)
            if not case.mergekit_fails:
                failed.append(case.name)
            continue
        start = time.perf_counter()
        if arguments.against == "reference":
            mine = by_reference(case, models[case.arch])
            seconds, shape, config = time.perf_counter() - start, "-", "-"
            read = pico.read(folder / "mergekit")
            if mine.keys() != read.keys():
                shape = "other names: " + " ".join(sorted(mine.keys() ^ read.keys())[:3])
        else:
            ours = run_plait(recipe, folder / "plait", [*case.options, *arguments.plait_option])
            seconds = ours.seconds
            if not ours.ok:
                print(
                    f"| {case.name} | - | - | - | - | {theirs.seconds:.1f} | - | plait failed: {short(ours.output)} |"
                )
                failed.append(case.name)
                continue
            mine, read = pico.read(folder / "plait"), pico.read(folder / "mergekit")
            here, there = layout(folder / "plait"), layout(folder / "mergekit")
            unequal = sorted(k for k in here.keys() | there.keys() if here.get(k) != there.get(k))
            shape = "equal" if not unequal else "not equal: " + " ".join(unequal[:3])
            keys = config_differences(folder / "plait", folder / "mergekit")
            config = "equal" if not keys else "not equal: " + " ".join(keys)
        worst, where = difference(mine, read)
        limit = LIMIT_BF16 if any(t.dtype == torch.bfloat16 for t in read.values()) else LIMIT
        wrong = worst > limit or (shape not in ("equal", "-") and arguments.against == "plait")
        note = ""
        if wrong and case.intended:
            note = "intended: " + case.intended
        elif wrong:
            note = "DIFFERENT"
            failed.append(case.name)
        numbers = f"{worst:.1e} | {where} | {shape} | {config} | {theirs.seconds:.1f} | {seconds:.1f}"
        print(f"| {case.name} | {numbers} | {note} |", flush=True)
    print()
    print(f"{len(chosen)} cases, {len(failed)} failed" + (": " + ", ".join(failed) if failed else ""))
    if arguments.work is None:
        shutil.rmtree(work)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit-python", help="interpreter of an environment that has mergekit")
    parser.add_argument("--cache", help="where to make that environment when none is named (default: ~/.cache/plait)")
    parser.add_argument(
        "--pip-option", action="append", default=[], help="one more argument for pip install; repeatable"
    )
    parser.add_argument(
        "--plait-option", action="append", default=[], help="one more argument for plait merge; repeatable"
    )
    parser.add_argument("--work", help="folder for checkpoints and outputs, kept (default: a temporary folder)")
    parser.add_argument("--only", nargs="+", help="run the cases whose name contains one of these words")
    parser.add_argument("--against", choices=("plait", "reference"), default="plait")
    parser.add_argument("--list", action="store_true", help="print the cases' names and stop")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(c.name for c in cases()))
        return 0
    return compare(arguments)


if __name__ == "__main__":
    sys.exit(main())
