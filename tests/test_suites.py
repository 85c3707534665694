"""Suites: what a YAML file may say, what data files may hold, and how ours are built."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import folder_hash
from mini_suite import CLASSES, MiniSuite
from PIL import Image
from safetensors.torch import load_file

from plait.errors import CheckpointError, MachineError, RecipeError
from plait.models.heads import read_head
from plait.models.net import load_net
from plait.suites import build, train
from plait.suites.build import build_suite
from plait.suites.builtin import RECIPES, Recipe
from plait.suites.data import Split, check_disjoint, load_split
from plait.suites.definition import Suite, read_suite, suite_of
from plait.suites.places import load_suite, suite_folder
from plait.suites.train import Settings, fit_probe, make_expert

SUITE = """\
base: ./base
tasks:
  mnist:
    expert: ./expert
    data:
      adapt: adapt.csv
      test:
        path: test.csv
        label: digit
"""


@pytest.fixture(autouse=True)
def _cache(mini: MiniSuite, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    datasets.utils.disable_progress_bars()
    monkeypatch.setenv("PLAIT_CACHE", str(mini.cache))
    yield
    torch.set_num_threads(1)


# ---------------------------------------------------------------- suite.yaml


def read(folder: Path, text: str) -> Suite:
    (folder / "suite.yaml").write_text(text)
    return read_suite(folder / "suite.yaml")


def test_a_suite(tmp_path: Path) -> None:
    suite = read(tmp_path, SUITE)
    entry = suite.tasks["mnist"]
    assert (suite.name, suite.folder) == (tmp_path.name, tmp_path.resolve())
    assert entry.data["adapt"].path == "adapt.csv", "a text is short for path:"
    assert (entry.data["test"].label, entry.data["adapt"].label) == ("digit", "label")
    assert (entry.metrics, entry.head, entry.classes) == (["accuracy"], None, None)
    assert suite_of(yaml.safe_load(SUITE), tmp_path).tasks == suite.tasks


def test_json_is_a_suite_too(tmp_path: Path) -> None:
    (tmp_path / "suite.json").write_text(json.dumps(yaml.safe_load(SUITE)))
    assert list(read_suite(tmp_path / "suite.json").tasks) == ["mnist"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("base:", "bass:", r"line 1: bass: unknown key 'bass'; did you mean 'base'\?"),
        ("    expert:", "    exprt:", r"line 4: tasks\.mnist\.exprt: unknown key 'exprt'; did you mean 'expert'\?"),
        ("    expert:", "    exprt:", r"tasks\.mnist\.expert: is required"),
        ("label:", "labl:", r"line 9: tasks\.mnist\.data\.test\.labl: unknown key 'labl'; did you mean 'label'\?"),
        ("      test:", "      tset:", r"line 7: \S+\.tset: unknown split 'tset'; did you mean 'test'\?"),
        ("      test:", "      train:", r"line 5: tasks\.mnist\.data: test is required: the split that is reported on"),
        ("label: digit", "dataset: mnist", r"line 7: tasks\.mnist\.data\.test: give either path or dataset"),
        ("path: test.csv", "input: x", r"line 7: tasks\.mnist\.data\.test: give either path or dataset"),
        ("path: test.csv", "dataset: mnist", r"line 7: \S+: a dataset needs split: as well, such as split: test"),
        ("label: digit", "split: test", r"line 7: \S+: split and config go with dataset"),
        ("adapt: adapt.csv", "adapt: 3", r"line 6: tasks\.mnist\.data\.adapt: must be a mapping, got 3"),
        ("label: digit", "label: 3", r"line 9: tasks\.mnist\.data\.test\.label: must be a string, got 3"),
        ("expert: ./expert", "expert: [a]", r"line 4: tasks\.mnist\.expert: must be a string"),
        ("base: ./base", "base: ./base\nmax_length: 0", r"line 2: max_length: must be .* or equal to 1, got 0"),
        ("base: ./base", "base: ./base\nmax_length: '9'", r"line 2: max_length: must be a.* integer, got '9'"),
        ("base: ./base", "base: ./base\npooling: max", r"line 2: pooling: must be 'mean', .*, got 'max'"),
        ("    data:", "    metrics: [acuracy]\n    data:", r"line 5: \S+\.metrics\[0\]: must be 'accuracy', .*"),
        ("    data:", "    metrics: []\n    data:", r"line 5: tasks\.mnist\.metrics: .*at least 1 item"),
        ("    data:", "    metrics: [exact_match, f1]\n    data:", r"line 5: \S+\.metrics: .*give it alone"),
        ("    data:", "    classes: [a, b]\n    answers: [x]\n    data:", r"line 6: \S+: 1 answers for 2 classes"),
        ("    data:", "    classes: [1, 2]\n    data:", r"line 5: tasks\.mnist\.classes\[0\]: must be a string, got 1"),
        ("    expert:", "    expert: x\n    expert:", r"line 5: the key 'expert' is given twice"),
        ("base: ./base\n", "", r"base: is required"),
        ("./base", "!!python/name:os.system", r"line 1: the tag .*os\.system is not plain data"),
        ("./base", "[", r"not valid YAML"),
    ],
)  # fmt: skip
def test_what_a_suite_may_not_say(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SUITE
    with pytest.raises(RecipeError, match=message) as caught:
        read(tmp_path, SUITE.replace(old, new, 1))
    assert str(tmp_path / "suite.yaml") in str(caught.value)


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "-rf", "a b", "a\\b", "ä", '"a\\nb"', '""', "a:b", "a$"])
def test_hostile_task_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=r"suite\.yaml, line 3: tasks\.[\s\S]*a task's name must be letters"):
        read(tmp_path, SUITE.replace("mnist", name))


@pytest.mark.parametrize("text", ["", "3", "- a", "just words"])
def test_a_suite_is_a_mapping(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match=r"suite\.yaml.*must be a mapping with base and tasks"):
        read(tmp_path, text)


def test_a_suite_has_tasks(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"suite\.yaml, line 2: tasks: .*at least 1 item"):
        read(tmp_path, "base: x\ntasks: {}\n")


def test_only(mini: MiniSuite) -> None:
    part = mini.suite.only(["pair", "tone"])
    assert list(part.tasks) == ["tone", "pair"], "in the suite's order"
    assert (part.folder, part.place("base")) == (mini.suite.folder, mini.suite.place("base"))
    assert "suite.yaml, line" in part.where("tasks", "pair")
    assert mini.suite.only(None) is mini.suite
    with pytest.raises(RecipeError, match=r"mini: the suite has no task 'tones'; did you mean 'tone'\?"):
        mini.suite.only(["tones"])


def test_place(mini: MiniSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert mini.suite.place("base") == str(mini.base.resolve())
    assert mini.suite.place(str(mini.base)) == str(mini.base.resolve())
    assert mini.suite.place("someone/model") == "someone/model", "a hub id stays as it is"


def test_a_suites_recipe_can_be_used_anywhere(mini: MiniSuite) -> None:
    found = mini.suite.recipe("ties", {"density": 0.3})
    assert found["models"][0] == {"model": str(mini.expert("tone").resolve()), "name": "tone"}
    assert (found["merge_method"], found["parameters"]) == ("ties", {"density": 0.3})


def test_load_suite(mini: MiniSuite, tmp_path: Path) -> None:
    for spec in (mini.root, mini.root / "suite.yaml", str(mini.root)):
        assert load_suite(spec).tasks == mini.suite.tasks
    assert load_suite(mini.suite) is mini.suite
    with pytest.raises(RecipeError, match=r"visoin: no such suite; did you mean 'vision'\?; or give the path"):
        load_suite("visoin")
    with pytest.raises(RecipeError, match=r"'text-hard' is not built .*; run: plait suite build text-hard"):
        load_suite("text-hard")
    with pytest.raises(RecipeError, match="no such suite"):
        load_suite(tmp_path)
    shutil.copy(mini.root / "suite.yaml", tmp_path)
    folder = suite_folder("text")
    folder.mkdir(parents=True)
    shutil.move(tmp_path / "suite.yaml", folder)
    try:
        assert load_suite("text").folder == folder
    finally:
        shutil.rmtree(folder)


# ---------------------------------------------------------------- data files


def split_of(data: Any, folder: Path, name: str = "test", **task: Any) -> Split:
    """One split, read as a suite's."""
    entries = {"test": data} if name == "test" else {name: data, "test": data}
    suite = suite_of({"base": "none", "tasks": {"task": {"expert": "none", "data": entries, **task}}}, folder)
    return load_split(suite, "task", name)


