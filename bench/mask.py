"""What a Concrete mask has learned: a state of concrete_task_arithmetic, taken apart on a suite's test splits.

    python bench/mask.py vision methods-vision/concrete_task_arithmetic/state

1. Each expert alone under the mask, at weight 1, beside the expert: does the mask harm what it lets through?
2. The mask with its entries shuffled inside every tensor: is it more than a rescaling? (Its mean is divided out.)
3. Random draws of the mask, as the authors evaluate, and the binary one, beside the mean.
Prints a table and writes bench/results/mask-SUITE.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from processes import ROOT

import plait
from plait.evaluate.contenders import by_method
from plait.evaluate.measure import Bench
from plait.evaluate.subjects import Options, Subject
from plait.state import State, load_state, write_state
from plait.suites.definition import Suite
from plait.suites.places import load_suite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite")
    parser.add_argument("state", type=Path)
    parser.add_argument("--draws", type=int, default=3)
    given = parser.parse_args()
    suite, state = load_suite(given.suite), load_state(given.state)
    bench = Bench(suite, Options())
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        found = {
            "alone": alone(suite, state, bench, work),
            "mean": score(suite, state, bench, work, {}),
            "shuffled": score(suite, shuffled(state, work), bench, work, {}),
            "binary": score(suite, state, bench, work, {"eval_mask": "binary"}),
            "draws": [
                score(suite, state, bench, work, {"eval_mask": "sample"}, seed) for seed in range(given.draws)
            ],
        }  # fmt: skip
    for task, (masked, expert) in found["alone"].items():
        print(f"{task:12} expert {100 * expert:.1f}, masked {100 * masked:.1f}: {100 * masked / expert:.1f} %")
    for key in ("mean", "shuffled", "binary", "draws"):
        print(f"{key:12} normalised {found[key]}")
    target = ROOT / "bench" / "results" / f"mask-{suite.name}.json"
    target.write_text(json.dumps({"state": state.facts["fit"], **found}, indent=1) + "\n")
    print(target)


def score(
    suite: Suite, state: State, bench: Bench, work: Path, parameters: dict[str, Any], seed: int | None = None
) -> float:
    """Normalised score, %, of the merge with a state."""
    recipe = by_method("concrete_task_arithmetic", suite, parameters).model_dump(exclude_defaults=True)
    recipe["seed"] = state.facts["seed"] if seed is None else seed
    plait.merge(recipe, work / "merged", state=state.folder, overwrite=True)
    found = bench.evaluate(Subject.model(suite, str(work / "merged")))
    assert found.normalised is not None
    return round(100 * found.normalised.value, 2)


def alone(suite: Suite, state: State, bench: Bench, work: Path) -> dict[str, tuple[float, float]]:
    """Task → accuracy of its expert under the mask, and of the expert."""
    result = {}
    for place, task in enumerate(state.facts["tasks"]):
        weights = torch.zeros(len(state.facts["tasks"]))
        weights[place] = 1
        fit = {"granularity": "task", "concrete": state.facts["fit"]["concrete"], "init": 0.0}
        facts = {**state.facts, "method": "concrete_adamerging", "fit": fit}
        learned = {**numbers(state), "coefficients/all": weights}
        one = write_state(work / f"alone-{task}", facts, learned, False, scratch=work / "writing")
        plait.merge(by_method("concrete_adamerging", suite), work / "alone", state=one.folder, overwrite=True)
        masked = bench.evaluate(Subject.model(suite, str(work / "alone")), tasks=[task]).tasks[task]
        result[task] = (masked.score.value, bench.expert(task).score.value)
    return result


def shuffled(state: State, work: Path) -> State:
    """The same masks with their entries in another order, inside every tensor."""
    random = torch.Generator().manual_seed(0)
    mixed = numbers(state)
    for name, value in mixed.items():
        if name.startswith("mask/"):
            flat = value.reshape(-1)
            mixed[name] = flat[torch.randperm(len(flat), generator=random)].view(value.shape)
    return write_state(work / "shuffled", state.facts, mixed, False, scratch=work / "writing")


def numbers(state: State) -> dict[str, torch.Tensor]:
    found = {}
    for name in state.names():
        value = state.tensor(name)
        assert value is not None
        found[name] = value
    return found


if __name__ == "__main__":
    main()
