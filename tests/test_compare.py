"""Comparisons, sweeps and their tables; and the measuring verbs as people call them."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pico
import pytest
import transformers
import yaml
from conftest import folder_hash
from mini_suite import CLASSES, TEST, MiniSuite

from plait import cli
from plait.errors import CheckpointError, RecipeError
from plait.evaluate import sweep as sweeping
from plait.evaluate.compare import compare
from plait.evaluate.contenders import by_method, contender
from plait.evaluate.measure import Bench, Options
from plait.evaluate.metrics import difference
from plait.evaluate.results import Comparison, Sweep, dump, load
from plait.evaluate.subjects import Subject
from plait.evaluate.sweep import parse_axes, parse_axis, sweep
from plait.evaluate.tables import comparison_csv, comparison_markdown
from plait.run import merge

TASKS = list(CLASSES)


@pytest.fixture(autouse=True)
def _cache(mini: MiniSuite, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.utils.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    monkeypatch.setenv("PLAIT_CACHE", str(mini.cache))


@pytest.fixture(scope="module")
def bench(mini: MiniSuite) -> Bench:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLAIT_CACHE", str(mini.cache))
        return Bench(mini.suite)


def recipe_file(mini: MiniSuite, path: Path, models: bool = True, **more: Any) -> Path:
    data: dict[str, Any] = {"merge_method": "task_arithmetic", "parameters": {"weight": 0.5}, **more}
    if models:
        data |= {"base_model": str(mini.base), "models": mini.suite.recipe("")["models"][:2]}
    path.write_text(yaml.safe_dump(data))
    return path


# ---------------------------------------------------------------- what is asked for


def test_a_recipe_file(mini: MiniSuite, tmp_path: Path) -> None:
    path = recipe_file(mini, tmp_path / "mine.yaml")
    found = contender(str(path), mini.suite)
    assert found.recipe is not None
    assert (found.label, found.model, len(found.recipe.models or [])) == ("mine", None, 2)
    named = contender(f"other name={path}", mini.suite)
    assert (named.label, named.slug) == ("other name", "other-name")
    assert named.recipe is not None
    assert named.recipe.canonical() == found.recipe.canonical()


def test_a_recipe_without_models_is_for_the_suites_experts(mini: MiniSuite, tmp_path: Path) -> None:
    found = contender(str(recipe_file(mini, tmp_path / "mine.yaml", models=False)), mini.suite)
    assert found.recipe is not None
    assert found.recipe.canonical() == by_method("task_arithmetic", mini.suite, {"weight": 0.5}).canonical()


def test_a_model_folder(mini: MiniSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = contender(str(mini.expert("tone")), mini.suite)
    assert (found.label, found.recipe, found.model) == ("tone", None, str(mini.expert("tone")))
    assert contender(f"x={mini.base}", mini.suite).label == "x"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    assert contender("a=b", mini.suite).model == "a=b", "a folder that is there goes before a label"
    (tmp_path / "ties").mkdir()
    assert contender("ties", mini.suite).model == "ties"
    assert contender("someone/model", mini.suite).model == "someone/model"


@pytest.mark.parametrize(
    ("spec", "label", "parameters"),
    [
        ("ties", "ties", {}),
        ("ties:density=0.2,trim=model", "ties density=0.2 trim=model", {"density": 0.2, "trim": "model"}),
        ("ties: density = 0.2", "ties density=0.2", {"density": 0.2}),
        ("mine=ties:density=0.2", "mine", {"density": 0.2}),
        ("mine=ties", "mine", {}),
    ],
)
def test_a_method_by_name(mini: MiniSuite, spec: str, label: str, parameters: dict[str, Any]) -> None:
    found = contender(spec, mini.suite)
    assert found.label == label
    assert found.recipe is not None
    assert found.recipe.canonical() == by_method("ties", mini.suite, parameters).canonical()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tiess", r"tiess: is no recipe file, no model folder and no method; did you mean 'ties'\?; a method's param"),
        ("tiess:density=0.2", r"no method; did you mean 'ties'\?; .* written ties:density=0\.2,trim=model"),
        ("ties:density", r"ties:density: 'density' must be parameter=value"),
        ("ties:density=0.2,,trim=x", r"'' must be parameter=value"),
        ("ties:densty=0.2", r"densty.*did you mean 'density'\?"),
        ("gone.yaml", r"gone\.yaml: no such recipe file"),
    ],
)
def test_what_means_nothing(mini: MiniSuite, bench: Bench, spec: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        compare([spec], bench, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "before anything is merged"


# ---------------------------------------------------------------- comparisons


@pytest.fixture(scope="module")
def compared(mini: MiniSuite, bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    out = tmp_path_factory.mktemp("compared")
    recipe = recipe_file(mini, out / "two | experts.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLAIT_CACHE", str(mini.cache))
        specs = ["ties:density=0.3", str(recipe), f"one expert={mini.expert('pair')}"]
        return compare(specs, bench, out), out


LABELS = ["experts", "base + heads", "average", "task_arithmetic", "ties density=0.3", "two | experts", "one expert"]


def test_the_rows(compared: tuple[Comparison, Path]) -> None:
    found, _ = compared
    assert [row.label for row in found.rows] == LABELS
    assert [row.kind for row in found.rows] == ["expert", "base", *["merge"] * 4, "model"]
    assert [row.method for row in found.rows] == [
        None, None, "average", "task_arithmetic", "ties", "task_arithmetic", None
    ]  # fmt: skip
    assert [row.evaluation.protocol.task_id for row in found.rows] == ["model", *["head"] * 6]
    assert found.suite.tasks == TASKS
    assert found.inspection is not None
    assert "cores" in found.machine
    for row in found.rows:
        assert (row.merge_seconds is None) == (row.recipe is None) == (row.kind != "merge")
        assert row.evaluation.model.label == row.label


def test_every_row_is_what_merging_and_measuring_by_hand_gives(
    mini: MiniSuite, bench: Bench, compared: tuple[Comparison, Path], tmp_path: Path
) -> None:
    found, out = compared
    fresh = Bench(mini.suite, Options(use_cache=False))
    fresh._experts.update(bench._experts)
    for row in found.rows:
        if row.kind == "merge":
            assert row.recipe is not None
            folder = tmp_path / row.label.replace(" ", "-")
            merge(row.recipe, folder)
            written = out / "models" / re.sub(r"[^A-Za-z0-9._-]+", "-", row.label)
            weights = [load_bytes(place) for place in (written, folder)]
            assert weights[0] == weights[1]
            again = fresh.evaluate(Subject.model(mini.suite, str(folder), row.label))
            assert again.tasks == row.evaluation.tasks
            assert (again.average, again.normalised) == (row.evaluation.average, row.evaluation.normalised)
    assert found.rows[0].evaluation.tasks == bench.experts().tasks
    assert found.rows[1].evaluation.tasks == bench.evaluate(Subject.base(mini.suite)).tasks


def load_bytes(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_differences_are_against_the_baseline(compared: tuple[Comparison, Path]) -> None:
    found, _ = compared
    assert found.baseline == "task_arithmetic"
    base = next(row for row in found.rows if row.label == found.baseline)
    for row in found.rows:
        if row is base:
            assert row.difference is None
            continue
        ours, theirs = row.evaluation.tasks, base.evaluation.tasks
        expected = difference(
            {task: r.predictions for task, r in ours.items()}, {task: r.predictions for task, r in theirs.items()},
            {task: r.labels for task, r in ours.items()}, dict.fromkeys(TASKS, "accuracy"),
        )  # fmt: skip
        assert row.difference == expected
        gap = row.evaluation.average.value - base.evaluation.average.value
        assert expected.value == pytest.approx(gap)


def test_another_baseline_and_standards_that_are_asked_for(mini: MiniSuite, bench: Bench, tmp_path: Path) -> None:
    given = "task_arithmetic=task_arithmetic:weight=0.9"
    found = compare([given], bench, tmp_path, baseline="experts")
    assert [row.label for row in found.rows] == ["experts", "base + heads", "average", "task_arithmetic"]
    assert found.rows[3].recipe is not None
    assert found.rows[3].recipe["parameters"] == {"weight": 0.9}
    assert found.rows[0].difference is None
    assert found.rows[1].difference is not None
    assert found.rows[1].difference.value < 0


def test_comparisons_that_are_refused_before_anything_is_merged(mini: MiniSuite, bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"compare: no row is called 'tise' to be the baseline; did you mean 'ties'\?"
    ):
        compare(["ties"], bench, tmp_path / "out", baseline="tise")
    with pytest.raises(RecipeError, match=r"compare: two rows are called 'ties'; name one of them with label=…"):
        compare(["ties", "ties=breadcrumbs"], bench, tmp_path / "out")
    with pytest.raises(RecipeError, match=r"compare: two rows are called 'experts'"):
        compare(["experts=ties"], bench, tmp_path / "out")
    with pytest.raises(RecipeError, match=r"compare: 'a b' and 'a-b' would both be written to models/a-b; name one"):
        compare(["a b=ties", "a-b=average"], bench, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_do_not_fit(mini: MiniSuite, bench: Bench, tmp_path: Path) -> None:
    other = pico.make_vit(tmp_path / "vit")
    with pytest.raises(CheckpointError, match=r"vit.*preprocessor_config|vit.*pixel|vit.*reads"):
        compare([str(other)], bench, tmp_path / "out")


# ---------------------------------------------------------------- tables


def test_the_markdown_can_be_read_back(compared: tuple[Comparison, Path]) -> None:
    found, _ = compared
    lines = [line for line in comparison_markdown(found).splitlines() if line.startswith("|")]
    rows = [[cell.strip().replace("\\|", "|").replace("\\*", "*") for cell in cells(line)] for line in lines]
    assert len({len(row) for row in rows}) == 1, "a | in a label is no new column"
    header, _, *body = rows
    assert header[:6] == ["model", *TASKS, "average", "normalised"]
    assert [row[0] for row in body] == LABELS
    for cells_, row in zip(body, found.rows, strict=True):
        e = row.evaluation
        assert cells_[1:4] == [f"{100 * e.tasks[task].score.value:.1f}" for task in TASKS]
        value, spread = cells_[4].split(" ±")
        assert float(value) == pytest.approx(100 * e.average.value, abs=0.05)
        assert float(spread) == pytest.approx(50 * (e.average.high - e.average.low), abs=0.05)
        against = cells_[6]
        if row.difference is None:
            assert against == ""
        else:
            assert float(against.rstrip("*")) == pytest.approx(100 * row.difference.value, abs=0.05)
            assert against.endswith("*") == (row.difference.p < 0.05)


def cells(line: str) -> list[str]:
    return re.split(r"(?<!\\)\|", line)[1:-1]


def test_the_csv_can_be_read_back(compared: tuple[Comparison, Path]) -> None:
    found, _ = compared
    rows = list(csv.DictReader(io.StringIO(comparison_csv(found))))
    assert [row["model"] for row in rows] == LABELS
    for line, row in zip(rows, found.rows, strict=True):
        e = row.evaluation
        assert [float(line[task]) for task in TASKS] == [e.tasks[task].score.value for task in TASKS]
        assert [float(line[f"average{end}"]) for end in ("", "_low", "_high")] == list(e.average.model_dump().values())
        assert (line["p"] == "") == (row.difference is None)
        assert int(line["bytes"]) == e.model.bytes


def test_a_label_of_several_lines_stays_one_row(compared: tuple[Comparison, Path]) -> None:
    found, _ = compared
    rows = [found.rows[0].model_copy(update={"label": 'a\n"b", *c*'}), *found.rows[1:]]
    odd = found.model_copy(update={"rows": rows})
    assert sum(line.startswith("|") for line in comparison_markdown(odd).splitlines()) == len(LABELS) + 2
    assert next(csv.DictReader(io.StringIO(comparison_csv(odd))))["model"] == 'a\n"b", *c*'


def test_a_comparison_comes_back_as_it_was(compared: tuple[Comparison, Path], tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(dump(compared[0]))
    assert load(tmp_path / "x.json") == compared[0]


# ---------------------------------------------------------------- axes


@pytest.mark.parametrize(
    ("text", "path", "values"),
    [
        ("parameters.weight=0.1..0.5:0.1", "parameters.weight", [0.1, 0.2, 0.3, 0.4, 0.5]),
        ("parameters.weight=0..1:0.3", "parameters.weight", [0, 0.3, 0.6, 0.9]),
        ("a=-1..1:1", "a", [-1, 0, 1]),
        ("a=1e-3..2e-3:1e-3", "a", [0.001, 0.002]),
        ("a=2..2:1", "a", [2]),
        ("a=0.1,0.2", "a", [0.1, 0.2]),
        ("a=model, tensor", "a", ["model", "tensor"]),
        ("a=true,false,null,3", "a", [True, False, None, 3]),
        ("a=x=y", "a", ["x=y"]),
    ],
)
def test_axes(text: str, path: str, values: list[Any]) -> None:
    assert parse_axis(text) == (path, values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight", "must be path=values, such as"), ("=1", "must be path=values"), ("weight=", "must be path=values"),
        ("a=0..1:0", "needs first <= last, a step above zero"), ("a=1..0:0.1", "needs first <= last"),
        ("a=0..1:-0.1", "a step above zero"), ("a=0..1:1e-9", "at most 1000 values"),
        ("a=1e999..1e999:1", "needs first <= last"), ("a=0..1e999:1e999", "needs first <= last"),
        ("a=0.1..1.0", "a range needs its step: first..last:step"), ("a=1..2:e", "must be first..last:step"),
    ],
)  # fmt: skip
def test_axes_that_are_none(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"--set {re.escape(text)}: .*{message}"):
        parse_axis(text)


def test_an_axis_is_given_once() -> None:
    assert parse_axes(["a=1", "b=2,3"]) == {"a": [1], "b": [2, 3]}
    with pytest.raises(RecipeError, match=r"--set a: is given twice; put all its values into one: a=a,b,c"):
        parse_axes(["a=1", "a=2"])


# ---------------------------------------------------------------- sweeps


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every recipe that a sweep merges."""
    found: list[Any] = []
    monkeypatch.setattr(sweeping, "merge", lambda recipe, *rest, **o: (found.append(recipe), merge(recipe, *rest, **o)))
    return found


