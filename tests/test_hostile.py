"""The hostile corpus against every verb, in this process; `make hostile` gives each a process, and measures."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import datasets
import pytest
import torch
from fuzz import targets
from hostile import attack
from hostile.asked import EVALUATION
from hostile.corpus import CASES, World

import plait
from plait import cli
from plait.evaluate.results import Evaluation
from plait.evaluate.tables import evaluation_table
from plait.show import console

CRASHES = sorted((Path(__file__).parent / "fuzz" / "crashes").iterdir())


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of a stranger's name is not looked for."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    datasets.utils.disable_progress_bars()
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", CASES)
def test_hostile(
    name: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    case, here = CASES[name], tmp_path / "here"
    here.mkdir()
    fault = case.build(here, world)
    monkeypatch.setattr(sys, "argv", ["plait", *attack.words(case.words, tmp_path, world.root)])
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    before = attack.listing(tmp_path)
    capfd.readouterr()
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        torch.set_num_threads(1)
    facts = {"outcome": case.outcome, "fault": fault}
    out, err = capfd.readouterr()
    assert attack.problems(facts, code, out + err, tmp_path, before) == [], out + err


@pytest.mark.parametrize("path", CRASHES, ids=lambda path: path.name)
def test_what_fuzzing_broke_stays_repaired(path: Path) -> None:
    assert targets.run(path.name.rpartition("-")[0], path.read_bytes()) is None


@pytest.mark.parametrize("target", targets.TARGETS)
def test_seeds_of_the_fuzzer_are_fine(target: str) -> None:
    """A seed that is refused at once would let nothing through to where bugs are."""
    for data in targets.seeds(target):
        assert targets.run(target, data) is None
        assert targets.last_place() is None, f"refused: {data[:200]!r}"


def test_names_of_markup_are_text_in_tables(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "[/red][link=http://x]a[/link]"
    facts = {**EVALUATION, "tasks": {evil: EVALUATION["tasks"]["a"]}, "suite": {**EVALUATION["suite"], "name": evil}}
    facts |= {"model": {**EVALUATION["model"], "label": evil}, "routing": None}
    console().print(evaluation_table(Evaluation.model_validate(facts)))
    assert capsys.readouterr().out.count(evil) == 3


def test_a_model_card_passes_no_markup_on(llama: dict[str, Path], tmp_path: Path) -> None:
    evil = tmp_path / "<script>alert(1)</script>|x"
    shutil.copytree(llama["one"], evil)
    recipe = {"merge_method": "linear", "models": [{"model": str(evil), "name": "a"}], "tokenizer_source": None}
    card = (plait.merge(recipe, tmp_path / "out").path / "README.md").read_text()
    table = card.split("## Recipe")[0]
    assert "<script>" not in table
    assert "script&gt;\\|x" in table