def table(folder: Path, columns: dict[str, Any], name: str = "data.parquet", **features: Any) -> str:
    kinds = datasets.Features(features) if features else None
    datasets.Dataset.from_dict(columns, features=kinds).to_parquet(folder / name)
    return name


def text_file(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return name


def picture(value: int, size: int = 8) -> Image.Image:
    return Image.fromarray(np.full((size, size, 3), value, dtype=np.uint8))


def image_folder(folder: Path, names: dict[str, list[int]]) -> Path:
    for name, values in names.items():
        (folder / name).mkdir(parents=True)
        for value in values:
            picture(value).save(folder / name / f"{value}.png")
    return folder


TABLE = {"text": ["one two", "three", "fo,ur"], "label": [2, 0, 1]}


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "jsonl", "json"])
def test_data_files_of_all_kinds_read_alike(tmp_path: Path, kind: str) -> None:
    if kind == "parquet":
        name = table(tmp_path, TABLE)
    elif kind in ("csv", "tsv"):
        mark = "," if kind == "csv" else "\t"
        rows = [f'"{text}"{mark}{label}' for text, label in zip(*TABLE.values(), strict=True)]
        name = text_file(tmp_path, f"data.{kind}", "\n".join([mark.join(TABLE), *rows]) + "\n")
    else:
        rows = [dict(zip(TABLE, row, strict=True)) for row in zip(*TABLE.values(), strict=True)]
        text = "\n".join(map(json.dumps, rows)) if kind == "jsonl" else json.dumps(rows)
        name = text_file(tmp_path, f"data.{kind}", text)
    split = split_of(name, tmp_path)
    assert [split[row] for row in range(len(split))] == TABLE["text"]
    assert (split.labels(), split.classes, split.is_image) == (TABLE["label"], None, False)
    assert split.labels(as_text=True) == ["2", "0", "1"]