def test_a_grid(mini: MiniSuite, bench: Bench, tmp_path: Path, merges: list[Any]) -> None:
    axes = {"parameters.weight": [0.2, 0.6], "parameters.density": [0.3, 0.9]}
    found = sweep(contender("ties", mini.suite), axes, bench, tmp_path / "out")
    assert [list(p.settings.values()) for p in found.points] == [[0.2, 0.3], [0.2, 0.9], [0.6, 0.3], [0.6, 0.9]]
    assert (found.method, found.axes, len(merges)) == ("ties", axes, 4)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["points.jsonl"], "models are removed"
    point = found.points[2]
    merge(mini.suite.recipe("ties", {"weight": 0.6, "density": 0.3}), tmp_path / "hand")
    hand = bench.evaluate(Subject.model(mini.suite, str(tmp_path / "hand")))
    assert hand.normalised is not None
    assert point.scores == {task: r.score.value for task, r in hand.tasks.items()}
    assert point.normalised == {task: r.normalised.value for task, r in hand.tasks.items() if r.normalised}
    assert (point.seen.value, point.seen.low, point.seen.high) == pytest.approx(
        (hand.normalised.value, hand.normalised.low, hand.normalised.high)
    )
    assert (point.experts, point.unseen) == (TASKS, None)
    assert len({tuple(p.scores.values()) for p in found.points}) > 1
    (tmp_path / "x.json").write_text(dump(found))
    assert load(tmp_path / "x.json") == found