def test_the_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    assert len(split_of(text_file(tmp_path, "DATA.CSV", "text,label\na,1\n"), tmp_path)) == 1


def test_an_image_folder(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", {"dog": [3, 1], "cat": [2], ".cache": [9]})
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / "cat" / "deep").mkdir()
    picture(7).save(folder / "cat" / "deep" / "x.JPG", format="PNG")
    split = split_of("images", tmp_path)
    assert split.classes == ["cat", "dog"]
    assert split.labels() == [0, 0, 1, 1]
    assert [np.asarray(split[row])[0, 0, 0] for row in range(4)] == [2, 7, 1, 3]
    assert split.is_image
    assert split[0].mode == "RGB"


def test_images_in_a_table(tmp_path: Path) -> None:
    name = table(
        tmp_path, {"img": [picture(5), picture(6).convert("L")], "fine_label": [1, 0]}, img=datasets.Image(),
        fine_label=datasets.ClassLabel(names=["a", "b"]),
    )  # fmt: skip
    split = split_of(name, tmp_path)
    assert (split.classes, split.labels(), split.label_column) == (["a", "b"], [1, 0], "fine_label")
    assert [np.asarray(split[row]).tolist()[0][0] for row in range(2)] == [[5] * 3, [6] * 3]


def test_a_datasets_folder_with_slices(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    for part, start in (("train", 0), ("test", 100)):
        lines = [f"text {start + row},{row % 2}" for row in range(10)]
        text_file(tmp_path / "hub", f"{part}.csv", "\n".join(["text,label", *lines]))
    split = split_of({"dataset": "hub", "split": "test[3:5]"}, tmp_path)
    assert [split[row] for row in range(len(split))] == ["text 103", "text 104"]
    assert split.where == "hub (test[3:5])"
    assert len(split_of({"dataset": "hub", "split": "train[:50%]"}, tmp_path)) == 5
    with pytest.raises(CheckpointError, match=r"hub \(tset\): cannot be read: .*tset"):
        split_of({"dataset": "hub", "split": "tset"}, tmp_path)


def test_pairs_of_texts(tmp_path: Path) -> None:
    name = table(tmp_path, {"b": ["x", "y"], "a": ["p", "q"], "label": [0, 1]})
    split = split_of({"path": name, "input": ["a", "b"]}, tmp_path)
    assert split[1] == ("q", "y")
    assert split.columns(1) == {"a": "q", "b": "y"}


def test_labels_by_name(tmp_path: Path) -> None:
    name = table(tmp_path, {"text": ["x", "y", "z"], "label": ["dog", "cat", "dog"]})
    split = split_of(name, tmp_path)
    assert (split.classes, split.labels()) == (["cat", "dog"], [1, 0, 1])
    named = split_of(name, tmp_path, classes=["dog", "eel", "cat"])
    assert (named.classes, named.labels()) == (["dog", "eel", "cat"], [0, 2, 0])
    assert named.labels(as_text=True) == ["dog", "cat", "dog"]


def test_numbered_labels_with_names(tmp_path: Path) -> None:
    split = split_of(table(tmp_path, TABLE), tmp_path, classes=["a", "b", "c"])
    assert split.labels() == TABLE["label"]
    assert split.labels(as_text=True) == ["c", "a", "b"]


def test_labels_that_are_measurements(tmp_path: Path) -> None:
    name = table(tmp_path, {"text": ["x", "y"], "similarity": [0.25, -3.5]})
    split = split_of({"path": name, "label": "similarity"}, tmp_path)
    assert (split.labels(), split.classes) == ([0.25, -3.5], None)


def test_inputs_need_no_labels(tmp_path: Path) -> None:
    split = split_of(table(tmp_path, {"text": ["x"]}), tmp_path, "adapt")
    assert (split[0], split.classes, split.label_column) == ("x", None, None)
    with pytest.raises(RecipeError, match=r"data\.parquet: labels missing: its columns are text; say which .* label:"):
        split.labels()


# ---------------------------------------------------------------- data that is refused


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ([0, 3], ["a", "b"], r"row 1 has label 3, but there are 2 classes, counted from 0; correct .* classes:"),
        ([0.0, 0.5], ["a", "b"], r"row 1 has label 0\.5, but there are 2 classes"),
        ([0, None], ["a", "b"], "row 1 has no label; a test split needs one in every row"),
        ([0, None], None, "row 1 has no label"),
        ([0, -1], None, "row 1 has no label"),
        ([0.5, float("nan")], None, "row 1 has no label"),
        (["dog", None], None, "row 1 has no label"),
        (["dog", "cta"], ["dog", "cat"], r"row 1 has the label 'cta', which is not in classes; did you mean 'cat'\?"),
    ],
)
def test_labels_that_are_refused(tmp_path: Path, labels: list[Any], classes: list[str] | None, message: str) -> None:
    task: dict[str, Any] = {} if classes is None else {"classes": classes}
    split = split_of(table(tmp_path, {"text": ["x", "y"], "label": labels}), tmp_path, **task)
    with pytest.raises(CheckpointError, match=rf"data\.parquet: {message}"):
        split.labels()


def test_a_csv_with_a_hole_among_its_labels(tmp_path: Path) -> None:
    split = split_of(text_file(tmp_path, "data.csv", "text,label\na,1\nb,\nc,0\n"), tmp_path)
    with pytest.raises(CheckpointError, match=r"data\.csv: row 1 has no label"):
        split.labels()


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("data.xlsx", b"x", RecipeError, r"data\.xlsx: is not a kind of data file that Plait reads \(\.parquet, \.csv"),
        ("data", b"x", RecipeError, r"data: is not a kind of data file"),
        ("data.csv", b"text,label\n", CheckpointError, r"data\.csv: holds no rows"),
        ("data.csv", b"", CheckpointError, r"data\.csv: "),
        ("data.jsonl", b"", CheckpointError, r"data\.jsonl: "),
        ("data.jsonl", b'{"text": "a", "lab', CheckpointError, r"data\.jsonl: cannot be read: \w+: "),
        ("data.parquet", b"", CheckpointError, r"data\.parquet: cannot be read: \w+: "),
        ("data.parquet", b"PAR1 and then nothing", CheckpointError, r"data\.parquet: cannot be read: \w+: "),
        ("data.csv", b"words,label\na,1\n", RecipeError, r"data\.csv: no input column: its columns are words, label; "),
        ("data.csv", b"text,label\na,1,2,3\nb\n", CheckpointError, r"data\.csv: "),
        ("data.csv", b"text,label\n\xff\xfe,1\n", CheckpointError, r"data\.csv: cannot be read: UnicodeDecodeError: "),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, content: bytes, kind: Any, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(kind, match=message):
        split_of(name, tmp_path).labels()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gone\.csv: no such file .*; data paths are seen from"):
        split_of("gone.csv", tmp_path)