def test_subsets_of_the_experts(mini: MiniSuite, bench: Bench, tmp_path: Path, merges: list[Any]) -> None:
    found = sweep(contender("average", mini.suite), {}, bench, tmp_path, sizes=[1, 2, 3], subsets=2)
    assert [len(point.experts) for point in found.points] == [1, 1, 2, 2, 3]
    assert len({tuple(point.experts) for point in found.points}) == 5
    assert found.axes == {"experts": [1, 2, 3]}
    for recipe, point in zip(merges, found.points, strict=True):
        assert sorted(recipe.names().values()) == sorted(point.experts)
        rest = [task for task in TASKS if task not in point.experts]
        assert point.seen.value == pytest.approx(np.mean([point.normalised[task] for task in point.experts]))
        assert set(point.normalised) == set(TASKS), "the others are measured too"
        if rest:
            assert point.unseen is not None
            assert point.unseen.value == pytest.approx(np.mean([point.normalised[task] for task in rest]))
    assert found.points[-1].unseen is None
    assert found.points[0].seen.value == pytest.approx(1, abs=0.02), "one expert merged is that expert"
    again = sweep(contender("average", mini.suite), {}, bench, tmp_path / "again", sizes=[1, 2, 3], subsets=2)
    assert [point.experts for point in again.points] == [point.experts for point in found.points]
    few = sweep(contender("average", mini.suite), {}, bench, tmp_path, sizes=[2], subsets=5)
    assert [point.experts for point in few.points] == [["tone", "count"], ["tone", "pair"], ["count", "pair"]]