def test_a_truncated_parquet(tmp_path: Path) -> None:
    name = table(tmp_path, {"text": [f"text {row}" for row in range(500)], "label": list(range(500))})
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"data\.parquet: cannot be read: \w+: "):
        split_of(name, tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"input": "txt"}, r"data\.csv: has no column 'txt': its columns are text, label"),
        ({"input": ["text", "other"]}, r"data\.csv: has no column 'other': its columns are text, label"),
        ({"label": "digit"}, r"data\.csv: labels missing: has no column 'digit': its columns are text, label"),
    ],
)
def test_columns_that_are_not_there(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    text_file(tmp_path, "data.csv", "text,label\na,1\n")
    with pytest.raises(RecipeError, match=message):
        split_of({"path": "data.csv", **entry}, tmp_path)


def test_a_text_that_is_missing(tmp_path: Path) -> None:
    split = split_of(table(tmp_path, {"text": ["x", None], "label": [0, 1]}), tmp_path)
    assert split[0] == "x"
    with pytest.raises(CheckpointError, match=r"data\.parquet: row 1: 'text' is None, not a text; remove the row"):
        _ = split[1]
    with pytest.raises(CheckpointError, match=r"row 1: 'text' is None"):
        _ = split.digests


def test_a_broken_image_names_its_row(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", {"a": [1, 2, 3]})
    (folder / "a" / "2.png").write_bytes((folder / "a" / "2.png").read_bytes()[:30])
    split = split_of("images", tmp_path)
    assert split[0].size == (8, 8)
    with pytest.raises(CheckpointError, match=r"images: row 1: the image cannot be decoded .*; remove or replace it"):
        _ = split[1]
    (folder / "a" / "3.png").unlink()
    with pytest.raises(CheckpointError, match=r"images: row 2.*3\.png"):
        _ = split[2]


def test_an_image_that_is_missing(tmp_path: Path) -> None:
    name = table(
        tmp_path, {"image": [picture(1), None], "label": [0, 1]}, image=datasets.Image(), label=datasets.Value("int64")
    )
    with pytest.raises(CheckpointError, match=r"data\.parquet: row 1 has no image; remove the row"):
        _ = split_of(name, tmp_path)[1]


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="images: holds no images, alone or in folders named by class"):
        split_of("images", tmp_path)


def test_a_split_that_the_suite_does_not_have(mini: MiniSuite, tmp_path: Path) -> None:
    suite = read(tmp_path, SUITE)
    with pytest.raises(RecipeError, match=r"line 5: tasks\.mnist\.data: has no train split; add train: there"):
        load_split(suite, "mnist", "train")


# ---------------------------------------------------------------- disjoint splits


def splits(folder: Path, **texts: list[str]) -> dict[str, Split]:
    for name, values in texts.items():
        table(folder, {"text": values, "label": list(range(len(values)))}, f"{name}.parquet")
    return {name: split_of(f"{name}.parquet", folder, name) for name in texts}


@pytest.mark.parametrize("name", ["adapt", "train"])
def test_a_split_that_overlaps_the_test_is_refused(tmp_path: Path, name: str) -> None:
    found = splits(tmp_path, test=["a", "b", "c", "d"], **{name: ["x", "d", "y", "b", "b"]})
    with pytest.raises(CheckpointError) as caught:
        check_disjoint("task", found)
    assert str(caught.value) == (
        f"{name}.parquet: 3 of its 5 inputs are also in task's test split (row 1 is row 3 of test.parquet); {name} and "
        f"test must be disjoint: remove them from {name}"
    )


@pytest.mark.parametrize("same", ["a B", " A  b ", "a\tb\n"])
def test_case_and_spacing_make_no_other_text(tmp_path: Path, same: str) -> None:
    found = splits(tmp_path, test=["x", "A b"], adapt=["y", same])
    with pytest.raises(CheckpointError, match=r"1 of its 2 inputs .*\(row 1 is row 1 of test\.parquet\)"):
        check_disjoint("task", found)


def test_other_texts_are_disjoint(tmp_path: Path) -> None:
    check_disjoint("task", splits(tmp_path, test=["a b", "x", "x"], adapt=["ab", "a c"], train=["b a"]))


def test_images_overlap_by_their_bytes(tmp_path: Path) -> None:
    image_folder(tmp_path / "test", {"a": [1, 2]})
    image_folder(tmp_path / "adapt", {"b": [3, 2]})
    found = {name: split_of(name, tmp_path, name) for name in ("test", "adapt")}
    with pytest.raises(CheckpointError, match=r"adapt: 1 of its 2 inputs .*\(row 0 is row 1 of test\)"):
        check_disjoint("task", found)


def test_pairs_are_compared_as_pairs(tmp_path: Path) -> None:
    both = {"path": table(tmp_path, {"a": ["x"], "b": ["y z"]}, "one.parquet"), "input": ["a", "b"]}
    other = {"path": table(tmp_path, {"a": ["x y"], "b": ["z"]}, "two.parquet"), "input": ["a", "b"]}
    check_disjoint("task", {"test": split_of(both, tmp_path), "adapt": split_of(other, tmp_path, "adapt")})


# ---------------------------------------------------------------- fingerprints


def test_what_a_fingerprint_is_of(tmp_path: Path) -> None:
    def of(texts: list[str], labels: list[Any], name: str = "data.parquet", **task: Any) -> str:
        place = tmp_path / hashlib.sha256(repr((texts, labels)).encode()).hexdigest()
        place.mkdir(exist_ok=True)
        return split_of(table(place, {"text": texts, "label": labels}, name), place, **task).fingerprint()

    first = of(["a", "b"], [0, 1])
    assert of(["a", "b"], [0, 1], "other.parquet") == first, "a file's name is nothing"
    others = [
        of(["a", "c"], [0, 1]), of(["a", "b"], [1, 1]), of(["b", "a"], [1, 0]), of(["a", "b", "b"], [0, 1, 1]),
        of(["a", "B"], [0, 1]), of(["a", "b "], [0, 1]), of(["a", "b"], [0, 1], classes=["x", "y"]),
        of(["a", "b"], [0, 1], classes=["y", "x"]), of(["a", "b"], ["x", "y"]),
    ]  # fmt: skip
    assert first not in others
    assert len(set(others)) == len(others) - 1, "names for numbers are the same as names"


def test_the_fingerprint_of_images_is_of_their_files(tmp_path: Path) -> None:
    image_folder(tmp_path / "one", {"a": [1, 2]})
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "a" / "1.png").rename(tmp_path / "two" / "a" / "0.png")
    assert split_of("one", tmp_path).fingerprint() == split_of("two", tmp_path).fingerprint()
    picture(3).save(tmp_path / "two" / "a" / "2.png")
    assert split_of("one", tmp_path).fingerprint() != split_of("two", tmp_path).fingerprint()


# ---------------------------------------------------------------- heads fitted on features


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_a_probe_is_logistic_regression(classes: int, standardise: bool) -> None:
    random = np.random.default_rng(classes)
    labels = np.arange(120) % classes
    inputs = random.normal(size=(120, 6)) * [1, 5, 0.2, 1, 1, 3] + 2 + np.eye(classes, 6)[labels]
    settings = Settings(steps=1, probe_c=0.3, standardise=standardise)
    weight, bias = fit_probe(inputs, labels, settings)
    assert (weight.shape, bias.shape, weight.dtype) == ((classes, 6), (classes,), torch.float32)
    plain_weight, plain_bias = plain_probe(inputs, labels, settings)
    expected = torch.softmax(torch.tensor(inputs) @ plain_weight.T + plain_bias, dim=1)
    found = torch.softmax(torch.tensor(inputs).float() @ weight.T + bias, dim=1)
    torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=0)


def plain_probe(inputs: np.ndarray, labels: np.ndarray, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """The penalised likelihood, minimised directly; returns weight and bias for the inputs as they are."""
    x, y = torch.tensor(inputs), torch.tensor(labels)
    shift = x.mean(dim=0) if settings.standardise else torch.zeros(x.shape[1]).double()
    scale = (x - shift).std(correction=0) if settings.standardise else torch.ones(()).double()
    two = int(y.max()) == 1  # scikit-learn then penalises one row, the log odds
    weight = torch.zeros(1 if two else int(y.max()) + 1, x.shape[1], dtype=torch.double, requires_grad=True)
    bias = torch.zeros(len(weight), dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], lr=1, max_iter=500, line_search_fn="strong_wolfe")

    def spread() -> tuple[torch.Tensor, torch.Tensor]:
        return (torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2) if two else (weight, bias)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        rows, offsets = spread()
        logits = (x - shift) / scale @ rows.T + offsets
        loss = settings.probe_c * torch.nn.functional.cross_entropy(logits, y, reduction="sum")
        loss = loss + 0.5 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    rows, offsets = (part.detach() for part in spread())
    return rows / scale, offsets - rows / scale @ shift


# ---------------------------------------------------------------- experts

QUICK = Settings(steps=30, lr=3e-3, batch_size=16, shots=10, probe_c=1.0)