def test_an_interrupted_sweep_goes_on(
    mini: MiniSuite, bench: Bench, tmp_path: Path, merges: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    item, axes = contender("task_arithmetic", mini.suite), {"parameters.weight": [0.1, 0.2, 0.3, 0.4]}
    whole = sweep(item, axes, bench, tmp_path / "whole")
    out = tmp_path / "out"
    evaluate = Bench.evaluate

    def killed(self: Bench, subject: Subject, **options: Any) -> Any:
        if "weight=0.3" in subject.label:
            raise KeyboardInterrupt
        return evaluate(self, subject, **options)

    merges.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Bench, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            sweep(item, axes, bench, out)
    assert len(merges) == 3
    lines = (out / "points.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 2
    (out / "points.jsonl").write_text(lines[0] + lines[1][:50])  # killed while it wrote the second
    merges.clear()
    found = sweep(item, axes, bench, out)
    assert [recipe.parameters["weight"] for recipe in merges] == [0.2, 0.3, 0.4]
    assert without_times(found) == without_times(whole)
    merges.clear()
    assert without_times(sweep(item, axes, bench, out)) == without_times(whole)
    assert not merges, "also what was written after the torn line is found again"


def without_times(found: Sweep) -> list[dict[str, Any]]:
    return [point.model_dump(exclude={"seconds"}) for point in found.points]


def test_a_filed_point_is_used_by_sweeps_over_other_axes(
    mini: MiniSuite, bench: Bench, tmp_path: Path, merges: list[Any]
) -> None:
    sweep(contender("ties", mini.suite), {"parameters.density": [0.3]}, bench, tmp_path)
    found = sweep(contender("ties:density=0.3", mini.suite), {}, bench, tmp_path, sizes=[3])
    assert len(merges) == 1
    assert [point.settings for point in found.points] == [{}], "under its own settings"


def test_a_point_is_made_again_when_an_expert_changed(mini: MiniSuite, tmp_path: Path, merges: list[Any]) -> None:
    path = mini.copy(tmp_path / "suite")
    axes = {"parameters.weight": [0.4]}

    def points() -> list[Any]:
        from plait.suites.definition import read_suite

        suite = read_suite(path)
        return sweep(contender("task_arithmetic", suite), axes, Bench(suite), tmp_path / "out").points

    points()
    points()
    assert len(merges) == 1
    shutil.copy(mini.expert("tone") / "model.safetensors", tmp_path / "suite" / "experts" / "pair")
    points()
    assert len(merges) == 2
    path.write_text(path.read_text().replace("  count:\n", "  count:\n    metrics: [matthews]\n"))
    points()
    assert len(merges) == 3


def test_a_recipe_file_is_swept_in_its_own_words(mini: MiniSuite, bench: Bench, tmp_path: Path) -> None:
    recipe = recipe_file(mini, tmp_path / "r.yaml", models=False, keep={"base": ["embeddings"]})
    found = sweep(contender(str(recipe), mini.suite), {"parameters.weight": [0.2]}, bench, tmp_path / "out")
    assert found.recipe["keep"] == {"base": ["embeddings"]}
    assert len(found.points) == 1


def test_sweeps_that_are_refused(mini: MiniSuite, bench: Bench, tmp_path: Path, merges: list[Any]) -> None:
    ties = contender("ties", mini.suite)

    def refused(message: str, item: Any = ties, axes: Any = None, **options: Any) -> None:
        with pytest.raises(RecipeError, match=message):
            sweep(item, axes or {}, bench, tmp_path / "out", **options)

    refused(r"sweep: base is a finished model; give a recipe or a method", contender(str(mini.base), mini.suite))
    refused(r"densty.*did you mean 'density'\?", axes={"parameters.densty": [0.1]})
    refused(r"wieght.*unknown", axes={"wieght": [0.1]})
    refused(r"--set merge_method\.x: 'merge_method' is not a group of settings", axes={"merge_method.x": [1]})
    refused(r"--experts 4: the suite has 3 experts; give numbers from 1 to 3", sizes=[4])
    refused(r"--experts 0: the suite has 3 experts", sizes=[0])
    two = contender(str(recipe_file(mini, tmp_path / "two.yaml")), mini.suite)
    refused(r"sweep: the recipe has no model named pair; name its models as the suite's tasks", two)
    models = mini.suite.recipe("")["models"]
    models[0]["parameters"] = {"weight": 0.9}
    each = recipe_file(mini, tmp_path / "each.yaml", models=False, base_model=str(mini.base), models_=None)
    data = yaml.safe_load(each.read_text())
    data.pop("models_")
    each.write_text(yaml.safe_dump({**data, "models": models}))
    refused(
        r"--set parameters\.weight: the recipe sets weight for each model, which goes first; remove it there",
        contender(str(each), mini.suite), {"parameters.weight": [0.1]},
    )  # fmt: skip
    assert not merges


# ---------------------------------------------------------------- the command line


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Call = Callable[..., Result]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`plait …` in this process, through the same `main` that the installed command runs."""

    def run(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["plait", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


def test_suite_list(call: Call) -> None:
    found = call("suite", "list")
    assert (found.code, found.err) == (0, "")
    assert "not built" in found.out
    data = json.loads(call("suite", "list", "--json").out)
    assert {item["name"] for item in data} >= {"vision", "text", "clip8"}
    assert all(not item["built"] for item in data)


def test_suite_show(call: Call, mini: MiniSuite, tmp_path: Path) -> None:
    found = call("suite", "show", mini.root)
    assert (found.code, found.err) == (0, "")
    for word in ("mini", "tone", "heads/pair.safetensors", "the expert's", str(TEST), "bert"):
        assert word in found.out
    data = json.loads(call("suite", "show", mini.root / "suite.yaml", "--json").out)
    assert (data["family"], data["tasks"]["tone"]["classes"]) == ("bert", CLASSES["tone"])
    assert data["tasks"]["pair"]["splits"] == {"train": 90, "adapt": TEST, "test": TEST}
    path = mini.copy(tmp_path)
    shutil.copy(tmp_path / "data" / "count-test.csv", tmp_path / "data" / "count-train.csv")
    refused = call("suite", "show", path)
    assert refused.code == 3
    assert "60 of its 60 inputs are also in count's test split" in refused.err


def test_eval(call: Call, mini: MiniSuite, bench: Bench, tmp_path: Path) -> None:
    expected = bench.evaluate(Subject.model(mini.suite, str(mini.base)))
    found = call("eval", mini.base, "--suite", mini.root, "--quiet")
    assert (found.code, found.err) == (0, "")
    for task, result in expected.tasks.items():
        line = next(line for line in found.out.splitlines() if line.strip().startswith(task))
        assert f"{100 * result.score.value:.1f}" in line
    told = call("eval", mini.base, "--suite", mini.root, "--json", "-t", "tone")
    data = json.loads(told.out)
    assert data["schema"] == "plait.evaluation/1"
    assert data["tasks"]["tone"]["predictions"] == expected.tasks["tone"].predictions
    assert list(data["tasks"]) == ["tone"]
    first = data["seconds"]
    assert json.loads(call("eval", mini.base, "--suite", mini.root, "--json", "-t", "tone").out)["seconds"] == first
    again = call("eval", mini.base, "--suite", mini.root, "--json", "-t", "tone", "--no-cache", "--batch-size", "64")
    assert json.loads(again.out)["seconds"] != first


def test_compare_writes_its_files(call: Call, mini: MiniSuite, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = call("compare", "ties", "--suite", mini.root, "--out", out, "--quiet")
    assert (found.code, found.err) == (0, "")
    assert {path.name for path in out.iterdir()} == {
        "comparison.json", "table.md", "table.csv", "report.html", "models"
    }  # fmt: skip
    assert {path.name for path in (out / "models").iterdir()} == {"average", "task_arithmetic", "ties"}
    written = load(out / "comparison.json")
    assert isinstance(written, Comparison)
    assert (out / "table.md").read_text() == comparison_markdown(written)
    assert (out / "table.csv").read_text() == comparison_csv(written)
    assert str(out / "report.html") in found.out.replace("\n", "")
    for label in ("experts", "base + heads", "average", "task_arithmetic", "ties"):
        assert label in found.out
        assert label in (out / "report.html").read_text()
    made = folder_hash(out / "models")
    told = call("compare", "ties", "--suite", mini.root, "--out", out, "--json", "--baseline", "average", "-t", "tone")
    assert json.loads(told.out)["baseline"] == "average"
    assert list(json.loads(told.out)["suite"]["tasks"]) == ["tone"]
    assert folder_hash(out / "models") != made, "of one expert now"


def test_sweep_and_report(call: Call, mini: MiniSuite, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["sweep", "task_arithmetic", "--suite", mini.root, "--set", "parameters.weight=0.2,0.5", "--out", out]
    found = call(*words, "--quiet")
    assert (found.code, found.err) == (0, "")
    assert {path.name for path in out.iterdir()} == {"points.jsonl", "sweep.json", "report.html"}
    told = call(*words, "--json", "--experts", "2", "--subsets", "1")
    data = json.loads(told.out)
    assert (data["schema"], data["axes"]) == ("plait.sweep/1", {"parameters.weight": [0.2, 0.5], "experts": [2]})
    assert len(data["points"]) == 2
    page = tmp_path / "page.html"
    made = call("report", out / "sweep.json", "--out", page, "--title", "My <title>")
    assert (made.code, made.out.strip()) == (0, str(page))
    assert "My &lt;title&gt;" in page.read_text()


REFUSED: dict[str, tuple[list[str], int, str]] = {
    "suite": (["eval", "BASE", "--suite", "visoin"], 2, "visoin: no such suite; did you mean 'vision'?"),
    "task": (["eval", "BASE", "--suite", "MINI", "-t", "tones"], 2, "no task 'tones'; did you mean 'tone'?"),
    "dtype": (["eval", "BASE", "--suite", "MINI", "--dtype", "int8"], 2, "--dtype int8: must be one of float32"),
    "device": (["eval", "BASE", "--suite", "MINI", "--device", "gpu9", "--no-cache"], 1, "--device gpu9: is no device"),
    "model": (["eval", "./gone", "--suite", "MINI"], 3, "./gone: no such file or folder"),
    "method": (["compare", "tiess", "--suite", "MINI"], 2, "did you mean 'ties'?"),
    "baseline": (["compare", "--suite", "MINI", "--baseline", "x"], 2, "no row is called 'x' to be the baseline"),
    "nothing to sweep": (["sweep", "ties", "--suite", "MINI"], 2, "say what to change with --set path=values"),
    "axis": (["sweep", "ties", "--suite", "MINI", "--set", "x"], 2, "--set x: must be path=values"),
    "axes": (["sweep", "ties", "--suite", "MINI", "-s", "a=1", "-s", "a=2"], 2, "--set a: is given twice"),
    "sizes": (["sweep", "ties", "--suite", "MINI", "--experts", "a"], 2, "--experts a: must be whole numbers"),
    "memory": (["compare", "--suite", "MINI", "--memory", "much"], 2, "memory"),
    "results": (["report", "MINI/suite.yaml"], 3, "suite.yaml: is not JSON; give a file that plait eval"),
    "no results": (["report", "gone.json"], 3, "gone.json: cannot be read"),
    "build": (["suite", "build", "visoin"], 2, "visoin: is no suite that can be built; did you mean 'vision'?"),
    "not built": (["suite", "show", "text"], 2, "'text' is not built on this machine; run: plait suite build text"),
    "batch": (["eval", "BASE", "--suite", "MINI", "--batch-size", "0"], 2, "--batch-size"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_refusals_are_one_sentence_and_an_exit_code(
    call: Call, mini: MiniSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words, code, message = REFUSED[which]
    found = call(*(word.replace("BASE", str(mini.base)).replace("MINI", str(mini.root)) for word in words))
    assert message in found.err
    assert (found.code, found.out) == (code, "")
    assert "Traceback" not in found.err


def test_as_a_process(mini: MiniSuite) -> None:
    """No stray output of other libraries, and the exit code reaches the shell."""
    done = subprocess.run(
        [sys.executable, "-m", "plait", "eval", str(mini.base), "--suite", str(mini.root), "--json"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["schema"] == "plait.evaluation/1"