@pytest.fixture(scope="module")
def source(mini: MiniSuite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data as suites of ours have it: task/{train,adapt,test}.parquet."""
    root = tmp_path_factory.mktemp("source")
    for task in ("tone", "count"):
        (root / task).mkdir()
        kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=CLASSES[task])})
        for split, rows in mini.rows[task].items():
            made = datasets.Dataset.from_dict({"text": rows.inputs, "label": rows.labels}, features=kinds)
            made.to_parquet(root / task / f"{split}.parquet")
    return root


@pytest.fixture(scope="module")
def trained(mini: MiniSuite, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "tone"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLAIT_CACHE", str(mini.cache))
        make_expert(mini.base, source / "tone", out, QUICK, max_length=16)
    return out


def loss(mini: MiniSuite, folder: Path, head: Path) -> float:
    """Cross-entropy on the train split under a head."""
    net = load_net(folder, "net", processor_from=mini.base, pooling="mean", max_length=16)
    split = load_split(mini.suite, "tone", "train")
    scores = read_head(head)(train.features(net, split, range(len(split))))
    return float(torch.nn.functional.cross_entropy(scores, torch.tensor(split.labels())))


def test_an_expert_is_better_than_the_base_under_its_head(mini: MiniSuite, trained: Path) -> None:
    head = trained / "head.safetensors"
    assert loss(mini, trained, head) < 0.8 * loss(mini, mini.base, head)
    assert read_head(head).names == CLASSES["tone"]
    config = json.loads((trained / "config.json").read_text())
    assert config["id2label"] == {str(index): name for index, name in enumerate(CLASSES["tone"])}


def test_a_frozen_head_is_the_probe(mini: MiniSuite, source: Path, trained: Path) -> None:
    split = split_of(str(source / "tone" / "train.parquet"), source)
    labels = np.array(split.labels())
    few = sorted(row for index in range(3) for row in np.flatnonzero(labels == index)[: QUICK.shots])
    net = load_net(mini.base, "base", max_length=16)
    weight, bias = fit_probe(train.features(net, split, few).numpy(), labels[few], QUICK)
    found = load_file(trained / "head.safetensors")
    assert torch.equal(found["classifier.weight"], weight)
    assert torch.equal(found["classifier.bias"], bias)


def test_the_same_expert_twice(mini: MiniSuite, source: Path, trained: Path, tmp_path: Path) -> None:
    steps: list[int] = []
    torch.manual_seed(123)
    make_expert(mini.base, source / "tone", tmp_path / "tone", QUICK, max_length=16, tell=steps.append)
    assert folder_hash(tmp_path / "tone") == folder_hash(trained)
    assert steps == list(range(1, QUICK.steps + 1))
    assert [path.name for path in tmp_path.iterdir()] == ["tone"]


def test_frozen_parameters_stay(mini: MiniSuite, source: Path, tmp_path: Path) -> None:
    frozen = ("embeddings", "encoder.layer.0")
    make_expert(mini.base, source / "count", tmp_path / "x", replace(QUICK, steps=2, frozen=frozen), max_length=16)
    before, after = load_file(mini.base / "model.safetensors"), load_file(tmp_path / "x" / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if not name.startswith((*frozen, "pooler"))}


def test_with_head_lr_the_head_is_trained_too(mini: MiniSuite, source: Path, tmp_path: Path) -> None:
    heads = {}
    for steps in (1, 20):
        settings = replace(QUICK, steps=steps, head_lr=1e-2)
        make_expert(mini.base, source / "count", tmp_path / "x", settings, max_length=16)
        heads[steps] = load_file(tmp_path / "x" / "head.safetensors")["classifier.weight"]
    assert (heads[20] - heads[1]).abs().max() > 0.01
    assert heads[20].shape == (2, 32)


def test_heads_are_fitted_on_the_first_of_every_class(
    mini: MiniSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on the first rows, which in a sorted file are all of one class."""
    labels = [0] * 20 + [1] * 20
    kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    table(tmp_path, {"text": [f"w{row}" for row in range(40)], "label": labels}, "train.parquet", **kinds)
    seen: list[Any] = []
    monkeypatch.setattr(train, "fit_probe", lambda x, y, s: (seen.append(y.tolist()), fit_probe(x, y, s))[1])
    make_expert(mini.base, tmp_path, tmp_path / "out", replace(QUICK, steps=1, shots=3), max_length=16)
    assert seen == [[0, 0, 0, 1, 1, 1]]


def test_a_class_without_examples_is_refused(mini: MiniSuite, tmp_path: Path) -> None:
    kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    table(tmp_path, {"text": ["w1", "w2"], "label": [0, 2]}, "train.parquet", **kinds)
    with pytest.raises(CheckpointError, match=r"train\.parquet: no row has the class 'b'; a head needs examples"):
        make_expert(mini.base, tmp_path, tmp_path / "out", QUICK, max_length=16)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- building

TINY = Settings(steps=2, batch_size=8, shots=5)
Build = Callable[..., Path]


PROCESSES = build.ProcessPoolExecutor


class _Threads(ThreadPoolExecutor):
    """Workers in this process: what a spawned one does is tested once."""

    def __init__(self, workers: int, mp_context: Any, **options: Any) -> None:
        super().__init__(1, **options)


@pytest.fixture
def builder(mini: MiniSuite, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """`build_suite` of a tiny suite called text, in a cache of its own; keywords change settings of tasks."""
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(build, "ProcessPoolExecutor", _Threads)
    copied: list[Path] = []

    def base(out: Path) -> None:
        copied.append(out)
        shutil.copytree(mini.base, out, dirs_exist_ok=True)

    def run(
        data: Path | None = source, only: list[str] | None = None, progress: Any = None, **changed: Settings
    ) -> Path:
        tasks = {"tone": TINY, "count": TINY, **changed}
        monkeypatch.setitem(RECIPES, "text", Recipe("tiny", "text", base, tasks, max_length=16, pooling="mean"))
        folder = build_suite("text", data=data, tasks=only, workers=1, progress=progress)
        assert len(copied) == 1, "the base is made once"
        return folder

    return run


def times(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_experts_are_trained_in_processes_of_their_own(builder: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ProcessPoolExecutor", PROCESSES)
    monkeypatch.setattr(train, "make_expert", None)  # reaches this process only
    monkeypatch.setattr(build, "make_expert", None)
    folder = builder(only=["tone"])
    assert read_head(folder / "experts" / "tone" / "head.safetensors").names == CLASSES["tone"]
    assert list(load_suite("text").tasks) == ["tone"]


def test_building(builder: Build, tmp_path: Path) -> None:
    folder = builder()
    assert folder == suite_folder("text") == tmp_path / "cache" / "suites" / "text"
    suite = load_suite("text")
    assert list(suite.tasks) == ["tone", "count"]
    assert (suite.name, suite.base, suite.pooling, suite.max_length) == ("text", "base", "mean", 16)
    assert set(suite.tasks["tone"].data) == {"train", "adapt", "test"}
    for task in suite.tasks:
        check_disjoint(task, {split: load_split(suite, task, split) for split in ("train", "adapt", "test")})
        record = yaml.safe_load((folder / "experts" / task / "training.yaml").read_text())
        assert record["steps"] == 2
        assert record["seconds"] >= 0
    assert not [path for path in folder.rglob(".*") if path.name != ".gitattributes"], "no scratch files"


def test_what_is_there_is_kept_and_what_changed_is_made_again(builder: Build) -> None:
    folder = builder()
    first = {task: times(folder / "experts" / task) for task in ("tone", "count")}
    base = times(folder / "base")
    builder()
    assert {task: times(folder / "experts" / task) for task in first} == first
    assert times(folder / "base") == base
    builder(count=replace(TINY, steps=3, frozen=("embeddings",)))
    assert times(folder / "experts" / "tone") == first["tone"]
    assert times(folder / "experts" / "count") != first["count"]
    again = times(folder / "experts" / "count")
    builder(count=replace(TINY, steps=3, frozen=("embeddings",)))
    assert times(folder / "experts" / "count") == again, "a tuple that went through YAML is still the same setting"
    (folder / "experts" / "count" / "training.yaml").write_text("")
    builder(count=replace(TINY, steps=3, frozen=("embeddings",)))
    assert times(folder / "experts" / "count") != again, "a record that was cut off is none"


def test_some_tasks_first(builder: Build) -> None:
    folder = builder(only=["count"])
    assert list(load_suite("text").tasks) == ["count"]
    kept = times(folder / "experts" / "count")
    builder()
    assert list(load_suite("text").tasks) == ["tone", "count"], "in the recipe's order"
    assert times(folder / "experts" / "count") == kept


@pytest.mark.parametrize("after", [0, 1])
def test_an_expert_that_fails_leaves_nothing_half(builder: Build, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Before its folder is made, and while it is written."""

    def fail(*args: Any, **options: Any) -> Any:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        if after:
            patch.setattr(train, "_head_bytes", fail)
        else:
            patch.setattr(train, "_fine_tune", fail)
        with pytest.raises(OSError, match="no space left"):
            builder()
    folder = suite_folder("text")
    assert not list((folder / "experts").glob("*")) if (folder / "experts").exists() else True
    assert not (folder / "suite.yaml").exists()
    assert list((builder() / "experts" / "tone").glob("head.safetensors"))


def test_a_killed_base_is_made_again(builder: Build, mini: MiniSuite) -> None:
    scratch = suite_folder("text") / f".base-{os.getpid()}"
    scratch.mkdir(parents=True)
    (scratch / "half").write_text("x")
    assert sorted(p.name for p in (builder() / "base").iterdir()) == sorted(p.name for p in mini.base.iterdir())


def test_messages_of_building(builder: Build, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"visoin: is no suite that can be built; did you mean 'vision'\?"):
        build_suite("visoin")
    with pytest.raises(RecipeError, match=r"text: the suite has no task 'tones'; did you mean 'tone'\?"):
        builder(only=["tones"])
    with pytest.raises(RecipeError, match=r"tone.train\.parquet: is missing; give the folder that holds every task's"):
        builder(data=tmp_path)
    shutil.copytree(source, tmp_path / "part")
    (tmp_path / "part" / "count" / "adapt.parquet").unlink()
    with pytest.raises(RecipeError, match=r"count.adapt\.parquet: is missing"):
        builder(data=tmp_path / "part")
    monkeypatch.setattr(build.plait, "__file__", str(tmp_path / "site" / "plait" / "__init__.py"))
    with pytest.raises(MachineError, match=r"data/text, and not in the installed .* --data PATH/data/text"):
        builder(data=None)


def test_progress_counts_the_steps(builder: Build) -> None:
    told: list[Any] = []

    class Shown:
        def stage(self, *what: Any) -> None:
            told.append(what)

        def advance(self, count: int) -> None:
            told.append(count)

    builder(only=["count"])
    builder(progress=Shown())
    assert told[0] == ("train 1 experts", 2, "steps")
    assert set(told[1:]) <= {1}
    assert len(told[1:]) <= 2
